"""A KL penalty that acts above a threshold, which a PID on the reward and the phase of training move."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from keel.core.aggregate import masked_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.functionals import Divergence, Functional, LogProb
from keel.statistics.stats import Stats

METRIC = "safe/kl"
WINDOW = 50  # rewards of a phase
PHASES = {"warm-up": 1.5, "climbing": 1.2, "converged": 1.0, "plateau": 0.8}


@part("kl_threshold", paper=12)
@dataclass(frozen=True)
class KLThreshold:
    """The coefficient at `path` is the slope of a quadratic penalty on the KL above a threshold that moves.

        ks <- 0.9 ks + 0.1 KL,    threshold = clip((base + u) phase, 0.1, 0.6)
        coefficient = 2 strength [ks - threshold]_+ max(0.5, entropy_floor / (H + 0.1))
        u = kp e + ki I + kd (e - e_before),   e = m - m_before - 0.001,   m <- 0.95 m + 0.05 reward,   I in [-1, 1]

    The phase is 1.5 (warm-up) for 50 batches, then 1.2 while the mean reward of the last 50 is more than 0.01 above
    that of the 50 before, 1 where it rests above 0.7, and 0.8 on a plateau below. ks starts at 0; a batch is a tick.

    Args:
        path: where the coefficient lives, `terms.kl.coef`.
        base: of the threshold, in nats per token.
        gains: kp, ki, kd.
        strength: of the penalty, 0.1 [ks - threshold]_+^2.
        entropy_floor: in nats; below it the penalty is stronger.
        against: name of the reference model.

    Raises:
        ValueError: base, strength or entropy_floor not positive, or gains that are not three.

    Source: "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF", 2026. As released the
    penalty is a plain number added to the loss, without a gradient; as the coefficient of a KL it has one.
    """

    path: str
    base: float = 0.3
    gains: tuple[float, float, float] = (0.3, 0.01, 0.05)
    strength: float = 0.1
    entropy_floor: float = 2.0
    against: str = "ref"

    def __post_init__(self) -> None:
        for name in ("base", "strength", "entropy_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if len(self.gains) != 3:
            raise ValueError(f"gains are kp, ki and kd, not {self.gains}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, and the reference: measured also while the coefficient is 0."""
        return (LogProb(of=("old",)), LogProb(of=(self.against,)))

    def init(self) -> dict[str, Any]:
        """The average KL, the PID's numbers and the last rewards."""
        return {"kl": 0.0, "mean": None, "error": 0.0, "integral": 0.0, "output": 0.0, "rewards": []}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves the mean log-ratio per token in the metrics, where `update` finds it; it may be negative."""
        old, ref = (stats[need] for need in self.needs)
        metrics[METRIC] = float(masked_mean(torch.where(rows.mask, old - ref, torch.zeros_like(old)), rows))
        return state

    def update(self, metrics: dict[str, float], state: dict[str, Any], step: int) -> tuple[dict[str, float], dict]:
        """The coefficient after a batch; 0 before the first."""
        if METRIC not in metrics:
            return {self.path: 0.0}, state
        state = {**state, **self.control(metrics.get("reward", 0.0), state)}
        state["kl"] = 0.9 * state["kl"] + 0.1 * metrics[METRIC]
        state["rewards"] = [*state["rewards"], metrics.get("reward", 0.0)][-2 * WINDOW :]
        excess = max(0.0, state["kl"] - self.threshold(state))
        return {self.path: 2 * self.strength * excess * self.urgency(metrics.get("entropy", math.inf))}, state

    def control(self, reward: float, state: dict[str, Any]) -> dict[str, float]:
        """The PID after a reward; the first one only starts its average."""
        if state["mean"] is None:
            return {"mean": reward}
        kp, ki, kd = self.gains
        mean = 0.95 * state["mean"] + 0.05 * reward
        error = mean - state["mean"] - 0.001
        integral = min(1.0, max(-1.0, state["integral"] + error))
        output = kp * error + ki * integral + kd * (error - state["error"])
        return {"mean": mean, "error": error, "integral": integral, "output": output}

    def threshold(self, state: dict[str, Any]) -> float:
        """KL per token from which on the penalty acts."""
        return min(0.6, max(0.1, (self.base + state["output"]) * PHASES[phase(state["rewards"])]))

    def urgency(self, entropy: float) -> float:
        """Factor of the penalty at an entropy in nats."""
        return max(0.5, self.entropy_floor / (entropy + 0.1))


@part("kl_preview", paper=12)
@dataclass(frozen=True)
class KLPreview:
    """Looks at the policy that an update would make, and takes min(1, limit / KL) of the way.

    KL is the mean over the visited positions of KL(policy || ref) of the next token, over the whole vocabulary: the
    mean log-ratio of the tokens, which need not be the tried policy's, may be negative where the policy is far away.

    Args:
        limit: nats per token.
        against: name of the reference model.

    Raises:
        ValueError: limit not positive.

    Source: "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF", 2026; the release has
    the factor, and its loop never asks for it; which KL is meant is Keel's reading.
    """

    limit: float = 0.5
    against: str = "ref"

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit must be positive, not {self.limit}")

    @property
    def looks_at(self) -> tuple[Functional, ...]:
        """What is measured of the tried policy."""
        return (Divergence("kl_policy_ref", self.against),)

    def init(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def update(self, metrics: dict[str, float], state: dict[str, Any], step: int) -> tuple[dict[str, float], dict]:
        """It owns no value."""
        return {}, state

    def scale_step(self, rows: Rows, stats: Stats) -> float:
        """The share of an update to take, by what it would make of the policy; none where that has no probabilities."""
        found = stats[self.looks_at[0]]
        kl = float(masked_mean(torch.where(rows.mask, found, torch.zeros_like(found)), rows))
        if math.isnan(kl):
            return 0.0
        return min(1.0, self.limit / kl) if kl > 0 else 1.0


def phase(rewards: list[float]) -> str:
    """Where training stands, from the mean rewards of its batches.

    >>> phase([0.5] * 49), phase([0.5] * 50), phase([0.5] * 50 + [0.52] * 50), phase([0.8] * 50)
    ('warm-up', 'plateau', 'climbing', 'converged')
    """
    if len(rewards) < WINDOW:
        return "warm-up"
    last, before = rewards[-WINDOW:], rewards[-2 * WINDOW : -WINDOW]
    mean = math.fsum(last) / WINDOW
    if before and mean - math.fsum(before) / len(before) > 0.01:
        return "climbing"
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in last) / WINDOW)
    return "converged" if spread < 0.02 and mean > 0.7 else "plateau"
