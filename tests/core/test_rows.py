"""Rows: selection, joining, padding, pairs, and the errors of each."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from keel.core.rows import Pairs, Rows, Stream, Totals, cat

# three rows: lengths 3, 1, 2; prompts of 1, 3 and 2 tokens in a width of 4
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
PROMPTS = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()


def make(**known) -> Rows:
    tokens = torch.arange(15).reshape(3, 5)
    return Rows.build(torch.arange(12).reshape(3, 4), PROMPTS, tokens, MASK, **known)


def full() -> Rows:
    ones = torch.ones(1)
    return make(
        reward=torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]),
        token_reward=torch.arange(15.0).reshape(3, 5),
        label=torch.tensor([0.0, 1.0, 1.0]),
        advantage=torch.arange(30.0).reshape(3, 5, 2),
        logp={"behaviour": -torch.arange(15.0).reshape(3, 5)},
        segment=torch.arange(15).reshape(3, 5),
        masks={"nll": MASK.clone()},
        inputs={"pixels": torch.arange(6.0).reshape(3, 2)},
        columns={"turn": torch.arange(3), "values": torch.arange(15.0).reshape(3, 5)},
        pairs=Pairs(torch.tensor([2]), torch.tensor([0]), ones, ones, ones, 0 * ones),
    )


def test_neutral_values():
    rows = make()
    assert len(rows) == 3 and not rows.exact
    assert rows.weight.tolist() == [1, 1, 1] and rows.group.tolist() == [0, 1, 2]
    assert rows.lengths.tolist() == [3, 1, 1]
    assert rows.owner.all() and (rows.mult == 1).all() and rows.main.all()


def test_present_covers_what_lies_between():
    rows = make()
    assert rows.present.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    empty = make().select(torch.zeros(3, dtype=torch.bool))
    assert empty.present.tolist() == [] and empty.present.shape[1] == 5  # as wide as before, without a row


def test_loss_mask_is_main_and_owned():
    owner = torch.ones(3, 5, dtype=torch.bool)
    owner[0, 1] = False
    rows = make(owner=owner, stream=torch.tensor([0, int(Stream.BASELINE), int(Stream.REGULARISER)]))
    assert rows.loss_mask.int().tolist() == [[1, 0, 1, 0, 0], [0] * 5, [0] * 5]


def test_select_keeps_the_order_of_the_index_in_every_field():
    rows = full().with_(pairs=None).select(torch.tensor([2, 0]))
    assert rows.tokens[:, 0].tolist() == [10, 0] and rows.prompt_ids[:, 0].tolist() == [8, 0]
    assert rows.row.tolist() == [2, 0] and rows.reward[:, 0].tolist() == [3.0, 1.0]
    assert rows.token_reward[:, 1].tolist() == [11.0, 1.0] and rows.advantage[:, 0, 1].tolist() == [21.0, 1.0]
    assert rows.logp["behaviour"][:, 1].tolist() == [-11.0, -1.0]
    assert rows.columns["turn"].tolist() == [2, 0] and rows.columns["values"][:, 0].tolist() == [10.0, 0.0]
    assert rows.inputs["pixels"][:, 0].tolist() == [4.0, 0.0] and rows.segment[:, 0].tolist() == [10, 0]
    assert torch.equal(rows.masks["nll"], rows.mask)


def test_select_by_mask():
    assert make().select(torch.tensor([True, False, True])).row.tolist() == [0, 2]


def test_select_moves_pairs_with_their_rows():
    rows = full().select(torch.tensor([0, 2]))
    assert rows.pairs.chosen.tolist() == [1] and rows.pairs.rejected.tolist() == [0]
    assert full().select(torch.tensor([1])).pairs.chosen.tolist() == []
    with pytest.raises(ValueError, match="both rows of a pair"):
        full().select(torch.tensor([1, 2]))


def test_padding_is_masked_out_on_the_right_sides():
    wide = full().padded(6, 7)
    assert not wide.prompt_mask[:, :2].any() and not wide.mask[:, 5:].any() and not wide.owner[:, 5:].any()
    assert not wide.loss_mask[:, 5:].any() and torch.equal(wide.present, F.pad(full().present, (0, 2)))
    assert torch.equal(wide.prompt_ids[:, 2:], full().prompt_ids) and wide.prompt_ids.shape[1] == 6
    assert torch.equal(wide.tokens[:, :5], full().tokens) and wide.tokens.shape[1] == 7
    assert torch.equal(wide.advantage, F.pad(full().advantage, (0, 0, 0, 2)))
    assert torch.equal(wide.columns["values"], F.pad(full().columns["values"], (0, 2)))
    assert wide.columns["turn"].tolist() == [0, 1, 2]


def test_padding_never_cuts():
    same = full().padded(1, 1)
    assert torch.equal(same.prompt_ids, full().prompt_ids) and torch.equal(same.tokens, full().tokens)


def test_trim_undoes_padding():
    trimmed = full().padded(9, 11).trim()
    # the longest prompt and the longest completion have three tokens
    assert torch.equal(trimmed.prompt_mask, PROMPTS[:, 1:]) and torch.equal(trimmed.mask, MASK[:, :3])
    assert torch.equal(trimmed.columns["values"], full().columns["values"][:, :3])
    assert torch.equal(trimmed.prompt_ids, full().prompt_ids[:, 1:]) and torch.equal(
        trimmed.tokens, full().tokens[:, :3]
    )
    assert torch.equal(trimmed.advantage, full().advantage[:, :3])
    assert torch.equal(trimmed.logp["behaviour"], full().logp["behaviour"][:, :3])


def test_trim_of_rows_without_tokens():
    nothing = make().with_(mask=torch.zeros(3, 5, dtype=torch.bool)).trim()
    assert nothing.tokens.tolist() == [[], [], []] and torch.equal(nothing.prompt_ids, make().prompt_ids[:, 1:])
    assert len(make().select(torch.zeros(3, dtype=torch.bool)).trim()) == 0


def test_cat_pads_to_the_widest_and_shifts_pairs():
    small = full().select(torch.tensor([0, 2])).trim()
    both = cat([small, full()])
    assert torch.equal(both.tokens[2:], full().tokens) and torch.equal(both.prompt_ids[2:], full().prompt_ids)
    assert torch.equal(both.tokens[:2][both.mask[:2]], small.tokens[small.mask])
    assert torch.equal(both.prompt_ids[:2][both.prompt_mask[:2]], small.prompt_ids[small.prompt_mask])
    assert both.lengths.tolist() == [3, 1, 3, 1, 1]
    assert both.pairs.chosen.tolist() == [1, 4] and both.pairs.rejected.tolist() == [0, 2]
    assert both.logp["behaviour"][0].tolist() == [0.0, -1.0, -2.0, 0.0, 0.0]
    assert both.row.tolist() == [0, 2, 0, 1, 2]


def test_cat_of_one_is_the_same():
    one = cat([full()])
    assert torch.equal(one.tokens, full().tokens) and torch.equal(one.advantage, full().advantage)


def test_cat_forgets_the_denominators_of_its_parts():
    parts = [make().with_(totals=Totals(1.0, 2.0, 3.0)), make()]
    assert cat(parts).totals is None


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (list, "at least one"),
        (lambda: [make(), make(reward=torch.ones(3, 1))], "'reward' is missing"),
        (lambda: [make(reward=torch.ones(3, 1)), make()], "'reward' is missing"),
        (lambda: [make(), make(logp={"behaviour": torch.zeros(3, 5)})], "'logp' holds"),
        (lambda: [make(), make(exact=True)], "enumerated rows and sampled rows"),
    ],
)
def test_cat_refuses(parts, what):
    with pytest.raises(ValueError, match=what):
        cat(parts())


def test_moving_keeps_everything():
    moved = full().to("cpu")
    assert torch.equal(moved.pairs.chosen, full().pairs.chosen)
    assert torch.equal(moved.columns["values"], full().columns["values"]) and moved.totals is None


def test_shapes_are_checked(monkeypatch):
    monkeypatch.setattr("tests.annotations.EVERY", 1)
    with pytest.raises(jaxtyping.TypeCheckError):
        make(weight=torch.ones(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        make(token_reward=torch.ones(3, 6))
    with pytest.raises(jaxtyping.TypeCheckError):
        make(group=torch.zeros(3))  # floats for integers


def test_vectors_of_a_row_are_never_cut_as_tokens():
    """Two features beside two tokens: trimming and padding change the tokens alone."""
    mask = torch.tensor([[True, False], [True, False]])
    rows = Rows.build(torch.zeros(2, 1, dtype=torch.long), mask[:, :1], torch.zeros(2, 2, dtype=torch.long), mask)
    rows = rows.with_(features={"moments": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert [changed.mask.int().tolist() for changed in (rows.trim(), rows.padded(1, 5))] == [
        [[1], [1]], [[1, 0, 0, 0, 0]] * 2,
    ]  # fmt: skip
    for changed in (
        rows.trim(),
        rows.padded(1, 5),
        cat([rows.select(torch.tensor([0])), rows.select(torch.tensor([1]))]),
    ):
        assert torch.equal(changed.features["moments"], rows.features["moments"])
