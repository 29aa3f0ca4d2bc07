"""Enumerable spaces and tabular policies."""

import pytest
import torch
from tests.worlds import SPACE, from_probs, sample, table

from keel.core.rows import Stop
from keel.exact.space import SequenceSpace, TabularPolicy


@pytest.mark.parametrize(
    ("space", "count"),
    [
        (SequenceSpace(3, 2), 9),
        (SequenceSpace(2, 1), 2),
        (SequenceSpace(3, 3, eos=2), 1 + 2 + 4 * 3),  # ended after one, after two, all of the last level
        (SequenceSpace(3, 3, eos=0), 1 + 2 + 4 * 3),
        (SequenceSpace(2, 4, eos=1), 5),
    ],
)
def test_every_sequence_once(space, count):
    tokens, lengths = space.sequences()
    assert len(tokens) == count
    texts = {tuple(row[:n]) for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)}
    assert len(texts) == count
    for text in texts:
        assert space.eos not in text[:-1] and (len(text) == space.horizon or text[-1] == space.eos)


def test_prefixes_are_numbered_level_by_level():
    space = SequenceSpace(2, 3)
    assert space.prefixes == 7
    found = space.prefix_index(torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 0]]))
    assert found.tolist() == [[0, 1, 3], [0, 2, 5], [0, 2, 6]]


@pytest.mark.parametrize("space", [SPACE, SequenceSpace(4, 3), SequenceSpace(2, 5, eos=1)])
def test_probabilities_sum_to_one(space):
    policy = table("sum", space=space)
    for prompt in range(space.prompts):
        weighted = policy.weighted(space.rows(prompt))
        assert float(weighted.weight.sum()) == pytest.approx(1.0, abs=1e-12)
        assert weighted.exact and not weighted.weight.requires_grad


def test_probability_of_a_sequence_is_the_product():
    policy = from_probs([0.7, 0.3], [0.9, 0.1], [0.4, 0.6], space=SequenceSpace(2, 2))
    found = policy.log_prob(SequenceSpace(2, 2).rows()).exp()
    assert found.tolist() == pytest.approx([0.63, 0.07, 0.12, 0.18], abs=1e-12)


def test_rows_say_how_they_ended():
    rows = SequenceSpace(2, 2, eos=1).rows(prompt=0)
    by_text = {
        tuple(t[:n]): s for t, n, s in zip(rows.tokens.tolist(), rows.lengths.tolist(), rows.stop.tolist(), strict=True)
    }
    assert by_text == {(1,): Stop.EOS, (0, 1): Stop.EOS, (0, 0): Stop.LENGTH}
    assert rows.group.tolist() == [0, 0, 0]


def test_each_prompt_has_its_own_table():
    policy = table("prompts")
    assert not torch.equal(policy.log_prob(SPACE.rows(0)), policy.log_prob(SPACE.rows(1)))
    assert SPACE.rows(1).group.unique().tolist() == [1]


def test_padding_beyond_the_horizon_is_harmless():
    policy = table("padding")
    rows = SPACE.rows()
    wide = rows.padded(3, SPACE.horizon + 4)
    assert torch.equal(policy.log_prob(wide), policy.log_prob(rows))


def test_uniform_by_default():
    policy = TabularPolicy(SequenceSpace(4, 2))
    assert policy.weighted(SequenceSpace(4, 2).rows()).weight.tolist() == pytest.approx([1 / 16] * 16)


def test_samples_follow_the_policy():
    """20000 completions of the shared sampler: each frequency within four standard errors."""
    space = SequenceSpace(3, 2, eos=2)
    policy = table("frequency", space=space)
    drawn = sample(policy, 20000)
    tokens, _ = space.sequences()
    wanted = policy.log_prob(space.rows()).exp()
    for text, p in zip(tokens, wanted.tolist(), strict=True):
        found = float((drawn.tokens == text).all(1).double().mean())
        assert abs(found - p) < 4 * (p * (1 - p) / 20000) ** 0.5


@pytest.mark.parametrize(
    "make", [lambda: SequenceSpace(0, 1), lambda: SequenceSpace(2, 0), lambda: SequenceSpace(2, 1, eos=2)]
)
def test_sizes_out_of_range(make):
    with pytest.raises(ValueError, match=r"at least 1|outside"):
        make()


def test_a_table_of_another_shape():
    with pytest.raises(ValueError, match=r"\(1, 4, 3\)"):
        TabularPolicy(SequenceSpace(3, 2), torch.zeros(1, 3, 3))
