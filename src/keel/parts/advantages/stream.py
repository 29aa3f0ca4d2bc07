"""Advantages from the stream of token rewards, and whitening over tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import returns, token_weight, weighted_mean, weighted_std
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import advantage, broadcast
from keel.statistics.functionals import Functional, Value
from keel.statistics.stats import Stats


def reward_stream(rows: Rows) -> Float[Tensor, "B T"]:
    """Token rewards with the completion's own reward on its last counted token; a row without a reward is all 0."""
    if rows.reward is None or rows.reward.shape[1] != 1:
        raise ValueError("a stream of rewards needs one reward column: add a WeightedSum transform")
    stream = torch.zeros(rows.tokens.shape, device=rows.device) if rows.token_reward is None else rows.token_reward
    positions = torch.arange(rows.tokens.shape[1], device=rows.device)
    last = torch.where(rows.mask, positions, -1).amax(1) if len(positions) else positions.new_zeros(len(rows))
    at_end = rows.mask & (positions == last[:, None])
    stream = torch.where(rows.mask, stream, torch.zeros_like(stream)) + at_end * rows.reward
    return torch.where(rows.reward.isnan(), torch.zeros_like(stream), stream)


def discounted_sum(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], decay: float) -> Float[Tensor, "B T"]:
    """S_t = values_t + decay * S_(next counted position), 0 off the mask; positions off the mask are skipped.

    By doubling: after k rounds an entry holds its first 2^k terms, so log2(T) vector operations suffice.
    """
    order = torch.argsort((~mask).long(), dim=1, stable=True)  # counted positions first, in their order
    total = torch.where(mask, values, torch.zeros_like(values)).gather(1, order)
    step, factor, width = 1, decay, values.shape[1]
    while step < width and factor != 0:
        total = total + factor * torch.nn.functional.pad(total[:, step:], (0, step))
        step, factor = 2 * step, factor * factor
    return torch.zeros_like(values).scatter(1, order, total) * mask


@part("reward_to_go")
@dataclass(frozen=True)
class RewardToGo:
    """A_t = sum over u >= t of gamma^(u - t) r_u, over counted tokens.

    Raises:
        ValueError: gamma outside [0, 1].

    Source: REINFORCE++, 2025.
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], not {self.gamma}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        return rows.with_(advantage=discounted_sum(reward_stream(rows), rows.mask, self.gamma))


@part("whiten")
@dataclass(frozen=True)
class Whiten:
    """(A - mean) / sqrt(var + epsilon) over all counted tokens of the batch.

    Args:
        centre: subtract the mean, too.
        epsilon: added to the variance.

    Source: REINFORCE++, 2025; PPO's advantage whitening.
    """

    centre: bool = True
    epsilon: float = 1e-8

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        value = advantage(rows)
        scored = torch.ones(len(rows), dtype=torch.bool) if rows.reward is None else ~rows.reward.isnan().all(1)
        weight = token_weight(rows) * scored.to(rows.device)[:, None]
        variance = weighted_std(value, weight, rows.exact).square()
        mean = weighted_mean(value, weight) if self.centre else 0.0
        whitened = (value - mean) * (variance + self.epsilon).rsqrt()
        return rows.with_(advantage=torch.where(weight > 0, whitened, torch.zeros_like(whitened)))


@part("running_baseline")
@dataclass(frozen=True)
class RunningBaseline:
    """A = R - b, b the exponential average of the mean return of earlier batches; in the first batch its own mean.

    Args:
        decay: b <- decay * b + (1 - decay) * mean of R.

    Raises:
        ValueError: decay outside [0, 1].
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], not {self.decay}")

    def init(self) -> dict[str, Tensor]:
        """The average, and whether there is one yet."""
        return {"mean": torch.zeros(()), "seen": torch.zeros(())}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Rows:
        value = returns(rows)
        baseline = torch.where(state["seen"] > 0, state["mean"].to(value), self._batch(rows, value))
        return broadcast(rows, value - baseline)

    def observe(self, rows: Rows, stats: Stats, metrics: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The average with this batch taken in."""
        value = returns(rows)
        mean = self._batch(rows, value).cpu()
        blended = self.decay * state["mean"] + (1 - self.decay) * mean
        return {"mean": torch.where(state["seen"] > 0, blended, mean), "seen": torch.ones(())}

    def _batch(self, rows: Rows, value: Tensor) -> Tensor:
        return weighted_mean(value, rows.weight * (rows.main & ~value.isnan()))


@part("gae")
@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation.

        delta_t = r_t + gamma V_(t+1) - V_t,   A_t = delta_t + gamma lam A_(t+1),   V after the end = 0

    over counted tokens. `columns["returns"]` = A + V and `columns["values"]` = V travel to the value loss. A completion
    without a reward has A = 0, so that it teaches the critic nothing either.

    Args:
        gamma, lam: discount and trace decay.
        head: the value head's name.

    Raises:
        ValueError: gamma or lam outside [0, 1].

    Source: "High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016.
    """

    gamma: float = 1.0
    lam: float = 0.95
    head: str = "value"

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {getattr(self, name)}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The value before the update."""
        return (Value(self.head, of=("old",)),)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The value head."""
        return (self.head,)

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        values = stats[Value(self.head, of=("old",))]
        values = torch.where(rows.mask, values, torch.zeros_like(values))
        delta = reward_stream(rows) + self.gamma * next_counted(values, rows.mask) - values
        gain = discounted_sum(delta, rows.mask, self.gamma * self.lam)
        assert rows.reward is not None
        gain = torch.where(rows.reward.isnan(), torch.zeros_like(gain), gain)
        columns = {**rows.columns, "returns": gain + values, "values": values}
        return rows.with_(advantage=gain, columns=columns)


def next_counted(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """At each position the value at the next counted one, 0 after the last."""
    width = values.shape[1]
    positions = torch.arange(width, device=values.device).expand_as(mask)
    place = torch.where(mask, positions, width).flip(1).cummin(1).values.flip(1)
    after = torch.cat([place[:, 1:], place.new_full((len(place), 1), width)], 1)
    padded = torch.cat([values, values.new_zeros(len(values), 1)], 1)
    return padded.gather(1, after)
