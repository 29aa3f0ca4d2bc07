"""The optimum and the fixed point of the anchored reward are uniform over the good completions."""

import pytest
import torch
from tests.recipes.exact import climb, gradient, prepared, probabilities
from tests.worlds import table

from keel.core.aggregate import returns
from keel.core.errors import ConfigError
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.recipes.registry import recipe_named

SPACE = SequenceSpace(3, 3, eos=2)  # 15 sequences
BETA = 0.25


def world() -> tuple[TabularPolicy, torch.Tensor, torch.Tensor]:
    """A reference, rewards, and which sequences are good: five of them, of different probability and length."""
    ref = table("reference", space=SPACE, scale=1.2)
    good = torch.zeros(len(SPACE.rows()), dtype=torch.bool)
    good[[0, 4, 6, 7, 14]] = True
    reward = torch.where(good, 1.0, 0.0).double()
    reward[8] = 0.6
    assert float(probabilities(ref)[good].max() / probabilities(ref)[good].min()) > 5
    return ref, reward, good


def augmented(method, policy, ref, reward) -> torch.Tensor:
    """The reward after the method's transforms, without the KL."""
    rows = policy.weighted(SPACE.rows()).with_(reward=reward[:, None])
    return prepared(method, rows, {"policy": policy, "old": policy, "ref": ref})[0].reward[:, 0]


def tilted(ref, reward) -> torch.Tensor:
    weight = probabilities(ref) * (reward / BETA).exp()
    return weight / weight.sum()


def test_the_optimum_is_uniform_over_the_good():
    ref, reward, good = world()
    method = recipe_named("mara")(beta=BETA)
    q = probabilities(ref)
    anchored = augmented(method, table("anyone", space=SPACE), ref, reward)
    torch.testing.assert_close(anchored[~good], reward[~good])
    torch.testing.assert_close(anchored[good], 1 + BETA * (q[good].max() / q[good]).log())
    optimum = tilted(ref, anchored)
    each = q[good].max() * torch.tensor(1 / BETA).exp()  # the unnormalised mass of the anchor, and so of all
    z = 5 * each + (q * (reward / BETA).exp())[~good].sum()
    torch.testing.assert_close(optimum[good], (each / z).expand(5))
    plain = tilted(ref, reward)
    torch.testing.assert_close(plain[good] / plain[good].sum(), q[good] / q[good].sum())


@pytest.mark.parametrize("name", ["mara", "rloo"])
def test_the_fixed_point_of_exact_steps(name):
    ref, reward, good = world()
    method = recipe_named(name)(beta=BETA)
    policy = table("start", space=SPACE)
    wanted = tilted(ref, augmented(method, policy, ref, reward))
    climb(method, policy, ref, reward, rate=3.0, steps=25)
    found = probabilities(policy)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert float(gradient(method, policy, ref, reward).abs().max()) < 1e-6
    share = found[good] / found[good].sum()
    if name == "mara":
        torch.testing.assert_close(share, torch.full_like(share, 0.2), rtol=0, atol=1e-3)
    else:
        odds = probabilities(ref)[good]
        torch.testing.assert_close(share, odds / odds.sum(), rtol=0, atol=1e-3)


def test_the_other_direction_of_the_kl_overshoots():
    """beta ref / (c - r'): of the good answers that lie above the reference the rarest gets the most."""
    ref, reward, good = world()
    q = probabilities(ref)
    anchored = augmented(recipe_named("mara")(beta=BETA), ref, ref, reward)
    low = float(anchored.max()) + 1e-12
    high = low + 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((BETA * q / (middle - anchored)).sum()) > 1 else (low, middle)
    optimum = BETA * q / (high - anchored)
    assert float(optimum.sum()) == pytest.approx(1, abs=1e-9)
    lifted = good & (optimum > q)
    assert int(lifted.sum()) >= 2
    order = q[lifted].argsort()
    assert bool((optimum[lifted][order].diff() < 0).all())
    assert float(optimum[lifted].max() / optimum[lifted].min()) > 1.5  # far from uniform
    value = (optimum * anchored).sum() - BETA * (q * (q / optimum).log()).sum()
    for _ in range(3):  # and it is the maximum: any small move towards another distribution loses
        other = torch.softmax(table("move", _, space=SPACE, scale=1.0).table.flatten()[: len(q)].detach(), 0)
        moved = 0.99 * optimum + 0.01 * other
        assert float((moved * anchored).sum() - BETA * (q * (q / moved).log()).sum()) < float(value)


def test_a_threshold_that_nothing_reaches_is_rloo():
    ref, reward, _ = world()
    policy = table("start", space=SPACE)
    found, plain = (recipe_named(n)(beta=BETA, **o) for n, o in (("mara", {"threshold": 2.0}), ("rloo", {})))
    assert torch.equal(gradient(found, policy, ref, reward), gradient(plain, policy, ref, reward))
    assert torch.equal(augmented(found, policy, ref, reward), reward)
    rows = policy.weighted(SPACE.rows()).with_(reward=reward[:, None])
    earned = returns(prepared(plain, rows, {"policy": policy, "old": policy, "ref": ref})[0])
    torch.testing.assert_close(earned, reward - BETA * (probabilities(policy) / probabilities(ref)).log())


def test_without_a_kl_there_is_nothing_to_take_back():
    with pytest.raises(ConfigError, match="beta must be positive"):
        recipe_named("mara")(beta=0.0)
