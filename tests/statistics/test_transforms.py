"""Distribution transforms against direct computation, by sorting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.worlds import noise

from keel.statistics.transforms import (
    Chain,
    KeepMinP,
    KeepTopK,
    KeepTopP,
    Power,
    Temperature,
    chain,
    filters,
    nucleus_edge,
)

P = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)


def kept(transform, probs=P) -> list[int]:
    return (transform(probs.log())[0] > -math.inf).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("transform", "wanted"),
    [
        (KeepTopK(1), [1]),
        (KeepTopK(3), [1, 2, 3]),
        (KeepTopK(9), [0, 1, 2, 3]),
        (KeepTopP(0.39), [1]),
        (KeepTopP(0.41), [1, 3]),
        (KeepTopP(0.7), [1, 3]),
        (KeepTopP(0.71), [1, 2, 3]),
        (KeepTopP(1.0), [0, 1, 2, 3]),
        (KeepMinP(0.5), [1, 2, 3]),
        (KeepMinP(0.6), [1, 3]),
        (KeepMinP(1.0), [1]),
        (KeepMinP(0.0), [0, 1, 2, 3]),
    ],
)
def test_what_is_kept(transform, wanted):
    assert kept(transform) == wanted
    logits = P.log()
    assert torch.equal(transform(logits)[0, wanted], logits[0, wanted])  # untouched, not renormalised


def test_ties_at_the_edge_are_kept():
    tied = torch.tensor([[0.4, 0.2, 0.2, 0.2]], dtype=torch.float64)
    assert kept(KeepTopK(2), tied) == [0, 1, 2, 3]
    assert kept(KeepTopP(0.5), tied) == [0, 1, 2, 3]
    assert kept(KeepTopP(0.5), torch.full((1, 4), 0.25, dtype=torch.float64)) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@given(seed=st.integers(0, 10**6), p=st.floats(0.01, 0.999), size=st.integers(2, 400))
def test_nucleus_by_bisection_is_the_one_by_sorting(dtype, seed, p, size):
    logits = (3 * noise("nucleus", seed, shape=(3, size))).to(dtype)
    found = KeepTopP(p)(logits) > -math.inf
    for row, mask in zip(logits.double().softmax(-1), found, strict=True):
        ordered, order = row.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        doubtful = (before - p).abs() < 1e-5  # rounding decides
        wanted = before < p
        assert torch.equal(mask[order][~doubtful], wanted[~doubtful])
        assert bool(mask[order[0]])


def test_nucleus_edge_is_one_of_the_probabilities():
    probs = noise("edge", shape=(5, 50)).softmax(-1).float()
    edge = nucleus_edge(probs, 0.8)
    assert bool((probs == edge).any(-1).all())


def test_scales():
    z = noise("scale", shape=(2, 5))
    torch.testing.assert_close(Temperature(0.5)(z), 2 * z)
    torch.testing.assert_close(
        Power(3.0)(z).softmax(-1), z.softmax(-1) ** 3 / (z.softmax(-1) ** 3).sum(-1, keepdim=True)
    )
    both = Chain((Temperature(0.5), KeepTopP(0.9), Power(3.0)))
    assert both.scale == 6.0 and both.name == "temperature=0.5,top_p=0.9,power=3"


def test_a_filter_sees_what_came_before_it():
    """At temperature 0.25 the first token alone holds 0.9."""
    cold = Chain((Temperature(0.25), KeepTopP(0.65)))
    assert kept(cold) == [1] and kept(KeepTopP(0.65)) == [1, 3]


def test_filters_of_a_sampler():
    assert filters() is None and filters(None, 1.0, 0.0) is None
    assert filters(top_p=0.9) == KeepTopP(0.9)
    assert filters(5, 0.9, 0.1) == Chain((KeepTopK(5), KeepTopP(0.9), KeepMinP(0.1)))
    assert chain([]) is None and chain([Power(2.0)]) == Power(2.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Temperature(0.0),
        lambda: Power(-1.0),
        lambda: KeepTopK(0),
        lambda: KeepMinP(1.5),
        lambda: KeepTopP(0.0),
        lambda: KeepTopP(1.1),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match="must be"):
        make()
