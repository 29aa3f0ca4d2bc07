"""Preference games: the Nash policy, and how fast two methods come to it."""

import pytest
import torch
from torch.testing import assert_close

from keel.core.errors import UserError
from keel.exact.games import PreferenceGame, kl

P = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
REF = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
PI_T = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
GAME = PreferenceGame(P, REF.log(), 0.1)
SIX = {"rtol": 0, "atol": 5.1e-7}


def probs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_nash_policy():
    star = GAME.nash()
    assert_close(star.exp(), probs(0.492747, 0.154147, 0.353106), **SIX)
    assert_close(star, GAME.best_response(star), rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", [REF, PI_T, probs(0.98, 0.01, 0.01)])
def test_exploitability_by_search(policy):
    """No policy of a fine grid wins more; at the Nash policy nothing is won."""
    points = torch.arange(1, 100, dtype=torch.float64) / 100
    a, b = torch.meshgrid(points, points, indexing="ij")
    grid = torch.stack([a, b, 1 - a - b], -1)[(a + b) < 0.995]
    log = policy.log().expand_as(grid)
    game = PreferenceGame(P.expand(len(grid), 3, 3), REF.log().expand_as(grid), 0.1)
    best = float(game.value(grid.log(), log).max())
    worst = float(game.value(log, grid.log()).min())
    found = float(GAME.exploitability(policy.log()))
    assert best - worst <= found + 1e-12 and found - (best - worst) < 2e-3
    assert float(GAME.exploitability(GAME.nash())) == pytest.approx(0, abs=1e-12)
    assert found > 0


def test_value_of_the_unregularised_part():
    assert_close(GAME.win_rate(PI_T.log()), probs(0.61, 0.51, 0.41))
    game = PreferenceGame(P, REF.log(), 1e-9)
    assert float(game.value(REF.log(), PI_T.log())) == pytest.approx(0.6 * 0.61 + 0.3 * 0.51 + 0.1 * 0.41, abs=1e-8)


@pytest.mark.parametrize(("method", "found"), [
    ("mirror_prox", [1.622e-01, 3.420e-03, 2.911e-09]),
    ("mirror_descent", [1.973e-01, 1.698e-02, 6.296e-06]),
])  # fmt: skip
def test_distance_to_the_nash_policy(method, found):
    star = GAME.nash()
    iterates = getattr(GAME, method)(REF.log(), 0.2, 40)
    distance = [float(kl(star, iterates[k])) for k in (1, 10, 40)]
    assert distance == pytest.approx(found, rel=5e-4)


def test_the_stated_bounds_hold():
    star = GAME.nash()
    iterates = GAME.mirror_prox(REF.log(), 0.2, 40)
    bounds = [float(kl(star, REF.log())) * 1.2**-k for k in (1, 10, 40)]
    assert bounds == pytest.approx([2.048e-01, 3.970e-02, 1.672e-04], rel=5e-4)
    for k, policy in enumerate(iterates):
        assert float(kl(star, policy)) <= float(kl(star, REF.log())) * 1.2**-k + 1e-15


def test_a_large_step_ends_with_mirror_prox_alone():
    star = GAME.nash()
    ends = {name: getattr(GAME, name)(REF.log(), 2.0, 300)[-1] for name in ("mirror_prox", "mirror_descent")}
    assert float(kl(star, ends["mirror_prox"])) < 1e-12
    assert float(kl(star, ends["mirror_descent"])) == pytest.approx(0.163, abs=5e-4)


def test_the_second_step_is_from_the_base():
    """From the half step it would be another method."""
    half = GAME.proximal(REF.log(), REF.log(), 0.2)
    wrong, right = GAME.proximal(half, half, 0.2), GAME.mirror_prox(REF.log(), 0.2, 1)[-1]
    star = GAME.nash()
    assert float(kl(star, right)) == pytest.approx(0.16222187, abs=5e-8)
    assert abs(float(kl(star, wrong)) - float(kl(star, right))) > 1e-3


def test_exploitability_falls_geometrically():
    gaps = [float(GAME.exploitability(policy)) for policy in GAME.mirror_prox(REF.log(), 0.2, 60)]
    assert gaps[60] < 1e-8 < gaps[0]
    assert all(later < gap for gap, later in zip(gaps[:40:5], gaps[5:45:5], strict=True))


def test_a_step_maximises_what_it_says():
    """Against numerical ascent on P(pi beats o) / beta - KL(pi || ref) - KL(pi || b) / eta."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    close = {"max_iter": 500, "tolerance_grad": 1e-13, "tolerance_change": 1e-16}
    optimiser = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **close)

    def loss():
        optimiser.zero_grad()
        policy = logits.log_softmax(-1)
        wins = (policy.exp() * GAME.win_rate(PI_T.log())).sum() / 0.1
        value = kl(policy, REF.log()) + kl(policy, PI_T.log()) / 0.7 - wins
        value.backward()
        return value

    optimiser.step(loss)
    assert_close(logits.detach().softmax(-1), GAME.proximal(PI_T.log(), PI_T.log(), 0.7).exp(), rtol=0, atol=1e-7)


def test_the_step_of_inpo():
    game = PreferenceGame(P, REF.log(), 0.2)
    assert_close(game.inpo(PI_T.log(), 0.5).exp(), probs(0.401167, 0.431338, 0.167495), **SIX)
    policy = PI_T.log()
    for _ in range(400):
        policy = game.inpo(policy, 2.0)
    assert_close(policy, game.nash(), rtol=0, atol=1e-8)
    assert_close(game.inpo(PI_T.log(), 0.2), game.best_response(PI_T.log()))  # tau = eta


def test_prompts_are_games_of_their_own():
    both = PreferenceGame(torch.stack([P, P.mT]), torch.stack([REF, REF]).log(), 0.1)
    assert_close(both.nash()[0], GAME.nash(), rtol=0, atol=1e-9)
    assert_close(both.nash()[1], PreferenceGame(P.mT, REF.log(), 0.1).nash(), rtol=0, atol=1e-9)


def test_mistakes():
    with pytest.raises(ValueError, match="beta"):
        PreferenceGame(P, REF.log(), 0.0)
    with pytest.raises(ValueError, match="both orders"):
        PreferenceGame(P + 0.1, REF.log(), 0.1)
    with pytest.raises(ValueError, match="eta"):
        GAME.proximal(REF.log(), REF.log(), 0.0)
    with pytest.raises(ValueError, match="tau"):
        GAME.inpo(REF.log(), 0.05)
    with pytest.raises(UserError, match="2 steps"):
        GAME.nash(limit=2)
