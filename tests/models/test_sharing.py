"""Rows of one prompt in one sequence: the states and gradients of separate sequences."""

import pytest
import torch

from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.models.sharing import share_prompts
from keel.models.tiny import SMALL, build_tiny


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_tiny("0123456789+=", SMALL)


def batch(lengths, prompts, group, pad=0) -> Rows:
    """Rows with completions of given lengths; prompts of given lengths, left-padded."""
    chance = torch.Generator().manual_seed(sum(lengths))
    width, longest = max(prompts), max(lengths)
    group = torch.tensor(group)
    every = torch.randint(3, 15, (int(group.max()) + 1, width), generator=chance)
    prompt_mask = torch.arange(width) >= width - torch.tensor(prompts)[:, None]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, 15, (len(lengths), longest), generator=chance)
    return Rows.build(every[group] * prompt_mask, prompt_mask, tokens * mask + pad * ~mask, mask, group=group)


ROWS = batch([3, 5, 1, 4, 2, 5], [6, 6, 6, 4, 4, 4], [0, 0, 0, 1, 1, 1])


def states(model, rows, shares):
    model.shares_prompts = shares
    model.module.zero_grad()
    hidden = model.hidden(rows)[rows.mask]
    (hidden * torch.arange(hidden.numel()).view_as(hidden).cos()).sum().backward()  # a squared norm would cancel
    return hidden.detach(), {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}


def test_states_and_gradients_are_those_of_separate_sequences(model):
    shared = share_prompts(ROWS, 0)
    assert (shared.segment >= 0).sum(1).tolist() == [6 + 3 + 5 + 1, 4 + 4 + 2 + 5]  # each prompt once
    (one, gradients), (other, expected) = states(model, ROWS, True), states(model, ROWS, False)
    assert float((one - other).abs().max()) < 1e-5
    for name, gradient in expected.items():
        assert float((gradients[name] - gradient).abs().max()) < 1e-4 * max(1.0, float(gradient.abs().max()))


def test_the_order_of_rows_does_not_matter(model):
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    model.shares_prompts = True
    with torch.no_grad():
        straight, mixed = model.hidden(ROWS), model.hidden(ROWS.select(order))
    assert float(((straight[order] - mixed) * ROWS.mask[order][..., None]).abs().max()) < 1e-5


def test_no_completion_sees_another(model):
    changed = ROWS.with_(tokens=ROWS.tokens.clone())
    changed.tokens[1] = 14 - (changed.tokens[1] - 3)
    model.shares_prompts = True
    with torch.no_grad():
        before, after = model.hidden(ROWS), model.hidden(changed)
    others = [0, 2, 3, 4, 5]
    assert torch.equal((before * ROWS.mask[..., None])[others], (after * ROWS.mask[..., None])[others])
    assert not torch.equal(before[1, 2:], after[1, 2:])


@pytest.mark.parametrize(
    "rows",
    [
        batch([3, 5], [6, 6], [0, 1]),  # no group of several rows
        ROWS.with_(group=torch.zeros(6, dtype=torch.long)),  # a group with two prompts
        ROWS.with_(prompt_mask=torch.zeros_like(ROWS.prompt_mask)),  # no prompt
        batch([30] * 4, [1] * 4, [0] * 4),  # a prompt too short to be worth it
        batch([300] * 4, [400] * 4, [0] * 4),  # too long for a block mask
    ],
)
def test_what_is_not_worth_it_is_not_shared(rows):
    assert share_prompts(rows, 0) is None
