"""Expected gradients against known vectors, and objectives recognised from their gradients."""

import itertools

import pytest
import torch

from keel.exact.space import SequenceSpace
from keel.verify.batches import Batch, Situation, expected_gradient, outcomes, reached, situations
from keel.verify.identify import (
    Candidate,
    Distance,
    Identifier,
    candidates,
    gain_gradient,
    gradient_error,
    state_gradient,
)
from keel.verify.losses import field_asymmetry
from keel.verify.objectives import Objective
from keel.verify.world import World

P = [0.10, 0.30, 0.15, 0.25, 0.20]
Q = [0.40, 0.25, 0.20, 0.10, 0.05]
OLD = [0.25, 0.20, 0.30, 0.15, 0.10]
REVERSE = [-0.176554, -0.059077, -0.100039, 0.134261, 0.201410]
FORWARD = [-0.30, 0.05, -0.05, 0.15, 0.15]


def k(kind: str, log_u: torch.Tensor) -> torch.Tensor:
    return {"k1": log_u, "k2": log_u.square() / 2, "k3": (-log_u).exp() - 1 + log_u}[kind]


def in_loss(kind: str, ratio: str = "none"):
    def loss(batch: Batch) -> torch.Tensor:
        rho = (batch.log_prob - batch.old_log_prob.detach()).exp()
        factor = {"none": torch.ones_like(rho), "held": rho.detach(), "live": rho}[ratio]
        return (factor * k(kind, batch.log_prob - batch.ref_log_prob) * batch.mask).sum(1).mean()

    return loss


def in_reward(kind: str):
    def loss(batch: Batch) -> torch.Tensor:
        penalty = (k(kind, batch.log_prob - batch.ref_log_prob) * batch.mask).sum(1)
        return (penalty.detach() * (batch.log_prob * batch.mask).sum(1)).mean()

    return loss


def one_step(policy: list[float], old: list[float], ref: list[float]) -> World:
    """A single token of several symbols, without a reward."""
    space = SequenceSpace(vocab=len(policy), horizon=1)
    tables = [torch.tensor(p, dtype=torch.float64).log()[None, None] for p in (policy, old, ref, ref)]
    return World(space, torch.zeros(1, len(policy), dtype=torch.float64), *tables)


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (in_loss("k1"), [0.0] * 5),
        (in_loss("k2"), REVERSE),
        (in_loss("k3"), FORWARD),
        (in_loss("k1", "live"), REVERSE),
        (in_loss("k3", "live"), REVERSE),
        (in_loss("k3", "held"), FORWARD),
        (in_reward("k1"), REVERSE),
        (in_reward("k2"), [0.055649, -0.116338, -0.054455, 0.003845, 0.111298]),
        (in_reward("k3"), [0.123446, -0.109077, -0.050039, -0.015739, 0.051410]),
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_one_token_on_policy(loss, wanted: list[float], group: int) -> None:
    found = expected_gradient(loss, one_step(P, P, Q), group)
    torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "ratio", "wanted"),
    [
        ("k1", "none", [old - p for old, p in zip(OLD, P, strict=True)]),
        ("k2", "none", [-0.334540, 0.072567, -0.068253, 0.167529, 0.162698]),
        ("k3", "none", [-0.684833, 0.228833, -0.002250, 0.252917, 0.205333]),
        ("k1", "held", [0.0] * 5),
        ("k2", "held", REVERSE),
        ("k3", "held", FORWARD),
        ("k1", "live", REVERSE),
        ("k2", "live", [-0.120905, -0.175415, -0.154494, 0.138106, 0.312708]),
        ("k3", "live", REVERSE),
    ],
)
def test_one_token_off_policy(kind: str, ratio: str, wanted: list[float]) -> None:
    found = expected_gradient(in_loss(kind, ratio), one_step(P, OLD, Q), 1)
    torch.testing.assert_close(found[0], torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


def two_steps() -> World:
    """pi = (.7, .3), then (.9, .1) or (.4, .6); reference (.5, .5), then (.5, .5) or (.2, .8)."""
    policy = torch.tensor([[[0.7, 0.3], [0.9, 0.1], [0.4, 0.6]]], dtype=torch.float64).log()
    ref = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]], dtype=torch.float64).log()
    return World(SequenceSpace(2, 2), torch.zeros(1, 4, dtype=torch.float64), policy, policy, ref, ref)


