"""Recipes held to their claims: gradient, fixed point, groups of the real size, invariances, reductions, precision."""

import inspect
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.errors import UserError
from keel.exact.groups import GroupBatch, groups, moments
from keel.exact.space import SequenceSpace
from keel.method import Claim, Method
from keel.recipes.registry import Recipe, recipe_named
from keel.verify.batches import situations
from keel.verify.fixed_point import fixed_point, total_variation
from keel.verify.identify import Identifier
from keel.verify.objectives import Objective
from keel.verify.pairs import has_minimum, learnt_scores, minimiser, stationarity
from keel.verify.population import KINDS, author_of, expected_update, with_greedy
from keel.verify.world import World, random_world

TOLERANCE = 1e-6  # relative error of a gradient that is called exact
INVARIANCE = 1e-3  # relative change of an update that counts as none; an epsilon beside a deviation leaves some
FIXED_POINT = 1e-3  # total variation between fixed point and optimum
BETA = 0.5  # at which a recipe with a coefficient is verified
THRESHOLD = 0.0  # and one that calls rewards from a threshold on good: about half of a world's
GROUP_SIZES = {"quick": (2, 4), "full": (2, 4, 8)}
HOLDS, SHORT, NOTHING = "holds", "falls short", "no objective"


@dataclass(frozen=True)
class Comparison:
    """An expected update beside the gradient of the claim.

    Args:
        world: name of the world.
        relative_error: |c g - g*| / |g*| at the best step size c > 0.
        cosine: of the angle between the two.
        step: that step size c.
    """

    world: str
    relative_error: float
    cosine: float
    step: float


@dataclass(frozen=True)
class GroupCheck:
    """The update over all groups of one size, drawn as a rollout draws them.

    Args:
        size: completions of a group.
        relative_error: of the mean over all groups, at the best step size.
        deviation: standard deviation of the update of one group over the norm of the mean; NaN if not measured.
    """

    size: int
    relative_error: float
    deviation: float


@dataclass
class Verification:
    """What verification found of one recipe.

    `gradient_relative_error` is the largest on-policy one; `off_policy_relative_error` is of a policy that has moved
    since it sampled. `reasons` says in words why a recipe falls short, `follows` what it follows instead, and
    `exact_with` which arguments would make its gradient that of its claim, if one or two of them do.
    """

    recipe: str
    arguments: dict[str, Any]
    objective: str
    status: str
    gradient_relative_error: float | None = None
    cosine: float | None = None
    off_policy_relative_error: float | None = None
    fixed_point_tv: float | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    groups: list[GroupCheck] = field(default_factory=list)
    invariances: dict[str, bool] = field(default_factory=dict)
    reduces_to_baseline: bool | None = None
    bf16_relative_error: float | None = None
    follows: str | None = None
    exact_with: dict[str, Any] | None = None
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The recipe with the arguments that it was given."""
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.recipe}({given})" if given else self.recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


# -- the worlds ------------------------------------------------------------------------------------------------------


@cache
def worlds() -> Mapping[str, World]:
    """Two prompts, sequences of one and two tokens; near the reference, far from it, and with a sampler left behind."""
    space = SequenceSpace(vocab=3, horizon=2, eos=2, prompts=2)
    return {
        "near": random_world(space, 0, distance=0.1),
        "far": random_world(space, 1, distance=1.0),
        "far, off-policy": random_world(space, 2, distance=1.0, staleness=0.2),
    }


@cache
def group_world() -> World:
    """One prompt and four sequences, on-policy, away from the reference."""
    return random_world(SequenceSpace(vocab=2, horizon=2), 3, distance=0.7)


# -- one recipe ------------------------------------------------------------------------------------------------------


def verify_recipe(
    name: str | Recipe, arguments: Mapping[str, Any] | None = None, *, full: bool = False
) -> Verification:
    """Hold one recipe to its claim.

    Args:
        arguments: of the recipe; `beta` is 0.5 where the recipe has one and none is given.
        full: add the fixed point, the variance, larger groups and the precisions.

    Raises:
        ConfigError: an unknown recipe or argument.
    """
    begun = time.monotonic()
    recipe = recipe_named(name) if isinstance(name, str) else name
    given = {**default_arguments(recipe), **(arguments or {})}
    method = recipe(**given)
    claim = method.claim
    found = Verification(recipe.name, dict(given), claim.objective if claim else "none claimed", NOTHING)
    objective = None if claim is None or not _states_an_optimum(claim, method) else objective_of(claim, recipe, given)
    if objective is not None and method.kind == "reward":
        _check_scores(found, method)
    elif objective is not None and (method.kind == "pairs" or author_of(method) != "old"):
        _check_minimum(found, method, objective, full)  # the policy moves nothing of what the loss is a mean over
    elif objective is not None:
        _check_gradient(found, method, objective)
        if method.kind == "online":
            _check_groups(found, method, objective, full)
        if full:
            _check_fixed_point(found, method, objective)
    learns = method.kind in KINDS
    if claim is not None:
        _check_invariances(found, method, claim)
    if learns:
        _check_reduction(found, recipe)
    if full and learns:
        found.bf16_relative_error = _precision(method)
    if objective is not None:
        found.status = SHORT if found.reasons else HOLDS
    on_policy = method.kind == "online" and author_of(method) == "old"
    if full and on_policy and not (found.gradient_relative_error or 0) <= TOLERANCE:
        found.follows = _follows(method) if objective is not None and objective.form == "reward" else None
        found.exact_with = _repairs(recipe, given, method)
    found.seconds = time.monotonic() - begun
    return found


def _states_an_optimum(claim: Claim, method: Method) -> bool:
    """Whether a claim can be held to: a loss of comparisons without a divergence names no policy as its best."""
    return claim.form != "words" and (method.kind != "pairs" or claim.divergence is not None)


def default_arguments(recipe: Recipe) -> dict[str, Any]:
    """Those at which a recipe is verified: a coefficient large enough to be seen, and worlds' lengths."""
    out: dict[str, Any] = {}
    parameter = recipe.arguments.get("beta")
    if parameter is not None and parameter.default is not inspect.Parameter.empty and parameter.default != 0:
        out["beta"] = BETA
    if "eta" in recipe.arguments:  # the coefficient of stored samples
        out["eta"] = BETA
    if "threshold" in recipe.arguments:
        out["threshold"] = THRESHOLD
    if "expected" in recipe.arguments:  # of a random choice, the expectation: one draw is no population
        out["expected"] = True
    return out


