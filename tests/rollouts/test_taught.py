"""Completions of a mixture of two models: its law, and that nothing but a row's identity decides them."""

import pytest
import torch

from keel.core.errors import UserError
from keel.core.rows import Rows
from keel.models.adapters import AdapterView, LoRA, add_lora
from keel.models.language import LanguageModel
from keel.models.tiny import SMALL, build_tiny
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.rollouts.taught import generate_mixture
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb, TopK

PROMPTS = [[3, 4, 5], [6], [3, 4, 5, 7]]
SAMPLING = Sampling(max_completion_length=6)


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    """A policy and a teacher that differ clearly."""
    models = build_tiny("abcdef", SMALL, 0), build_tiny("abcdef", SMALL, 1)
    with torch.no_grad():
        for i, model in enumerate(models):
            model.transformer.base_model.norm.weight.mul_(6.0 + 3 * i)
    return models


def drawn(pair, alpha: float, prompts=PROMPTS, index=(0, 1, 2), sampling: Sampling = SAMPLING, n: int = 3) -> Rows:
    own, teacher = (LocalGenerator(model) for model in pair)
    return generate_mixture(own, teacher, alpha, prompts, n, sampling, seed=5, step=2, data_index=list(index))


def measured(model: LanguageModel, rows: Rows, temperature: float = 1.0) -> torch.Tensor:
    return Engine({"policy": model}, temperature=temperature).measure([LogProb()], rows)[LogProb()]


@pytest.mark.parametrize(("alpha", "temperature"), [(0.2, 1.0), (0.6, 1.0), (0.5, 1.7)])
def test_what_is_recorded_is_the_mixture_of_what_both_would_say(pair, alpha, temperature):
    rows = drawn(pair, alpha, sampling=Sampling(temperature=temperature, max_completion_length=6))
    own, teacher = (measured(model, rows, temperature).exp() for model in pair)
    wanted = ((1 - alpha) * own + alpha * teacher).log()
    assert "behaviour" not in rows.logp
    torch.testing.assert_close(rows.logp["mixture"][rows.mask], wanted[rows.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("share", "temperature"), [(0.125, 1.0), (0.6, 1.7)])
def test_the_geometric_mixture_is_that_of_each_token(pair, share, temperature):
    """log q = share log teacher + (1 - share) log policy, normalised at each token: by whole tables of both."""
    sampling = Sampling(temperature=temperature, max_completion_length=6)
    own, teacher = (LocalGenerator(model) for model in pair)
    rows = generate_mixture(
        own, teacher, share, PROMPTS, 3, sampling, seed=5, step=2, data_index=[0, 1, 2], geometric=True
    )
    width = pair[0].vocabulary_size
    tables = []
    for model in pair:
        found = Engine({"policy": model}, temperature=temperature).measure([TopK(width), TopK(width, ids=True)], rows)
        table = torch.zeros(*rows.tokens.shape, width)
        tables.append(table.scatter_(-1, found[TopK(width, ids=True)].long(), found[TopK(width)]))
    wanted = ((1 - share) * tables[0] + share * tables[1]).log_softmax(-1).gather(-1, rows.tokens[..., None])[..., 0]
    torch.testing.assert_close(rows.logp["mixture"][rows.mask], wanted[rows.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("alpha", "who"), [(1.0, 1), (1e-12, 0)])
def test_at_the_ends_one_of_the_two_writes_alone(pair, alpha, who):
    rows = drawn(pair, alpha)
    alone = LocalGenerator(pair[who]).generate(PROMPTS, 3, SAMPLING, seed=5, step=2, data_index=[0, 1, 2])
    assert torch.equal(rows.tokens, alone.tokens) and torch.equal(rows.row, alone.row)


@pytest.mark.parametrize("geometric", [False, True])
def test_a_policy_under_an_adapter_writes_with_its_own_base(pair, geometric):
    """As with a copy of the base beside it; afterwards the adapter is on."""
    base = pair[0].copy()
    policy = LanguageModel(add_lora(pair[0].copy().module, LoRA(rank=2)), pair[0].tokenizer)
    with torch.no_grad():
        for name, weight in policy.module.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    own, seen = LocalGenerator(policy), AdapterView(policy)
    asked = 0.5, PROMPTS, 3, SAMPLING
    known = {"seed": 5, "geometric": geometric}
    rows = generate_mixture(own, LocalGenerator(policy), *asked, **known, view=seen)
    beside = generate_mixture(own, LocalGenerator(base), *asked, **known)
    assert torch.equal(rows.tokens, beside.tokens)
    torch.testing.assert_close(rows.logp["mixture"], beside.logp["mixture"], rtol=1e-4, atol=1e-5)
    assert float((measured(policy, rows) - measured(base, rows)).abs().max()) > 0.01


def test_neither_order_nor_company_matters(pair):
    rows = drawn(pair, 0.4)
    alone = drawn(pair, 0.4, prompts=[PROMPTS[2]], index=(2,))
    turned = drawn(pair, 0.4, prompts=PROMPTS[::-1], index=(2, 1, 0))
    for other in (alone, turned):
        texts = {int(r): t[m].tolist() for r, t, m in zip(other.row, other.tokens, other.mask, strict=True)}
        for row, tokens, mask in zip(rows.row, rows.tokens, rows.mask, strict=True):
            assert texts.get(int(row), tokens[mask].tolist()) == tokens[mask].tolist()
    assert set(alone.row.tolist()) <= set(rows.row.tolist())


def test_filters_act_on_the_mixture(pair):
    rows = drawn(pair, 0.5, sampling=Sampling(top_k=1, max_completion_length=4))
    torch.testing.assert_close(rows.logp["mixture"], torch.zeros_like(rows.logp["mixture"]))


def test_prompts_must_fit_both(pair):
    with pytest.raises(UserError, match="context"):
        drawn(pair, 0.5, sampling=Sampling(max_completion_length=4000))
