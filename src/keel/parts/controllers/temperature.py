"""Controllers of the temperature at which completions are drawn."""

import math
from dataclasses import dataclass
from typing import Any

from keel.core.registry import part
from keel.core.rows import Rows
from keel.statistics.entropy_score import log_entropies, scale_of
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats
from keel.statistics.temperature import check_switch, switched_temperature

SCALE = "entropy/score/"


@part("temperature_switch", paper=50)
@dataclass(frozen=True)
class TemperatureSwitch:
    """The temperature at `path` is `high` while the policy's entropy is at most `target`, and `low` above it.

    The entropy is that of the batch before, so that it swings about its target by what one batch does. There is none
    before the first batch, which heats.

    Args:
        path: where the temperature lives.
        target: entropy per token, in nats.
        high, low: the temperatures, above and below 1.
        metric: what the entropy is called; `entropy` is that of the rollout's distribution.

    Raises:
        ValueError: a negative target, or temperatures not around 1.

    Source: "Arbitrary Entropy Policy Optimization: Entropy Is Controllable in Reinforcement Fine-tuning", 2025. The
    release estimates the entropy as the mean of -log pi over the tokens of the batch, which is too high on those drawn
    at another temperature; the mean over the whole vocabulary stands here.
    """

    path: str = "rollout.extra.temperature"
    target: float = 0.5
    high: float = 1.2
    low: float = 0.8
    metric: str = "entropy"

    def __post_init__(self) -> None:
        check_switch(self.target, self.high, self.low)

    def init(self) -> dict[str, float]:
        """Nothing to remember: the metric decides."""
        return {}

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The temperature for the next batch."""
        entropy = metrics.get(self.metric, 0.0)
        return {self.path: switched_temperature(entropy, self.target, self.high, self.low)}, state


@part("entropy_scale", paper=112)
@dataclass(frozen=True)
class EntropyScale:
    """Sets the scale of the `AdaptiveTemperature` of the rollout to that of the log-entropies of the batch before.

    It costs a pass over each batch where nothing else reads the entropy of the policy that sampled.

    Args:
        quantile: of the tokens' log-entropies, where the score is 0.
        where: path of the part.

    Raises:
        ValueError: quantile outside [0, 1].

    Source: "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", 2025 (HAPO).
    """

    quantile: float = 0.8
    where: str = "rollout.adaptive"
    needs = (Entropy(of=("old",)),)

    def __post_init__(self) -> None:
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], not {self.quantile}")

    @property
    def owns(self) -> tuple[str, ...]:
        """The three numbers of the scale."""
        return tuple(f"{self.where}.{name}" for name in ("pivot", "high", "low"))

    def init(self) -> dict[str, float]:
        """Nothing to remember: the metrics of the batch before do."""
        return {}

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: dict[str, Any]) -> dict[str, Any]:
        """Leaves the scale of the batch in the metrics, where `update` finds it."""
        scale = scale_of(log_entropies(stats[self.needs[0]], rows), rows, self.quantile)
        found = {f"{SCALE}{name}": float(value) for name, value in scale._asdict().items()}
        metrics.update({name: value for name, value in found.items() if math.isfinite(value)})
        return state

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The scale, once there is one."""
        found = {name: metrics[SCALE + name] for name in ("pivot", "high", "low") if SCALE + name in metrics}
        return {f"{self.where}.{name}": value for name, value in found.items()}, state
