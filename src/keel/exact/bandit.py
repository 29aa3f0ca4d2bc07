"""When an update has to be on-policy, or push something down: preference methods on a bandit that is known exactly.

One state, A arms. The reference lies around one arm and the reward peaks at another. Every method sees N draws at a
time, from the reference (offline) or, round by round, from the policy as it is:

    best_of_n            log-likelihood of the best of N
    reward_weighted      log-likelihood of each draw, times exp(r / temperature) (RWR)
    winners              log-likelihood of the winners of all pairs
    dpo, ipo             all pairs of N draws whose rewards differ by more than `gap`
    reinforce            A = r - E r times the log-likelihood of each draw
    ppo                  min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A), rho to who drew

Without `negative_gradient` nothing is pushed down: the losers of dpo and ipo are held constant, and reinforce and ppo
leave out the draws whose A is negative. With the first three there is none to begin with.

What is averaged over draws is averaged exactly, so that nothing is left to chance; or, with `states`, over that many
sets of N draws. Where the reward's peak has little density, only on-policy draws or a loss that pushes losers down
(a negative gradient) reach it; where it lies within the data, all methods are alike.

Source: the setting of "Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data", 2024.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.choice import generator

Algorithm = Literal["best_of_n", "reward_weighted", "winners", "dpo", "ipo", "reinforce", "ppo"]
PAIRS = ("winners", "dpo", "ipo")
PUSHING = ("dpo", "ipo", "reinforce", "ppo")  # those that push something down
LOOKED_AT = ("reward", "kl", "entropy", "winners", "losers", "covered", "queries")


@dataclass(frozen=True, eq=False)
class Bandit:
    """Rewards of A arms, and a reference policy over them.

    Args:
        reward: of each arm, [A].
        log_ref: log-probabilities of the reference, [A].
    """

    reward: Float[Tensor, "A"]
    log_ref: Float[Tensor, "A"]

    @property
    def coverage(self) -> float:
        """Where the best arm lies within the data: mass of the reference on arms up to it, from 0 to 1."""
        return float(self.log_ref.exp()[: int(self.reward.argmax()) + 1].sum())


def peaked_bandit(peak: float = 70.0, arms: int = 100, centre: float = 20.0, width: float = 20.0) -> Bandit:
    """Reward exp(-((a - peak) / 10)^2), and a reference proportional to exp(-((a - centre) / width)^2 / 2).

    >>> round(float((peaked_bandit().log_ref.exp() * peaked_bandit().reward).sum()), 6)
    0.02446

    Args:
        peak: 70 is far from the data, 20 within them.
        arms: A.
        centre, width: of the reference.

    Raises:
        ValueError: fewer than two arms, or a width that is not positive.
    """
    if arms < 2 or not width > 0:
        raise ValueError(f"arms must be at least 2 and width positive, not {arms} and {width}")
    arm = torch.arange(arms, dtype=torch.float64)
    return Bandit((-((arm - peak) / 10).square()).exp(), (-0.5 * ((arm - centre) / width).square()).log_softmax(0))


def best_of(prob: Float[Tensor, "A"], reward: Float[Tensor, "A"], n: int) -> Float[Tensor, "A"]:
    """The law of the best of n draws, arms of equal reward sharing what is theirs: F(r)^n - F(r-)^n for each reward.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    levels, place = reward.unique(return_inverse=True)
    mass = prob.new_zeros(len(levels)).index_add(0, place, prob)
    upto = mass.cumsum(0).clamp(max=1)
    wins = upto**n - (upto - mass).clamp(min=0) ** n
    share = torch.where(mass > 0, wins / torch.where(mass > 0, mass, 1), 0)
    return prob * share[place]