def variants(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The settings at which `--all` looks at a recipe: its defaults, and with a regulariser that is off by default."""
    yield {}
    parameter = recipe.arguments.get("beta")
    if parameter is not None and parameter.default == 0:
        yield {"beta": BETA}


def objective_of(claim: Claim, recipe: Recipe, given: Mapping[str, Any]) -> Objective:
    """The claim as a function of a tabular policy, at the recipe's arguments."""

    def argument(name: str) -> Any:
        return given.get(name, recipe.arguments[name].default)

    assert claim.form != "words", "a claim in words is held to nothing"
    beta = float(argument(claim.beta) if isinstance(claim.beta, str) else claim.beta or 0.0)
    settings = {name: argument(name) for name in recipe.arguments}
    return Objective(claim.form, claim.divergence, claim.level, beta, claim.target, settings)


# -- the checks ------------------------------------------------------------------------------------------------------


def compare(world: str, update: Float[Tensor, "Q X V"], gradient: Float[Tensor, "Q X V"]) -> Comparison:
    """Direction and relative error of an update against a gradient, at the step size that fits best."""
    norm, wanted = update.norm(), gradient.norm()
    if norm == 0 or wanted == 0:
        return Comparison(world, 0.0 if norm == wanted else 1.0, 1.0 if norm == wanted else 0.0, 0.0)
    product = (update * gradient).sum()
    step = (product / norm.square()).clamp(min=0)
    error = (step * update - gradient).norm() / wanted
    return Comparison(world, float(error), float(product / (norm * wanted)), float(step))


def _check_gradient(found: Verification, method: Method, objective: Objective) -> None:
    for name, world in worlds().items():
        update = expected_update(method, world).direction
        found.comparisons.append(compare(name, update, objective.gradient(world)))
    on = [c for c in found.comparisons if "off-policy" not in c.world]
    worst = max(on, key=lambda c: c.relative_error)
    found.gradient_relative_error, found.cosine = worst.relative_error, worst.cosine
    found.off_policy_relative_error = found.comparisons[-1].relative_error
    if worst.relative_error > TOLERANCE:
        found.reasons.append(f"the expected gradient misses that of the objective by {worst.relative_error:.1%}")


def _check_minimum(found: Verification, method: Method, objective: Objective, full: bool) -> None:
    """Of comparisons: the loss is at rest at the stated optimum, and its minimum is there."""
    left = {name: stationarity(method, worlds()[name], objective.optimum(worlds()[name])) for name in ("near", "far")}
    found.gradient_relative_error = max(left.values())
    if found.gradient_relative_error > TOLERANCE:
        found.reasons.append(f"at the stated optimum {found.gradient_relative_error:.1%} of its gradient is left")
    if full and has_minimum(method):
        reached = minimiser(method, worlds()["far"])
        found.fixed_point_tv = total_variation(reached.log_probs(), objective.optimum(reached))
        if found.fixed_point_tv > FIXED_POINT:
            found.reasons.append(f"its minimum is {found.fixed_point_tv:.3f} in total variation from the optimum")


def _check_scores(found: Verification, method: Method) -> None:
    """Of reward models: the scores that minimise the loss are the rewards, up to a constant of each prompt.

    Both tilt the reference, which takes the constant out, and the two tilts are compared.
    """
    world = worlds()["far"]
    learnt, right = ((world.log_probs("ref") + r).log_softmax(-1) for r in (learnt_scores(method, world), world.reward))
    found.fixed_point_tv = total_variation(learnt, right)
    if found.fixed_point_tv > FIXED_POINT:
        found.reasons.append(
            f"the tilt by its scores is {found.fixed_point_tv:.3f} in total variation from the right one"
        )


def _check_groups(found: Verification, method: Method, objective: Objective, full: bool) -> None:
    assert method.rollout is not None
    world = group_world()
    wanted = objective.gradient(world)
    used = method.rollout.num_generations
    sizes = [n for n in GROUP_SIZES["full" if full else "quick"] if n <= max(used, 2)] if used > 1 else [1]
    for size in sizes:
        batch = groups(world.table("old"), size).with_reward(world.reward[0])
        mean = expected_update(method, world, with_greedy(method, world, batch.rows)).direction
        deviation = _deviation(method, world, batch) if full and size <= 4 else float("nan")
        found.groups.append(GroupCheck(size, compare("groups", mean, wanted).relative_error, deviation))
    last = found.groups[-1]
    exact = (found.gradient_relative_error or 0) <= TOLERANCE
    if exact and last.relative_error > TOLERANCE:
        found.reasons.append(f"biased by {last.relative_error:.1%} in groups of {last.size}, exact in the limit")


@cache
def _identifier() -> Identifier:
    return Identifier(situations(on_policy=True))


def _follows(method: Method) -> str:
    """The objective that the expected update is that of, or the nearest one, in words."""
    known = _identifier()
    found = known.identify({s: -expected_update(method, known.worlds[s]).direction[0] for s in known.where})
    far = found.residual > 0.1
    return f"none that is known; the nearest misses by {found.residual:.0%}" if far else found.follows


def _repairs(recipe: Recipe, given: Mapping[str, Any], method: Method) -> dict[str, Any] | None:
    """One or two other choices of the recipe's arguments with which its gradient is that of the same claim."""
    assert method.claim is not None
    options = [
        (name, value)
        for name in recipe.arguments
        for value in recipe.choices(name)
        if value != given.get(name, recipe.arguments[name].default)
    ]
    for changes in (*itertools.combinations(options, 1), *itertools.combinations(options, 2)):
        changed = {**given, **dict(changes)}
        if len(dict(changes)) < len(changes):
            continue
        try:
            other = recipe(**changed)
        except UserError:  # a combination that the recipe refuses
            continue
        if other.claim is None or other.claim.objective != method.claim.objective:
            continue
        objective = objective_of(other.claim, recipe, changed)
        if all(_error(other, objective, name) <= TOLERANCE for name in ("near", "far")):
            return dict(changes)
    return None


def _error(method: Method, objective: Objective, name: str) -> float:
    world = worlds()[name]
    return compare(name, expected_update(method, world).direction, objective.gradient(world)).relative_error


def _check_invariances(found: Verification, method: Method, claim: Claim) -> None:
    for name in claim.invariant:
        world = group_world()
        rows = with_greedy(method, world, groups(world.table("old"), 4).with_reward(world.reward[0]).rows)
        assert rows.reward is not None
        changed = rows.with_(reward=rows.reward + 3.0 if name == "reward_shift" else rows.reward * 3.0)
        before, after = (expected_update(method, world, batch).direction for batch in (rows, changed))
        same = bool((before - after).norm() <= INVARIANCE * before.norm())
        found.invariances[name] = same
        if not same:
            found.reasons.append(f"{name.replace('_', ' ')} changes the update")


def _check_reduction(found: Verification, recipe: Recipe) -> None:
    if not recipe.neutral or (recipe.baseline is None and recipe.reduces_to is None):
        return
    baseline = recipe.reduces_to() if recipe.reduces_to is not None else recipe_named(str(recipe.baseline))()
    world = worlds()["far, off-policy"]
    one, other = (expected_update(m, world) for m in (recipe(**recipe.neutral), baseline))
    found.reduces_to_baseline = bool(torch.equal(one.direction, other.direction)) and one.loss == other.loss
    if not found.reduces_to_baseline:
        found.reasons.append(f"its neutral setting {dict(recipe.neutral)} is not its baseline")


def _check_fixed_point(found: Verification, method: Method, objective: Objective) -> None:
    world = worlds()["far"]
    reached = fixed_point(lambda at: expected_update(method, at).direction, world, objective)
    found.fixed_point_tv = total_variation(reached.log_probs(), objective.optimum(reached))
    if found.fixed_point_tv > FIXED_POINT:
        found.reasons.append(f"its fixed point is {found.fixed_point_tv:.3f} in total variation from the optimum")


def _precision(method: Method) -> float:
    """Relative difference of the update in bf16 from that in fp32, for the same rounded weights."""
    world = worlds()["far"]
    rounded = world.at(world.policy.bfloat16().double())
    exact, low = (expected_update(method, rounded, dtype=d).direction for d in (torch.float32, torch.bfloat16))
    return float((low - exact).norm() / exact.norm()) if exact.norm() > 0 else 0.0


def _deviation(method: Method, world: World, batch: GroupBatch) -> float:
    """sqrt(E |g - E g|^2) / |E g| over groups taken one at a time."""
    each = [
        expected_update(method, world, with_greedy(method, world, batch.one(i))).direction
        for i in range(len(batch.counts))
    ]
    found = moments(torch.stack(each), batch)
    norm = found.mean.norm()
    return float(found.variance.sum().sqrt() / norm) if norm > 0 else float("inf")
