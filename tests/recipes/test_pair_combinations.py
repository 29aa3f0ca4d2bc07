"""Random losses of comparisons: a link, scores of both sides, maps, weights and features, with random settings.

Either the gradient is finite and does not depend on how the batch was split, or the combination is refused in words. A
part that is registered is drawn here without a further line.
"""

import typing
from functools import cache
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.cases import comparing, required
from tests.recipes.test_combinations import REFUSALS, SMALL, parts
from tests.worlds import EVERYTHING, assert_same, outcome

from keel.composition import ALWAYS
from keel.core.aggregate import Aggregation
from keel.core.registry import PAPERS, part_class
from keel.method import Method
from keel.models.heads import Critic
from keel.models.sources import Initial
from keel.models.tiny import build_tiny
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.penalties import NegativeLogLikelihood, Summand
from keel.parts.terms.scores import HeadScore, LogRatio
from keel.recipes.registry import recipes
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.tasks.preferences import Preference
from keel.train.encode import Encoder
from keel.train.preferences import preference_rows


@cache
def pools() -> dict[str, tuple[type, ...]]:
    """Registered parts by their place in a loss of pairs."""
    recipes()
    found: dict[str, list[type]] = {slot: [] for slot in ("link", "map", "tokens", "feature", "weight")}
    for name in sorted(PAPERS):
        cls = part_class(name)
        if not cls.__module__.startswith("keel.parts.terms."):
            continue
        names = [n for n in typing.get_type_hints(cls.__call__) if n != "return"]
        if names[:2] != ["chosen", "rejected"] and names not in (["log_ratio"], ["side"]):
            continue
        item = cls(**required(cls))
        loss = comparing(item)
        if loss is None or loss is item or loss.score is item:
            continue
        if loss.link is item:
            found["link"].append(cls)
        elif loss.weight is item:
            found["weight"].append(cls)
        elif loss.score.map is item:
            found["map"].append(cls)
        else:
            found["tokens" if loss.score.weight is item else "feature"].append(cls)
    return {slot: tuple(kinds) for slot, kinds in found.items()}


@st.composite
def maybe(draw: st.DrawFn, slot: str) -> Any:
    """One part of a slot, or none."""
    if not pools()[slot] or draw(st.booleans()):
        return None
    return draw(st.sampled_from(pools()[slot]).flatmap(parts))


@st.composite
def scores(draw: st.DrawFn) -> Any:
    """A score; that of a head now and then."""
    if not draw(st.integers(0, 7)):
        return HeadScore("reward")
    against = draw(st.sampled_from((("ref",), (), ("ref", "past"))))
    exponents = draw(st.sampled_from((None, tuple(0.5 for _ in against))))
    feature = draw(maybe("feature"))
    return LogRatio(
        against,
        exponents,
        draw(st.sampled_from(("sum", "mean"))),
        draw(maybe("map")),
        draw(maybe("tokens")),
        draw(st.sampled_from((1.0, 0.5))),
        () if feature is None else (feature,),
    )


@st.composite
def losses(draw: st.DrawFn) -> PairLoss:
    """A loss of pairs."""
    return PairLoss(
        draw(st.sampled_from(pools()["link"]).flatmap(parts)),
        draw(scores()),
        beta=draw(st.sampled_from((0.1, 1.0))),
        rejected=draw(st.none() | scores()),
        offset=draw(st.sampled_from((0.0, 0.3))),
        margin=draw(st.sampled_from((0.0, 1.0))),
        gap=draw(maybe("weight")),
        label_smoothing=draw(st.sampled_from((0.0, 0.1))),
        noise=draw(st.sampled_from(("conservative", "robust"))),
        weight=draw(maybe("weight")),
    )


def method_of(loss: PairLoss, likelihood: float) -> Method:
    """The method with the models and heads that a loss reads, and the likelihood of the chosen beside it."""
    terms: dict[str, Any] = {"pairs": loss}
    if likelihood:
        terms["nll"] = Summand(NegativeLogLikelihood(), likelihood, where="nll", per="where")
    names = {name for f in loss.needs for name in f.of} - set(ALWAYS)
    return Method(
        kind="pairs",
        terms=terms,
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={name: Initial() for name in sorted(names)},
        heads={name: Critic() for name in loss.heads_read},
    )


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data(), likelihood=st.sampled_from((0.0, 0.2)))
def test_a_random_loss_of_pairs_is_sound_or_refused(data, likelihood):
    try:
        method = method_of(data.draw(losses()), likelihood)
    except REFUSALS as error:
        assert str(error)
        return
    whole = outcome(method)
    assert bool(whole.loss.isfinite())
    for name, grad in whole.grads.items():
        assert bool(grad.isfinite().all()), name
    small = {"max_tokens": 16, "chunk_bytes": 4 * 4 * 3}
    assert_same(outcome(method, **small, additive=False), whole)
    if method.splits(whole.rows):
        assert_same(outcome(method, **small, additive=True), whole)


def test_micro_batches_keep_pairs_whole():
    """Twelve pairs of a language model, in one pass over all and in passes of two pairs each."""
    policy = build_tiny("0123456789+", SMALL, seed=1)
    encoder = Encoder(policy)
    some = [Preference(f"{i}+", (str(i * 7 % 13) + "1" * (i % 4), str(i)), (1.0, 0.0), i) for i in range(12)]
    rows, _ = preference_rows(some, "pairs", encoder, None, 0, 0)
    engine = Engine({"policy": policy}, max_tokens=20)
    parts = engine.split(rows)
    assert len(parts) > 3
    assert all(len(rows.group[part].unique()) * 2 == len(part) for part in parts)
    loss = PairLoss(LogSigmoid(), LogRatio(against=()), 1.0)
    found = []
    for sizes, additive in ((EVERYTHING, False), (20, True), (20, False)):
        policy.module.zero_grad(set_to_none=True)
        value, _ = Engine({"policy": policy}, max_tokens=sizes).step(
            [LogProb()], rows, Stats(), loss, additive=additive
        )
        found.append((value, [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]))
    for value, grads in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-5, atol=1e-6)
        for one, other in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_pools_hold_what_is_registered():
    assert LogSigmoid in pools()["link"]


def test_labels_change_a_loss_that_smooths():
    """The property above would hold of losses that read nothing."""
    plain, smooth = (
        outcome(method_of(PairLoss(LogSigmoid(), LogRatio(), 1.0, label_smoothing=e), 0.0)) for e in (0.0, 0.2)
    )
    assert not torch.equal(plain.loss, smooth.loss)
