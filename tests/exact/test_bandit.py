"""The bandit of preference methods: the numbers of its specification, draws against what is exact, what it shows."""

from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from tests.parts.completions import ALIKE

from keel.exact.bandit import (
    PUSHING,
    VARIANTS,
    Algorithm,
    Bandit,
    Settings,
    best_of,
    compare,
    likelihood_gradient,
    mode_seeking_gradient,
    peaked_bandit,
    run_bandit,
)

FAR = peaked_bandit()


def earned(prob) -> float:
    return float((prob * FAR.reward).sum())


def test_best_of_ten_and_again():
    """The last of the four is 1 - 3.2e-7: arm 70 then has 0.999968 of the mass, its neighbours the rest."""
    prob = FAR.log_ref.exp()
    assert earned(prob) == pytest.approx(0.024460, abs=ALIKE)
    for wanted in (0.207833, 0.799107, 0.994890, 1 - 3.203e-7):
        prob = best_of(prob, FAR.reward, 10)
        assert earned(prob) == pytest.approx(wanted, abs=ALIKE)
        assert float(prob.sum()) == pytest.approx(1, abs=1e-12)
    assert float(prob[70]) == pytest.approx(0.999968, abs=ALIKE)
    assert 1 - earned(prob) == pytest.approx(3.1869e-7, rel=1e-3)


def test_best_of_is_enumerated():
    """Three arms, two of them tied, all nine pairs of draws."""
    prob, reward = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([1.0, 1.0, 0.0]).double()
    assert best_of(prob, reward, 2).tolist() == pytest.approx([0.96 * 0.5 / 0.8, 0.96 * 0.3 / 0.8, 0.04])
    assert best_of(prob, reward, 1).tolist() == pytest.approx(prob.tolist())
    assert best_of(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double(), 5).tolist() == [1.0, 0.0]


def test_dpo_offline_and_on_policy():
    """beta 1, learning rate 100, 200 steps of the exact gradient."""
    offline = run_bandit(FAR, Settings("dpo"))
    assert float(offline.reward[-1]) == pytest.approx(0.184810, abs=ALIKE)
    on_policy = run_bandit(FAR, Settings("dpo", on_policy=True, rounds=200, steps=1))
    assert float(on_policy.reward[-1]) == pytest.approx(0.977204, abs=ALIKE)
    assert len(on_policy.reward) == 201 and float(on_policy.reward[0]) == pytest.approx(0.024460, abs=ALIKE)
    assert float(offline.losers[-1]) < float(offline.losers[0]) == 0.0  # the negative gradient


def test_gradients_of_the_two_divergences():
    policy, target = torch.tensor([0.1, 0.1, 0.8]).double(), torch.tensor([0.7, 0.2, 0.1]).double()
    forward, reverse = likelihood_gradient(policy.log(), target), mode_seeking_gradient(policy.log(), target)
    assert forward.tolist() == pytest.approx([-0.6, -0.1, 0.7], abs=ALIKE)
    assert reverse.tolist() == pytest.approx([-0.334556, -0.209279, 0.543835], abs=ALIKE)
    logits = policy.log().requires_grad_()
    log_p = logits.log_softmax(0)
    (grad,) = torch.autograd.grad((log_p.exp() * (log_p - target.log())).sum(), logits)
    torch.testing.assert_close(grad, reverse)


STEPS = [(name, True) for name in get_args(Algorithm)] + [(name, False) for name in PUSHING]


@pytest.mark.parametrize(("algorithm", "pushes"), STEPS)
def test_one_step_is_the_gradient_of_the_loss(algorithm, pushes):
    """Against autograd of each method's loss, away from the reference: two steps of which the second is looked at."""
    bandit = Bandit(torch.tensor([0.0, 1.0, 0.5, 1.0]).double(), torch.tensor([0.4, 0.1, 0.3, 0.2]).double().log())
    rate, known = 0.3, {"learning_rate": 0.3, "n": 3, "beta": 0.7, "temperature": 0.5, "epsilon": 0.05}
    known["negative_gradient"] = pushes
    first = run_bandit(bandit, Settings(algorithm, steps=1, **known))
    second = run_bandit(bandit, Settings(algorithm, steps=2, **known))
    logits = first.log_policy.clone().requires_grad_()
    log_p, drawn = logits.log_softmax(0), bandit.log_ref.exp()
    ahead = log_p - bandit.log_ref
    held = ahead if pushes else ahead.detach()
    margin, pairs = ahead[:, None] - held[None, :], drawn[:, None] * drawn[None, :]
    wins = bandit.reward[:, None] > bandit.reward[None, :]
    gain = bandit.reward - drawn @ bandit.reward
    gain = gain if pushes else gain.clamp(min=0)
    ratio = ahead.exp()
    loss = {
        "best_of_n": -(best_of(drawn, bandit.reward, 3) * log_p).sum(),
        "reward_weighted": -(drawn * (bandit.reward / 0.5).exp() * log_p).sum(),
        "dpo": -(pairs * wins * (0.7 * margin).sigmoid().log()).sum(),
        "ipo": (pairs * wins * (margin - 1 / 1.4).square()).sum(),
        "winners": -(pairs * wins * log_p[:, None]).sum(),
        "reinforce": -(drawn * gain * log_p).sum(),
        "ppo": -(drawn * torch.minimum(ratio * gain, ratio.clamp(0.95, 1.05) * gain)).sum(),
    }[algorithm]
    (grad,) = torch.autograd.grad(loss, logits)
    wanted = (first.log_policy - rate * grad).log_softmax(0)
    torch.testing.assert_close(second.log_policy, wanted)


