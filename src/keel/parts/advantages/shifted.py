"""Advantages that pull towards the policy at another temperature, so that its entropy goes where it should."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import masked_mean, ratio, returns, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats
from keel.statistics.temperature import check_switch, switched_temperature
from keel.statistics.transforms import Temperature

OLD = LogProb(of=("old",))
LIMIT = 20.0  # log-ratios beyond it are cut before exp


@part("temperature_shift", paper=197)
@dataclass(frozen=True)
class TemperatureShift:
    """(1 - alpha) A + alpha [R > threshold] kappa,   kappa = old_T(y_t) / old(y_t).

        T = high while the entropy H is at most the target, low above it
        alpha = a / (a + 1),   a = min(|target - H|, cap) / (share of rows with R > threshold);   0 without any

    The added term is REINFORCE on the good completions as if each token had been drawn at temperature T. Tokens of the
    shifted policy are rarer or commoner ones, which moves the entropy to the target, without any gradient of an
    entropy. H is -log old, averaged over the tokens of the batch.

    Args:
        target: entropy per token, in nats.
        high, low: the temperatures, above and below 1.
        cap: of the distance to the target; 0 leaves the advantage as it is.
        threshold: return above which a completion is good.
        largest: bound of kappa, which a very unlikely token would pass.

    Raises:
        ValueError: a negative target or cap, temperatures not around 1, or a bound below 1.

    Source: "Distribution-Centric Policy Optimization Dominates Exploration-Exploitation Trade-off", 2026. The release
    takes H of the update before, and heats in the first step whatever its H; the bound is Keel's.
    """

    target: float = 0.5
    high: float = 1.2
    low: float = 0.8
    cap: float = 0.1
    threshold: float = 0.05
    largest: float = 10.0

    def __post_init__(self) -> None:
        check_switch(self.target, self.high, self.low)
        if self.cap < 0:
            raise ValueError(f"cap must not be negative, got {self.cap}")
        if self.largest < 1:
            raise ValueError(f"largest must be at least 1, not {self.largest}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy that sampled, as it is and at both temperatures."""
        return (OLD, self.at(self.high), self.at(self.low))

    def at(self, temperature: float) -> LogProb:
        """log old at a temperature."""
        return LogProb(of=("old",), transform=Temperature(temperature))

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        credit, value = advantage(rows), returns(rows)
        entropy = float(masked_mean(-stats[OLD], rows))
        good = value > self.threshold
        share = weighted_mean(good.to(value.dtype), rows.weight.to(value.dtype) * (rows.main & ~value.isnan()))
        pull = ratio(share.new_tensor(min(abs(self.target - entropy), self.cap)), share)
        alpha = pull / (pull + 1)
        shifted = stats[self.at(switched_temperature(entropy, self.target, self.high, self.low))]
        kappa = self.ratios(shifted.to(credit.dtype), stats[OLD].to(credit.dtype), rows)
        mixed = (1 - alpha) * credit + alpha * good[:, None] * kappa
        return rows.with_(advantage=torch.where(value.isnan()[:, None], credit, mixed))

    def ratios(self, shifted: Float[Tensor, "B T"], old: Float[Tensor, "B T"], rows: Rows) -> Float[Tensor, "B T"]:
        """kappa, 0 off the mask."""
        gap = torch.where(rows.mask, shifted - old, torch.zeros_like(old)).clamp(-LIMIT, LIMIT)
        return gap.exp().clamp(max=self.largest) * rows.mask