def likelihood_gradient(log_policy: Float[Tensor, "*n"], target: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Gradient of KL(target || policy) in the policy's logits, pi - p: it covers what the target covers."""
    return log_policy.exp() - target


def mode_seeking_gradient(log_policy: Float[Tensor, "*n"], target: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Gradient of KL(policy || target) in the policy's logits, pi (log(pi / p) - KL): it moves mass between arms."""
    policy, log_ratio = log_policy.exp(), log_policy - target.log()
    return policy * (log_ratio - (policy * log_ratio).sum(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class BanditResult:
    """What a method has made of a bandit, after each of R rounds and before the first of them.

    Args:
        reward: E_pi[r], [R + 1].
        kl: KL(pi || ref) in nats, [R + 1].
        entropy: of the policy in nats, [R + 1].
        winners, losers: mean log(pi / ref) of the winners and of the losers of the round's data after the round,
            [R + 1]; the losers fall where the negative gradient acts. For methods without pairs, of what is best and
            what is worst among N.
        covered: arms that hold more than 1e-3 of the policy, [R + 1].
        queries: rewards that were asked for until then, [R + 1]; 0 where draws are averaged exactly.
        log_policy: at the end, [A].
    """

    reward: Float[Tensor, "R"]
    kl: Float[Tensor, "R"]
    entropy: Float[Tensor, "R"]
    winners: Float[Tensor, "R"]
    losers: Float[Tensor, "R"]
    covered: Float[Tensor, "R"]
    queries: Float[Tensor, "R"]
    log_policy: Float[Tensor, "A"]


@dataclass(frozen=True)
class Settings:
    """How a method learns.

    Args:
        algorithm: one of seven.
        on_policy: each round draws anew from the policy; else all rounds read the draws of the first, from the
            reference.
        rounds: how often what is drawn may change.
        steps: gradient steps within a round, on the same draws.
        n: draws at a time.
        learning_rate: of gradient descent on the logits.
        beta: coefficient of dpo, and for ipo the margin 1 / (2 beta).
        temperature: of reward_weighted.
        gap: difference of rewards that a pair has to exceed.
        epsilon: of ppo's clipping.
        negative_gradient: push losers, and draws below the mean, down; where nothing does, True changes nothing.
        states: sets of N draws a round; None averages over all draws.
        seed: of the draws.

    Raises:
        ValueError: a setting out of range.
    """

    algorithm: Algorithm = "dpo"
    on_policy: bool = False
    rounds: int = 1
    steps: int = 200
    n: int = 10
    learning_rate: float = 100.0
    beta: float = 1.0
    temperature: float = 1.0
    gap: float = 0.0
    epsilon: float = 0.2
    negative_gradient: bool = True
    states: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(f"algorithm '{self.algorithm}' is not one of {', '.join(get_args(Algorithm))}")
        for name in ("rounds", "steps", "n"):
            if getattr(self, name) < (2 if name == "n" and self.algorithm in PAIRS else 1):
                raise ValueError(f"{name} is too small: {getattr(self, name)}")
        if not self.negative_gradient and self.algorithm not in PUSHING:
            raise ValueError(f"{self.algorithm} pushes nothing down, so that it cannot be without a negative gradient")
        for name in ("learning_rate", "beta", "temperature", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.gap < 0 or (self.states is not None and self.states < 1):
            raise ValueError(f"gap must not be negative and states at least 1, not {self.gap} and {self.states}")


VARIANTS: dict[str, dict[str, Any]] = {
    "best of N": {"algorithm": "best_of_n"},
    "RWR": {"algorithm": "reward_weighted"},
    "winners of pairs": {"algorithm": "winners"},
    "DPO, losers held": {"algorithm": "dpo", "negative_gradient": False},
    "DPO": {"algorithm": "dpo"},
    "IPO, losers held": {"algorithm": "ipo", "beta": 0.05, "negative_gradient": False},
    "IPO": {"algorithm": "ipo", "beta": 0.05},
    "REINFORCE, gains only": {"algorithm": "reinforce", "negative_gradient": False},
    "REINFORCE": {"algorithm": "reinforce"},
    "PPO, gains only": {"algorithm": "ppo", "negative_gradient": False},
    "PPO": {"algorithm": "ppo"},
}


def compare(
    bandit: Bandit, rounds: int = 50, steps: int = 10, learning_rate: float = 2.0
) -> dict[str, tuple[BanditResult, BanditResult]]:
    """Every variant, offline and on-policy, with as many gradient steps: what they ask of the reward is exact for all.

    Offline all rounds read the draws of the reference. A step is `learning_rate` over the sum of what is pulled at the
    start, so that methods whose losses have other scales move alike at first.

    Args:
        bandit: where.
        rounds: R, in which on-policy draws change.
        steps: within a round.
        learning_rate: of a unit pull.
    """
    found = {}
    for name, settings in VARIANTS.items():
        first = Settings(**settings)
        pull = _pull(bandit, first, bandit.log_ref, _draw(bandit, first, bandit.log_ref, 0)).abs().sum()
        known: dict[str, Any] = {"rounds": rounds, "steps": steps, "learning_rate": learning_rate / float(pull)}
        ends = [run_bandit(bandit, Settings(**settings, **known, on_policy=on)) for on in (False, True)]
        found[name] = (ends[0], ends[1])
    return found


def comparison_table() -> str:
    """Mean rewards that every variant ends with, where the peak is far from the data and within them, as Markdown."""
    lines = ["| | far: offline | far: on-policy | within: offline | within: on-policy |", "|---|---|---|---|---|"]
    far, near = compare(peaked_bandit(70.0)), compare(peaked_bandit(20.0))
    for name in VARIANTS:
        ends = [f"{float(found.reward[-1]):.3f}" for found in (*far[name], *near[name])]
        lines.append(f"| {name} | {' | '.join(ends)} |")
    return "\n".join(lines)


def run_bandit(bandit: Bandit, settings: Settings = Settings()) -> BanditResult:
    """Learn from the reference on, by plain gradient descent.

    The loss of pairs is E[link; i beats j], not divided by the share of pairs that differ.
    """
    logits = bandit.log_ref.clone()
    data = _draw(bandit, settings, bandit.log_ref, 0)
    seen = [_look(bandit, settings, logits, data, 0)]
    for number in range(settings.rounds):
        if settings.on_policy and number:
            data = _draw(bandit, settings, logits.log_softmax(0), number)
        for _ in range(settings.steps):
            logits = logits - settings.learning_rate * _gradient(bandit, settings, logits, data)
        seen.append(_look(bandit, settings, logits, data, number + 1))
    columns = dict(zip(LOOKED_AT, torch.stack(seen).T, strict=True))
    return BanditResult(**columns, log_policy=logits.log_softmax(0))


@dataclass(frozen=True, eq=False)
class _Data:
    """The law of the draws and the log-probabilities of who drew, [A]; the law of winner and loser, [A, A]; and that
    of the best and the worst of N, [A].
    """

    drawn: Float[Tensor, "A"]
    log_drawn: Float[Tensor, "A"]
    pairs: Float[Tensor, "A A"]
    best: Float[Tensor, "A"]
    worst: Float[Tensor, "A"]


def _draw(bandit: Bandit, settings: Settings, log_prob: Float[Tensor, "A"], number: int) -> _Data:
    wins = _wins(bandit.reward, settings.gap)
    if settings.states is None:
        prob = log_prob.exp()
        best, worst = (best_of(prob, sign * bandit.reward, settings.n) for sign in (1, -1))
        return _Data(prob, log_prob, prob[:, None] * prob[None, :] * wins, best, worst)
    chance = generator(settings.seed, "bandit", number)
    picks = log_prob.exp().multinomial(settings.states * settings.n, replacement=True, generator=chance)
    picks = picks.reshape(settings.states, settings.n)
    counts = torch.zeros(settings.states, len(log_prob), dtype=log_prob.dtype).scatter_add(
        1, picks, torch.ones_like(picks, dtype=log_prob.dtype)
    )
    earned = bandit.reward[picks]
    both = (counts.T @ counts) / (settings.states * settings.n * (settings.n - 1)) if settings.n > 1 else None
    pairs = torch.zeros_like(wins, dtype=log_prob.dtype) if both is None else both * wins
    best, worst = (
        _shares(picks.gather(1, place[:, None])[:, 0], len(log_prob), log_prob)
        for place in (earned.argmax(1), earned.argmin(1))
    )
    return _Data(counts.sum(0) / counts.sum(), log_prob, pairs, best, worst)


def _shares(picks: Tensor, arms: int, like: Tensor) -> Float[Tensor, "A"]:
    return picks.bincount(minlength=arms).to(like) / len(picks)


def _wins(reward: Float[Tensor, "A"], gap: float) -> Bool[Tensor, "A A"]:
    return reward[:, None] - reward[None, :] > gap


def _gradient(bandit: Bandit, settings: Settings, logits: Float[Tensor, "A"], data: _Data) -> Float[Tensor, "A"]:
    log_policy = logits.log_softmax(0)
    pull = _pull(bandit, settings, log_policy, data)
    return log_policy.exp() * pull.sum() - pull


def _pull(bandit: Bandit, settings: Settings, log_policy: Float[Tensor, "A"], data: _Data) -> Float[Tensor, "A"]:
    """How much the log-likelihood of each arm is raised; below 0 where it is pushed down."""
    if settings.algorithm == "winners":
        return data.pairs.sum(1)
    if settings.algorithm in PAIRS:
        ahead = log_policy - bandit.log_ref
        margin = ahead[:, None] - ahead[None, :]
        if settings.algorithm == "dpo":
            slope = -settings.beta * torch.sigmoid(-settings.beta * margin)
        else:
            slope = 2 * (margin - 1 / (2 * settings.beta))
        weighted = data.pairs * slope
        return (weighted.sum(0) if settings.negative_gradient else 0) - weighted.sum(1)
    if settings.algorithm == "best_of_n":
        return data.best
    if settings.algorithm == "reward_weighted":
        return data.drawn * (bandit.reward / settings.temperature).exp()
    advantage = bandit.reward - (data.drawn * bandit.reward).sum()
    if not settings.negative_gradient:
        advantage = advantage.clamp(min=0)
    if settings.algorithm == "reinforce":
        return data.drawn * advantage
    ratio = (log_policy - data.log_drawn).exp()
    beyond = torch.where(advantage > 0, ratio > 1 + settings.epsilon, ratio < 1 - settings.epsilon)
    return torch.where(beyond | (data.drawn == 0), 0.0, data.drawn * ratio * advantage)


def _look(
    bandit: Bandit, settings: Settings, logits: Float[Tensor, "A"], data: _Data, rounds: int
) -> Float[Tensor, "7"]:
    log_policy = logits.log_softmax(0)
    policy, ahead = log_policy.exp(), log_policy - bandit.log_ref
    pairs = data.pairs.sum()
    winner, loser = data.best, data.worst
    if settings.algorithm in PAIRS and pairs > 0:
        winner, loser = data.pairs.sum(1) / pairs, data.pairs.sum(0) / pairs
    drawn = rounds if settings.on_policy else min(rounds, 1)
    queries = drawn * (settings.states or 0) * settings.n
    found = (policy @ bandit.reward, policy @ ahead, -(policy @ log_policy), winner @ ahead, loser @ ahead)
    counted = (policy > 1e-3).sum().to(policy), torch.tensor(float(queries), dtype=policy.dtype)
    return torch.stack([*found, *counted])