def of_sequences(batch: Batch) -> torch.Tensor:
    return (((batch.log_prob - batch.ref_log_prob) * batch.mask).sum(1).square() / 2).mean()


@pytest.mark.parametrize(
    ("loss", "first"),
    [(in_loss("k2"), 0.177933), (of_sequences, 0.233250), (in_reward("k1"), 0.233250), (in_loss("k1"), 0.0)],
)
def test_a_sum_over_tokens_misses_which_states_are_visited(loss, first: float) -> None:
    assert float(expected_gradient(loss, two_steps(), 2)[0, 0]) == pytest.approx(first, abs=1e-6)


def test_the_distances_have_those_gradients() -> None:
    world = two_steps()
    assert float(Distance("kl_policy_ref", "sequence").gradient(world)[0, 0]) == pytest.approx(0.233250, abs=1e-6)
    assert float(Distance("kl_policy_ref", "state").gradient(world)[0, 0]) == pytest.approx(0.177933, abs=1e-6)


@pytest.mark.parametrize("ordered", [False, True])
def test_groups_are_counted_with_their_probabilities(ordered: bool) -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    found = list(outcomes(p, 4, ordered=ordered))
    assert len(found) == (81 if ordered else 15)
    assert sum(weight for _, weight in found) == pytest.approx(1.0, abs=1e-12)
    share = sum(weight * float((index == 2).double().mean()) for index, weight in found)
    assert share == pytest.approx(0.2, abs=1e-12)


def test_states_behind_an_end_are_not_reached() -> None:
    # prefixes: (), 0, 1, 00, 01, 10, 11; symbol 1 ends
    assert reached(SequenceSpace(2, 3, eos=1)).tolist() == [True, True, False, True, False, False, False]


def planted(candidate: Candidate, a: float, b: float, where: Situation) -> torch.Tensor:
    """The gradient of a loss that follows a (R - b D)."""
    world = where.world()
    total = torch.zeros_like(world.policy[0])
    if candidate.gain is not None:
        total = total + a * gain_gradient(candidate.gain, world)
    for weight, distance in candidate.penalty:
        total = total - a * b * weight * distance.gradient(world)
    return -total


ON, OFF = situations(on_policy=True), situations(on_policy=False)


@pytest.fixture(scope="module")
def live() -> Identifier:
    return Identifier(ON)


@pytest.fixture(scope="module")
def past() -> Identifier:
    return Identifier(OFF, on_policy=False)


@pytest.mark.parametrize("candidate", candidates()[::3], ids=lambda c: c.text(1.0))
def test_a_planted_objective_is_recognised(live: Identifier, candidate: Candidate) -> None:
    found = live.identify({s: planted(candidate, 0.7, 0.3, s) for s in ON})
    assert found.exact and found.candidate == candidate
    if candidate.gain and candidate.penalty:
        assert found.beta == pytest.approx(0.3, rel=1e-6)
        assert found.scale == pytest.approx((0.7, 0.7), rel=1e-6)


@pytest.mark.parametrize("candidate", candidates(on_policy=False)[::9], ids=lambda c: c.text(1.0))
def test_a_planted_objective_is_recognised_off_policy(past: Identifier, candidate: Candidate) -> None:
    found = past.identify({s: planted(candidate, 0.7, 0.3, s) for s in OFF})
    assert found.exact and found.candidate == candidate