def test_best_of_n_learnt_to_the_end_is_its_law():
    found = run_bandit(FAR, Settings("best_of_n", steps=4000, learning_rate=20.0))
    assert float(found.reward[-1]) == pytest.approx(0.207833, abs=2e-3)


@pytest.mark.parametrize("algorithm", ["best_of_n", "reward_weighted", "dpo"])
def test_draws_come_near_what_is_exact(algorithm):
    known = {"steps": 5, "learning_rate": 2.0, "n": 5}
    exact, drawn = (run_bandit(FAR, Settings(algorithm, states=states, **known)) for states in (None, 20_000))
    assert float((exact.log_policy.exp() - drawn.log_policy.exp()).abs().sum()) < 0.05
    assert drawn.queries.tolist() == [0.0, 100_000.0] and exact.queries.tolist() == [0.0, 0.0]
    again = run_bandit(FAR, Settings(algorithm, states=20_000, **known))
    assert torch.equal(again.log_policy, drawn.log_policy)
    other = run_bandit(FAR, Settings(algorithm, states=20_000, seed=1, **known))
    assert not torch.equal(other.log_policy, drawn.log_policy)


def test_what_the_comparison_shows():
    """Far from the data likelihood alone falls behind unless it is on-policy; within them all go up."""
    known = {"rounds": 20, "steps": 10, "learning_rate": 1.0}
    ends = {on: float(run_bandit(FAR, Settings("best_of_n", on_policy=on, **known)).reward[-1]) for on in (False, True)}
    assert ends[False] < 0.21 and ends[True] > 0.95
    near = peaked_bandit(peak=20.0)
    assert FAR.coverage > 0.99 and 0.3 < near.coverage < 0.6
    for on in (False, True):
        found = run_bandit(near, Settings("best_of_n", on_policy=on, **known))
        assert float(found.reward[-1]) > 0.85
    asked = run_bandit(FAR, Settings("best_of_n", on_policy=True, states=4, **known))
    assert float(asked.queries[-1]) == 20 * 4 * 10


@cache
def ends(peak: float) -> dict[str, tuple[float, float]]:
    return {n: (float(a.reward[-1]), float(b.reward[-1])) for n, (a, b) in compare(peaked_bandit(peak)).items()}


def test_what_is_compared_shows_what_the_paper_says():
    """Far from the data on-policy draws raise everything; within them a push on losers is what helps offline."""
    far, near = ends(70.0), ends(20.0)
    assert set(far) == set(VARIANTS) and all(on > off + 0.15 for off, on in far.values())
    assert far["best of N"][0] < 0.207833 and far["PPO"][0] < 0.06 and far["PPO"][1] > 0.99
    for name in ("DPO", "IPO"):
        assert near[name][0] > near[f"{name}, losers held"][0] + 0.3 > near["winners of pairs"][0]
    assert all(on > 0.9 for _, on in near.values())
    held, pushed = (run_bandit(FAR, Settings("dpo", negative_gradient=n, steps=50)) for n in (False, True))
    assert float(held.winners[-1]) > 0 > float(pushed.losers[-1]) < float(held.losers[-1])


def test_the_table_of_the_documentation_is_what_comes_out():
    text = (Path(__file__).parents[2] / "docs" / "pairs.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- bandit: begin -->")[2].partition("<!-- bandit: end -->")[0].strip().splitlines()
    found = {name: (*ends(70.0)[name], *ends(20.0)[name]) for name in VARIANTS}
    for line, (name, values) in zip(shown[2:], found.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name and [float(c) for c in cells[1:]] == pytest.approx(values, abs=1.5e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "trpo"}, "trpo"),
        ({"algorithm": "winners", "negative_gradient": False}, "winners pushes nothing down"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"n": 1}, "n is too small: 1"),
        ({"rounds": 0}, "rounds is too small: 0"),
        ({"steps": 0}, "steps is too small: 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"gap": -1.0}, "gap must not be negative"),
        ({"states": 0}, "states at least 1"),
    ],
    ids=str,
)
def test_bad_settings(settings, said):
    with pytest.raises((ValueError, TypeError), match=said):
        Settings(**settings)


def test_bad_bandits():
    with pytest.raises(ValueError, match="not 1 and 20"):
        peaked_bandit(arms=1)
    with pytest.raises(ValueError, match=r"not 100 and 0\.0"):
        peaked_bandit(width=0.0)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of(FAR.log_ref.exp(), FAR.reward, 0)
