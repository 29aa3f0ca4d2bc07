"""Random combinations of parts, with random settings: one exact step and one step of a small model.

Either the gradient is finite and does not depend on how the batch was split, or the combination is refused in words
that name the part or the argument. A part that is registered is drawn here without a further line.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections import Counter
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.cases import COMPARED, method_with
from tests.worlds import EVERYTHING, SPACE, outcome, rows_for, table

from keel.composition import ALWAYS
from keel.core.aggregate import Aggregation
from keel.core.choice import generator, row_ids, uniforms
from keel.core.errors import UserError
from keel.core.registry import PAPERS, part_class
from keel.core.rows import REPLAYED, Rows, Stop, Stream, cat
from keel.method import Method
from keel.models.heads import Critic
from keel.models.sources import Initial
from keel.models.tiny import TinyConfig, build_tiny
from keel.parts.advantages.group import GroupCentre
from keel.parts.advantages.stream import GAE
from keel.parts.replay.memory import joined
from keel.parts.replay.rehearsal import Rehearsal
from keel.parts.replay.stored import Replay
from keel.parts.terms.covering import RehearsalDivergence
from keel.parts.terms.mixture import RehearsalMixtureKL
from keel.parts.terms.penalties import Summand
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.parts.terms.targets import TiltTarget
from keel.recipes.registry import recipes
from keel.rollouts.rollout import Rollout
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb

REFUSALS = (UserError, ValueError)  # ConfigError and MethodError are of the first kind
SMALL = TinyConfig(dim=16, layers=1, heads=2, feed_forward=32, context=64)
TEXTS = {
    "estimator": ("k1", "k2", "k3"),
    "divergence": ("kl_policy_ref", "kl_ref_policy", "js", "alpha:0.5", "nonsense"),
    "kind": ("kl_policy_ref", "kl_ref_policy", "js", "nonsense"),
    "against": ("ref",),
    "model": ("ref",),
    "head": ("value",),
}
OBJECTS = {"f": Clipped(), "target": TiltTarget(), "aggregation": Aggregation("sequence_mean_token_mean")}
PATHS = ("terms.a.coef", "terms.b.coef", "surrogate.f.epsilon", "aggregation.mode")
BESIDE = ("mixed_target", "stored_divergence", "win_rate_regression")  # read columns that only their own loops make
METRICS = {"kl": 0.3, "entropy": 0.7, "reward": 0.2, "num_rows": 8.0}
seen: Counter[str] = Counter()


# -- what can be drawn -----------------------------------------------------------------------------------------------


@cache
def pools() -> dict[str, tuple[type, ...]]:
    """Registered parts by the place that they take in a method."""
    recipes()
    found: dict[str, list[type]] = {k: [] for k in ("f", "penalty", "term", "transforms", "advantage")}
    found |= {k: [] for k in ("masks", "weights", "controllers")}
    for name in sorted(set(PAPERS) - set(BESIDE)):
        cls = part_class(name)
        room = cls.__module__.removeprefix("keel.parts.").split(".")[0]
        if cls.__module__.startswith("keel.parts.controllers."):
            found["controllers"].append(cls)
        elif (case := method_with(cls)) is not None and case.method.kind == "online":
            plain = case.method
            slot = {"advantages": "advantage", "rewards": "transforms"}.get(room, room)
            if slot == "terms":
                alone = plain.terms.get("part")
                slot = "f" if alone is None else "penalty" if isinstance(alone, Summand) else "term"
            found[slot].append(cls)
    return {slot: tuple(parts) for slot, parts in found.items()}


def values(name: str, hint: Any, default: Any) -> st.SearchStrategy:
    """Settings of one argument, mostly sensible."""
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return st.none() | values(name, inner[0], default)
    if hint is bool:
        return st.booleans()
    if hint is float:
        start = default if isinstance(default, float) else 0.5
        return st.sampled_from((start, 2 * start, start / 2, 0.0, 1.0, -1.0))
    if hint is int:
        return st.sampled_from((default if isinstance(default, int) else 2, 1, 2, 3, 0))
    if hint is str:
        return st.sampled_from(TEXTS.get(name, (default if isinstance(default, str) else "ref",)))
    return st.just(OBJECTS[name]) if name in OBJECTS else st.just(default)


@st.composite
def parts(draw: st.DrawFn, cls: type) -> Any:
    """A part with some of its settings drawn; one that refuses them must say which, and is taken at its defaults."""
    hints = typing.get_type_hints(cls)
    given_: dict[str, Any] = {}
    needed: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        default = f.default if f.default is not dataclasses.MISSING else None
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            usual = {int: 2, float: 0.5, str: TEXTS.get(f.name, ("ref",))[0], **COMPARED}
            needed[f.name] = OBJECTS[f.name] if f.name in OBJECTS else usual.get(hints[f.name])
            if f.name == "path":
                needed[f.name] = draw(st.sampled_from(PATHS))
        if f.name != "path" and draw(st.integers(0, 2)) == 0:
            drawn = draw(values(f.name, hints[f.name], default if default is not None else needed.get(f.name)))
            if drawn is not None or f.name not in needed:
                given_[f.name] = drawn
    try:
        return cls(**{**needed, **given_})
    except REFUSALS as error:
        assert_named(error, [*given_, *(value for value in given_.values() if isinstance(value, str))])
        seen["settings refused"] += 1
        return cls(**needed)


def some(slot: str, most: int) -> st.SearchStrategy:
    """Up to so many different parts of a slot."""
    kinds = st.lists(st.sampled_from(pools()[slot]), max_size=most, unique=True)
    return kinds.flatmap(lambda found: st.tuples(*map(parts, found)))


def one(slot: str) -> st.SearchStrategy:
    """One part of a slot."""
    return st.sampled_from(pools()[slot]).flatmap(parts)


@st.composite
def slots(draw: st.DrawFn) -> dict[str, Any]:
    """The slots of a method."""
    masks = draw(some("masks", 1))
    terms: dict[str, Any] = {}
    for name in draw(st.sampled_from(("", "a", "ab"))):
        if draw(st.integers(0, 3)):
            confined = {"where": "m0", "per": draw(st.sampled_from(("batch", "where")))} if masks else {}
            terms[name] = Summand(draw(one("penalty")), draw(st.sampled_from((0.5, 1.0, 0.0))), **confined)
        else:
            terms[name] = draw(one("term"))
    level = draw(st.sampled_from(("token", "sequence", "trajectory")))
    mode = draw(st.sampled_from(typing.get_args(typing.get_type_hints(Aggregation)["mode"])))
    advantage = {"centre": GroupCentre()} if draw(st.integers(0, 3)) else {}
    advantage |= {f"a{i}": item for i, item in enumerate(draw(some("advantage", 2)))}
    return {
        "surrogate": None if terms and not draw(st.integers(0, 5)) else Surrogate(draw(one("f")), level),
        "aggregation": Aggregation(mode, 6 if mode == "constant" else None),
        "advantage": advantage,
        "masks": {f"m{i}": item for i, item in enumerate(masks)},
        "weights": {f"w{i}": item for i, item in enumerate(draw(some("weights", 2)))},
        "transforms": {f"t{i}": item for i, item in enumerate(draw(some("transforms", 2)))},
        "controllers": {f"c{i}": owning(draw, item, terms) for i, item in enumerate(draw(some("controllers", 1)))},
        "terms": terms,
        "replay": draw(replays(terms)),
    }


@st.composite
def replays(draw: st.DrawFn, terms: dict[str, Any]) -> dict[str, Any]:
    """Replayed groups, or a pool to rehearse with a term that reads it, now and then; the term joins `terms`."""
    found = {}
    if not draw(st.integers(0, 3)):
        found["past"] = draw(parts(Replay))
    if not draw(st.integers(0, 3)):
        found["pool"] = draw(parts(Rehearsal))
        if draw(st.booleans()):
            terms["stored"] = draw(st.sampled_from((RehearsalDivergence, RehearsalMixtureKL)).flatmap(parts))
        elif draw(st.integers(0, 7)):
            where = {"where": "nll", "per": "where"} if draw(st.booleans()) else {}
            terms["stored"] = Summand(draw(one("penalty")), 0.5, stream="regulariser", **where)
    return found


def owning(draw: st.DrawFn, item: Any, terms: dict[str, Any]) -> Any:
    """The controller on a path that is there, mostly."""
    paths = [f"terms.{name}.coef" for name, term in terms.items() if isinstance(term, Summand)] or list(PATHS)
    return dataclasses.replace(item, path=draw(st.sampled_from(paths))) if hasattr(item, "path") else item


def composed(drawn: dict[str, Any]) -> Method:
    """The method with the models and heads that its parts read, after one move of its controllers."""
    items = [item for slot in drawn.values() if isinstance(slot, dict) for item in slot.values()]
    names = {n for item in [*items, drawn["surrogate"]] for f in getattr(item, "needs", ()) or () for n in f.of}
    heads = {head: Critic() for item in items for head in getattr(item, "heads_read", ())}
    critics = {f"gae {name}": GAE(head=name) for name in heads}
    method = Method(
        rollout=Rollout(num_generations=4, greedy_baseline=True, max_completion_length=6),
        models={name: Initial() for name in sorted(names - set(ALWAYS))},
        heads=heads,
        **{**drawn, "advantage": {**drawn["advantage"], **critics}},
    )
    for item in method.controllers.values():
        changed, _ = item.update(METRICS, item.init(), 1)
        for path, value in changed.items():
            method = method.set(path, value)
    return method


# -- the two steps ---------------------------------------------------------------------------------------------------


@cache
def enumerated() -> Rows:
    """Every sequence at its probability under the sampler, and what parts look for beside."""
    sampler = table("old")
    rows = cat([sampler.weighted(SPACE.rows(prompt)) for prompt in range(SPACE.prompts)])
    rows = rows.with_(row=torch.arange(len(rows)))
    prefixes = SPACE.prefix_index(rows.tokens)
    log_probs = sampler.table[rows.prompt_ids[:, :1], prefixes].log_softmax(-1).detach()
    behaviour = log_probs.gather(-1, rows.tokens[..., None])[..., 0] * rows.mask
    reward = (uniforms(rows.row, 100) * 3).floor()[:, None] / 2
    spans = {"nll": rows.mask & (rows.tokens != 1), "distil": rows.mask}
    label = (uniforms(rows.row, 102) > 0.5).double()
    return rows.with_(reward=reward, logp={"behaviour": behaviour}, masks=spans, label=label)


@cache
def sampled() -> Rows:
    """Two groups of texts of the small model, different in length, one with a gap; a greedy row in each."""
    like = rows_for(Method(rollout=Rollout(greedy_baseline=True), advantage={"centre": GroupCentre()}))
    count, width = len(like), 6
    tokens = torch.randint(3, 14, (count, width), generator=generator("combinations"))
    lengths = torch.tensor([6, 3, 5, 2, 4])[torch.arange(count) % 5]
    mask = torch.arange(width) < lengths[:, None]
    mask[0, 1] = False
    group = like.group
    prompts = torch.randint(3, 14, (2, 3), generator=generator("prompts"))[group]
    row = row_ids(0, 0, group, torch.arange(count))
    reward = (uniforms(row, 1) * 3).floor()[:, None] / 2
    return Rows.build(
        prompts,
        torch.arange(3) >= group[:, None],
        tokens,
        mask,
        row=row,
        group=group,
        data_index=group,
        stream=like.stream,
        stop=torch.full_like(group, int(Stop.EOS)),
        reward=reward.float(),
        label=(reward[:, 0] > 0.4).float(),
        masks={"nll": mask & (tokens % 2 == 0), "distil": mask},
    )


@cache
def small_model(name: str) -> Any:
    return build_tiny("0123456789+", SMALL, seed=len(name))


def tiny_step(method: Method, max_tokens: int) -> dict[str, torch.Tensor]:
    """Gradients of one update of the small model, by parameter."""
    models = {name: small_model(name) for name in (*ALWAYS, *method.models)}
    heads = {name: spec.build(models["policy"], 0) for name, spec in method.heads.items()}
    rows = sampled()
    known = Engine(models).measure([LogProb(of=("old",))], rows)[LogProb(of=("old",))]
    rows = rows.with_(logp={"behaviour": known - 0.05 * uniforms(rows.row, 7)[:, None].float() * rows.mask})
    rows = with_replay(rows, method)
    before = Engine({**models, "policy": models["old"]}, heads, max_tokens=EVERYTHING)
    frozen = before.measure(method.frozen_needs(several_updates=True), rows, alias={"old": "policy"})
    states = method.initial_states()
    rows = method.prepare(rows, frozen, states)
    policy = models["policy"].module
    policy.zero_grad(set_to_none=True)
    main = (rows.main | (rows.stream == int(Stream.REGULARISER))).nonzero().flatten()
    loss, _ = Engine(models, heads, max_tokens=max_tokens).step(
        list(method.live_needs()),
        rows.select(main),
        frozen.select(main),
        partial(_loss, method, states),
        additive=method.splits(rows),
    )
    assert bool(loss.isfinite())
    modules = {"policy": policy, **heads}
    named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
    policy.zero_grad(set_to_none=True)
    return grads


def _loss(method: Method, states: dict, rows: Rows, stats: Any) -> torch.Tensor:
    return method.loss(rows, method.with_old(stats), states)


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    largest = max(1.0, *(float(grad.abs().max()) for grad in wanted.values()))
    for name, grad in wanted.items():
        assert bool(grad.isfinite().all()), f"{name} is not finite"
        difference = float((found[name] - grad).abs().max())
        assert difference <= tolerance * largest, f"{name}: {difference} of {largest}"


def assert_named(error: Exception, names: list[str]) -> None:
    """The message says which part, argument or value is meant."""
    words = set(re.findall(r"[\w.']+", str(error).lower()))
    spelled = {word.strip("'.") for word in words} | {w for word in words for w in re.split(r"[.'_]", word)}
    assert {name.lower() for name in names} & spelled, f"names none of {names}: {error}"


def with_replay(rows: Rows, method: Method) -> Rows:
    """The rows, and beside them what the slot `replay` would bring: the first group once more, and rows of the other.

    What who drew them has recorded is a bit off what they say now.
    """
    again, first = [], rows.group == rows.group.min()
    told = {name: value - 0.1 * rows.mask for name, value in rows.logp.items()}
    if method.replayed is not None:
        columns = {**rows.columns, REPLAYED: torch.ones_like(first)}
        again.append(rows.with_(logp=told, group=rows.group + 50, columns=columns).select(first))
    if any(isinstance(item, Rehearsal) for item in method.replay.values()):
        stream = torch.full_like(rows.stream, int(Stream.REGULARISER))
        known = {**rows.logp, "stored": told["behaviour"]}
        kept = rows.with_(logp=known, group=rows.row, stream=stream, reward=None, label=None, columns={})
        again.append(kept.select(~first & rows.main))
    return joined([rows, *again])


def names_of(drawn: dict[str, Any]) -> list[str]:
    """Slots, names, parts and arguments of a combination."""
    out = [*drawn, "reward", "rewards", "column", "columns", "model", "head"]
    for slot, content in drawn.items():
        for name, item in content.items() if isinstance(content, dict) else [(slot, content)]:
            for inner in (item, getattr(item, "penalty", None), getattr(item, "f", None)):
                if dataclasses.is_dataclass(inner):
                    registered = [n for n in PAPERS if part_class(n) is type(inner)]
                    out += [name, type(inner).__name__, *registered, *(f.name for f in dataclasses.fields(inner))]
    return out


def check(drawn: dict[str, Any]) -> None:
    """One combination."""
    seen["drawn"] += 1
    try:
        method = composed(drawn)
        rows = with_replay(enumerated(), method)
        exact = outcome(method, rows, additive=method.splits(rows))
    except REFUSALS as error:
        assert_named(error, names_of(drawn))
        seen["refused on the exact world"] += 1
        method = None if "method" not in locals() else method
    else:
        assert bool(exact.loss.isfinite())
        for max_tokens in (16, 40):
            found = outcome(method, rows, max_tokens=max_tokens, additive=method.splits(rows))
            assert_equal(found.grads, exact.grads, 1e-9)
        seen["exact"] += 1
        seen["with replay"] += bool(method.replay)
    if method is None:
        return
    try:
        whole = tiny_step(method, EVERYTHING)
    except REFUSALS as error:
        assert_named(error, names_of(drawn))
        seen["refused on texts"] += 1
        return
    for max_tokens in (20, 45):
        assert_equal(tiny_step(method, max_tokens), whole, 1e-5)
    seen["tiny"] += 1


# The checks of annotations pick at random which items of a tuple they look at.
TYPES = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
QUICK = settings(
    max_examples=32, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),
)  # fmt: skip


@TYPES
def test_combinations():
    seen.clear()
    QUICK(given(slots())(check))()
    assert min(seen["exact"], seen["tiny"]) >= 0.25 * seen["drawn"] and seen["with replay"], seen


@TYPES
@pytest.mark.slow
def test_many_combinations():
    seen.clear()
    settings(QUICK, max_examples=1500, phases=(Phase.generate, Phase.shrink))(given(slots())(check))()
    assert seen["exact"] >= 0.4 * seen["drawn"], seen


def test_every_part_can_be_drawn():
    """None is left out because of how it is built."""
    found = pools()
    assert all(found.values())
    assert {inspect.getmodule(cls).__name__.split(".")[2] for kinds in found.values() for cls in kinds} >= {
        "advantages", "controllers", "masks", "rewards", "terms", "weights",
    }  # fmt: skip