def test_signs_are_told(live: Identifier) -> None:
    candidate = Candidate("exact", ((1.0, Distance("js", "state")),))
    opposite = live.identify({s: planted(candidate, -1.0, 0.3, s) for s in ON})
    assert opposite.exact and opposite.follows == "the opposite of E[r] - 0.3 js, states held"
    increased = live.identify({s: planted(candidate, 1.0, -0.3, s) for s in ON})
    assert increased.exact and increased.follows == "E[r] + 0.3 js, states held"


def test_a_coefficient_that_depends_on_length_is_told(live: Identifier) -> None:
    candidate = Candidate("exact", ((1.0, Distance("kl_policy_ref", "sequence")),))
    beta = {"equal lengths": 0.2, "lengths 1 to 3": 0.3}
    found = live.identify({s: planted(candidate, 1.0, beta[s.lengths], s) for s in ON})
    assert found.exact and found.beta is None
    assert found.follows == "E[r] - (0.2 to 0.3, by length) kl_policy_ref, sequences"


def test_what_is_no_candidate_is_only_near_one(live: Identifier) -> None:
    candidate = Candidate("exact", ((1.0, Distance("kl_policy_ref", "sequence")),))
    noise = torch.Generator().manual_seed(0)

    def bent(where: Situation) -> torch.Tensor:
        clean = planted(candidate, 1.0, 0.3, where)
        direction = torch.randn(clean.shape, generator=noise, dtype=clean.dtype)
        return clean + 0.05 * clean.norm() * direction / direction.norm()

    found = live.identify({s: bent(s) for s in ON})
    assert not found.exact and 0.01 < found.residual <= 0.05 and found.follows.startswith("nearest: E[r]")


def test_nothing_is_recognised_as_nothing(live: Identifier) -> None:
    found = live.identify({s: torch.zeros_like(s.world().policy[0]) for s in ON})
    assert found.exact and found.follows.startswith("nothing")


def test_a_step_size_is_no_error() -> None:
    wanted = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert gradient_error(-0.1 * wanted, wanted) == pytest.approx((0.0, 1.0, 0.1), abs=1e-12)
    assert gradient_error(0.1 * wanted, wanted) == pytest.approx((1.0, -1.0, 0.0), abs=1e-12)
    # at 60 degrees: sin 60, cos 60
    turned = torch.tensor([[3 * 0.5 - 4 * 0.75**0.5, 4 * 0.5 + 3 * 0.75**0.5]], dtype=torch.float64)
    assert gradient_error(-turned, wanted)[:2] == pytest.approx((0.75**0.5, 0.5), abs=1e-12)


def test_a_field_with_states_held_is_no_gradient() -> None:
    world = ON[2].world()  # far from the reference
    whole = Objective("reward", "kl_policy_ref", "sequence", 0.5)
    held = Objective("reward", "kl_policy_ref", "state", 0.5)
    assert field_asymmetry(lambda w: whole.gradient(w)[0], world) < 1e-6
    assert field_asymmetry(lambda w: state_gradient(held, w), world) > 0.01


@pytest.mark.parametrize(("level", "against"), list(itertools.product(("sequence", "state"), ("ref", "old"))))
def test_distances_agree_with_finite_differences(level, against) -> None:
    world = OFF[3].world()
    distance = Distance("js", level, against)
    there = (
        world if against == "ref" else World(world.space, world.reward, world.policy, world.old, world.old, world.data)
    )
    objective = Objective("reward", "js", level, 1.0)
    numeric = torch.zeros_like(world.policy)
    for i in range(world.policy.numel()):
        step = torch.zeros_like(world.policy)
        step.view(-1)[i] = 1e-5
        values = [objective.distance(there.at(there.policy + sign * step, False).table(), there) for sign in (1, -1)]
        numeric.view(-1)[i] = (values[0] - values[1]).detach() / 2e-5
    torch.testing.assert_close(distance.gradient(world), numeric[0], atol=1e-8, rtol=0)
