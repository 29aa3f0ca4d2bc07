"""The coefficient of a KL penalty, found from the KL that may be spent."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

LARGEST = 1e6  # lambda beyond which a budget counts as out of reach
METRIC = "kl_budget/beta"


@part("kl_budget", paper=16)
@dataclass(frozen=True)
class KLBudget:
    """The coefficient at `path` becomes the beta whose optimum spends `budget` nats of KL.

        maximise E_phi[r]  subject to  KL(phi || ref) <= budget     =>     phi = ref e^(lam r) / Z,   beta = 1 / lam
        KL(phi || ref) = lam E_phi[r] - log Z = budget,   averaged over prompts, by bisection in lam

    Z and E_phi come from the completions of each batch, weighted with ref / old, prompt by prompt. From G completions
    of a prompt the estimate can never exceed log G (less where many are good), and is too low near it: keep the budget
    well below. Where it is out of reach for every lam the optimum is the reference on the best completions, and the
    coefficient is `minimum`. A batch whose prompts are all tied says nothing and changes nothing.

    Args:
        path: where the coefficient lives, `transforms.kl.coef`.
        budget: KL(policy || ref) of whole completions, in nats.
        start: the coefficient until the first batch is seen.
        decay: log beta <- decay log beta + (1 - decay) log of the batch's; the first batch's is taken as it is.
        minimum: the smallest coefficient.
        against: name of the reference model.

    Raises:
        ValueError: a budget, start or minimum that is not positive, or decay outside [0, 1).

    Source: "Asymptotics of Language Model Alignment", 2024.
    """

    path: str
    budget: float
    start: float = 1.0
    decay: float = 0.9
    minimum: float = 1e-3
    against: str = "ref"

    def __post_init__(self) -> None:
        for name in ("budget", "start", "minimum"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference; the KL in the reward has them measured."""
        return (LogProb(of=("old",)), LogProb(of=(self.against,)))

    def init(self) -> dict[str, Any]:
        """The coefficient, and whether a batch was seen."""
        return {"value": self.start, "seen": False}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves what the batch says of beta in the metrics, where `update` finds it."""
        log_odds, groups, reward = self.samples(rows, stats)
        tilt = rate_at_budget(reward, log_odds, groups, self.budget)
        if tilt is not None:
            metrics[METRIC] = max(self.minimum, 1 / tilt)
        return state

    def update(self, metrics: dict[str, float], state: dict[str, Any], step: int) -> tuple[dict[str, float], dict]:
        """The coefficient after a batch; before the first batch, the starting value."""
        if METRIC not in metrics:
            return {self.path: state["value"]}, state
        decay = self.decay if state["seen"] else 0.0
        value = math.exp(decay * math.log(state["value"]) + (1 - decay) * math.log(metrics[METRIC]))
        return {self.path: value}, {"value": value, "seen": True}

    def samples(self, rows: Rows, stats: Stats) -> tuple[Float[Tensor, "B"], Groups, Float[Tensor, "B"]]:
        """log of weight times ref / old, the groups of the rows with a reward, and the reward, in fp64."""
        if rows.reward is None or rows.reward.shape[1] != 1:
            raise ValueError("a KL budget reads one reward column: put a WeightedSum before it")
        reward = rows.reward[:, 0].double()
        gap = stats[LogProb(of=(self.against,))] - stats[LogProb(of=("old",))]
        gap = torch.where(rows.mask, gap, torch.zeros_like(gap)).double().sum(1)
        groups = Groups.of(rows, ~reward.isnan())
        return torch.where(groups.weight > 0, gap + rows.weight.double().log(), -torch.inf), groups, reward


def rate_at_budget(
    reward: Float[Tensor, "B"], log_odds: Float[Tensor, "B"], groups: Groups, budget: float
) -> float | None:
    """lam at which KL(ref e^(lam r) / Z || ref), averaged over groups, is the budget.

    Args:
        reward: of each row.
        log_odds: logarithm of the reference's probability of a row, up to a constant of its group; -inf leaves it out.
        groups: the rows' prompts; a group counts with its weight.
        budget: in nats.

    Returns:
        The rate; inf where no rate spends so much, None where all groups are tied.
    """
    weight = groups.sum(groups.weight).double()
    low, high = groups.range(reward)
    if not bool(((high > low) & (weight > 0)).any()):
        return None

    def spent(rate: float) -> float:
        return float(ratio((weight * tilt_kl(rate, reward, log_odds, groups)).sum(), weight.sum()))

    ceiling = 1.0
    while spent(ceiling) < budget:
        ceiling *= 2
        if ceiling > LARGEST:
            return math.inf
    floor = 0.0
    for _ in range(60):
        middle = (floor + ceiling) / 2
        floor, ceiling = (middle, ceiling) if spent(middle) < budget else (floor, middle)
    return (floor + ceiling) / 2


def tilt_kl(
    rate: float, reward: Float[Tensor, "B"], log_odds: Float[Tensor, "B"], groups: Groups
) -> Float[Tensor, "N"]:
    """KL(ref e^(rate r) / Z || ref) of each group, rate E[r] - log Z under the tilted weights; 0 without rows."""
    counted = groups.weight > 0
    earned = torch.where(counted, reward, 0.0)
    log_ref = log_odds - groups.broadcast(_log_sum(log_odds, groups))
    score = log_ref + rate * earned
    log_z = _log_sum(score, groups)
    tilted = torch.where(counted, (score - groups.broadcast(log_z)).exp(), 0.0)
    found = rate * groups.sum(tilted * earned) - log_z
    return torch.where(log_z.isfinite(), found, torch.zeros_like(found))


def _log_sum(values: Float[Tensor, "B"], groups: Groups) -> Float[Tensor, "N"]:
    top = groups.range(values)[1]
    terms = torch.where(groups.weight > 0, (values - groups.broadcast(top)).exp(), 0.0)
    return groups.sum(terms).log() + top
