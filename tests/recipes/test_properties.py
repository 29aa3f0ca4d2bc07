"""Four properties of every recipe and of every part, on a world small enough to be exact.

A recipe that is registered, and a part that is registered, is tested here without a further line.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cases import Case, cases, part_cases, recipe_cases
from tests.worlds import Outcome, assert_same, models_of, outcome, polluted, repeated, rows_for

from keel.core.choice import generator
from keel.method import Method
from keel.parts.terms.penalties import Summand
from keel.recipes.registry import _RECIPES, recipe, recipes
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb


def _each(variants: bool) -> pytest.MarkDecorator:
    """All cases; recipes at other than their defaults wait for slow runs, where nothing is sampled or not wanted."""
    marked = [
        pytest.param(case, marks=pytest.mark.slow if _late(case, variants) else (), id=str(case)) for case in cases()
    ]
    return pytest.mark.parametrize("case", marked)


def _late(case: Case, variants: bool) -> bool:
    return "=" in case.name and not (variants and case.method.kind == "online")


EACH, EACH_DEFAULT = _each(variants=True), _each(variants=False)


@cache
def _reference(name: str) -> Outcome:
    return outcome(next(case.method for case in cases() if case.name == name))


def check_split(method: Method, reference: Outcome) -> None:
    """Two passes over slices in chunks of four positions; and one pass where all parts are additive."""
    assert len(Engine(models_of(method), max_tokens=16).split(reference.rows)) > 1
    assert_same(outcome(method, max_tokens=16, chunk_bytes=4 * 4 * 3, additive=False), reference)
    if method.splits(reference.rows):
        assert_same(outcome(method, max_tokens=16, additive=True), reference)


def check_padding(method: Method, reference: Outcome) -> None:
    """More columns, full of garbage."""
    assert_same(outcome(method, polluted(rows_for(method), prompt=2, completion=3)), reference)


def check_order(method: Method, reference: Outcome) -> None:
    rows = rows_for(method)
    order = torch.randperm(len(rows), generator=generator("order"))
    assert_same(outcome(method, rows.select(order)), reference)


def check_weight(method: Method, weights: tuple[int, int]) -> None:
    """A group of weight w equals w groups; one of weight 0 is not there."""
    rows = rows_for(method)
    times = {
        group: weights[group % 10] for group in rows.group.unique().tolist()
    }  # candidates and stored rows as their prompt
    weight = torch.tensor([times[group] for group in rows.group.tolist()], dtype=rows.weight.dtype)
    heavy = rows.with_(weight=weight)
    if rows.pairs is not None:  # the weight of a comparison is that of its group
        heavy = heavy.with_(pairs=dataclasses.replace(rows.pairs, measure=weight[rows.pairs.chosen]))
    assert_same(outcome(method, heavy), outcome(method, repeated(rows, times)))


@EACH
def test_split_of_the_batch(case: Case):
    check_split(case.method, _reference(case.name))


@EACH
def test_padding(case: Case):
    check_padding(case.method, _reference(case.name))


@EACH_DEFAULT
def test_order(case: Case):
    check_order(case.method, _reference(case.name))


@EACH_DEFAULT
@settings(max_examples=2)
@given(heavy=st.integers(2, 3), light=st.integers(0, 1), first=st.booleans())
def test_weight_of_a_group(case: Case, heavy, light, first):
    check_weight(case.method, (heavy, light) if first else (light, heavy))


@EACH
def test_something_is_learned(case: Case):
    """The properties above would hold of a loss that is constant."""
    found = _reference(case.name)
    assert torch.isfinite(found.loss)
    if not bool(found.grads["policy.table"].any()):  # a part may leave out what a stranger has sampled
        known = rows_for(case.method).with_(logp={"behaviour": outcome(case.method).stats[LogProb(of=("old",))]})
        found = outcome(case.method, known)
    if not bool(found.grads["policy.table"].any()):  # or all that it keeps may be clipped
        found = outcome(case.method, moved=False)
    assert float(found.grads["policy.table"].abs().max()) > 1e-3
    trained = {name.split(".")[0] for name, grad in found.grads.items() if bool(grad.any())}
    assert trained >= {head for term in case.method.terms.values() for head in getattr(term, "heads_read", ())}


# -- that the properties find what they are for ----------------------------------------------------------------------


def faulty(penalty) -> Method:
    return Method(kind="supervised", terms={"faulty": Summand(penalty, 1.0)})


@dataclass(frozen=True)
class _Faulty:
    """A penalty with the most repeated mistakes of the field, one at a time."""

    fault: str
    needs = (LogProb(),)
    additive = True

    def __call__(self, rows, stats):
        value = -stats[LogProb()]
        if self.fault == "denominator of the slice":
            return value * rows.lengths.sum()
        if self.fault == "mean over padding":
            return value + value.mean(1, keepdim=True)
        if self.fault == "position in the batch":
            return value * torch.arange(len(rows))[:, None]
        return value * len(rows.group.unique())  # "rows instead of weights"


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("denominator of the slice", check_split),
        ("mean over padding", check_padding),
        ("position in the batch", check_order),
        ("rows instead of weights", lambda method, reference: check_weight(method, (2, 1))),
    ],
)
def test_a_faulty_part_is_found(fault, check):
    method = faulty(_Faulty(fault))
    with pytest.raises(AssertionError):
        check(method, outcome(method))


def test_new_recipes_are_found():
    known = {case.name for case in cases()}
    assert {name.split("-")[0] for name in known} >= {"part", *recipes()}

    def newcomer(coef: float = 0.0) -> Method:
        return recipes()["sft"]()

    recipe()(newcomer)
    try:
        recipe_cases.cache_clear()
        assert {case.name for case in recipe_cases()} - known == {"newcomer", "newcomer-coef=0.1"}
    finally:
        del _RECIPES["newcomer"]
        recipe_cases.cache_clear()
    assert {case.name for case in recipe_cases()} <= known


def test_every_room_of_parts_is_covered():
    rooms = {type(item).__module__ for case in part_cases() for _, item in case.method.parts()}
    assert {"keel.parts.advantages.group", "keel.parts.advantages.stream", "keel.parts.weights.importance"} <= rooms
    assert "keel.parts.rewards.transforms" in rooms
