"""The weight that makes samples of anything those of one tilt: with it, maximum likelihood learns the tilt."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.curation import scalar_reward
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats


@part("tilt_weight")
@dataclass(frozen=True)
class TiltWeight:
    """u = P / q, over its mean in the group, for the target P = anchor e^(r / beta) and whatever tilt q drew the rows.

        log u = log anchor(y) - log old(y) + r / beta - t

    t is what the rollout's sampler has tilted the policy by already, r / beta' of its own beta' (the column `tilt`),
    and 0 for independent samples. With the advantage A = R and the surrogate A log pi the loss is, for each prompt,

        -sum_i W_i u_i log pi(y_i) / sum_i W_i u_i

    with W the weights of the rows: KL(P || pi) by self-normalised importance sampling, exact where the rows are
    enumerated, with a bias of order 1 / N in groups of N.

    The metrics `target/ess` and `target/max_weight` are those of the weights W u within a group.

    Args:
        beta: of the target.
        anchor: name of a model; "old" is the policy that prepared the batch, so that the target moves with it.

    Raises:
        ValueError: beta not positive; when called, several reward columns, or rows whose law is no tilt of the policy.

    Source: Bornschein and Bengio, "Reweighted Wake-Sleep", 2015; for language models Zhao et al., "Probabilistic
    Inference in Language Models via Twisted Sequential Monte Carlo", 2024.
    """

    beta: float = 0.1
    anchor: str = "ref"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled and the anchor, unless they are one."""
        return () if self.anchor == "old" else (LogProb(of=("old",)), LogProb(of=(self.anchor,)))

    def init(self) -> dict[str, Tensor]:
        """Nothing to remember; the part only reports."""
        return {}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Rows:
        reward = scalar_reward(rows)
        log_u = self._log_ratio(rows, stats, reward)
        groups = Groups.of(rows, ~reward.isnan())
        counted = groups.weight > 0
        log_u = torch.where(counted, log_u, 0.0)
        top = groups.broadcast(groups.range(log_u)[1])
        odds = torch.where(counted, (log_u - top).exp(), 0.0)
        u = ratio(odds, groups.broadcast(groups.mean(odds)))
        return rows.with_(reward=torch.where(reward.isnan(), reward, u.to(reward))[:, None])

    def _log_ratio(self, rows: Rows, stats: Stats, reward: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        log_u = reward.double() / self.beta
        if "tilt" in rows.columns:
            if bool(rows.columns["tilt"][rows.main].isnan().any()):
                raise ValueError("tilt_weight knows no density of what this sampler draws: take smc or another tilt")
            log_u = log_u - rows.columns["tilt"]
        if self.anchor == "old":
            return log_u
        gap = stats[LogProb(of=(self.anchor,))] - stats[LogProb(of=("old",))]
        return log_u + torch.where(rows.mask, gap, torch.zeros_like(gap)).double().sum(1)

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reports the effective number of rows of a group, and the largest share of one, means over groups."""
        u = scalar_reward(rows)
        groups = Groups.of(rows, ~u.isnan())
        mass = torch.where(groups.weight > 0, groups.weight * u, 0.0)
        share = ratio(mass, groups.broadcast(groups.sum(mass)))
        filled = groups.sum(mass) > 0
        if bool(filled.any()):
            metrics["target/ess"] = float((1 / groups.sum(share.square())[filled]).mean())
            metrics["target/max_weight"] = float(groups.range(share)[1][filled].mean())
        return state
