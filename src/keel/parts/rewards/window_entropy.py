"""How much a completion explores, counted in windows of high entropy, and rewarded by the difficulty of its prompt."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio, weighted_mean, weighted_quantile
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.curation import scalar_reward
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats

OLD_ENTROPY = Entropy(of=("old",))
DIFFICULTY = "difficulty"  # column [B]: 0 easy, 1 medium, 2 hard
Three = tuple[float, float, float]


@part("exploration_reward", paper=53)
@dataclass(frozen=True)
class ExplorationReward:
    """Adds to the reward what a prompt of its difficulty asks of the number of high-entropy windows.

    n counts the triggers (tokens of a list, or all) that are followed by `window` tokens with a mean entropy of at
    least `edge`; n* is the rounded mean of n over the batch's completions of the same difficulty. With delta = n - n*,
    m = max(1, margin n*), cap = alpha scale, h(x) = x^2 / (2k) up to k and x - k/2 beyond, s(x) = sigmoid(x / width):

        right, easy      -min(cap, cap h([delta - m]_+) / (m + k))
        right, medium    the same with |delta|
        right, hard      cap s(delta + m) if delta >= -m, else -min(cap, cap h(-delta - m) / 2 / (m + k))
        wrong            .6, .8, 1 (by difficulty) times cap s([delta - m]_+)

    A prompt is easy where at least 2/3 of its group are right, medium from 1/3 on; the column `difficulty` keeps it.
    As s(0) = 1/2, every wrong completion earns something, as in the release.

    Args:
        triggers: token ids after which a window counts; () takes every token.
        window: tokens of a window, those after the trigger.
        edge: entropy in nats; None is the mean, over the first batch with windows, of each completion's 95% quantile.
        alpha: size of the bonus; 0 changes nothing.
        margin, k, width, scale: for easy, medium and hard prompts.
        threshold: reward from which on a completion is right.

    Raises:
        ValueError: window below 1, a negative alpha, or k or width not positive.

    Source: "ARES: Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping", 2025; its edge comes
    from a pass over validation data.
    """

    triggers: tuple[int, ...] = ()
    window: int = 4
    edge: float | None = None
    alpha: float = 0.5
    margin: Three = (0.15, 0.25, 0.35)
    k: Three = (2.0, 3.0, 4.0)
    width: Three = (2.0, 2.5, 3.0)
    scale: Three = (1.0, 1.0, 1.2)
    threshold: float = 0.5
    needs = (OLD_ENTROPY,)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")
        for name in ("k", "width"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def init(self) -> dict[str, Tensor]:
        """The edge; NaN before the first batch."""
        return {"edge": torch.tensor(torch.nan if self.edge is None else self.edge)}

    def __call__(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Rows:
        reward = scalar_reward(rows)
        good = reward >= self.threshold
        groups = Groups.of(rows, ~reward.isnan())
        difficulty = groups.broadcast(difficulty_of(groups.mean(good.to(reward.dtype))))
        count = self.windows(rows, stats, self._edge(rows, stats, state)).to(reward.dtype)
        weight = groups.weight.to(reward.dtype)
        wanted = torch.zeros_like(reward)
        for level in range(3):
            here = difficulty == level
            wanted = torch.where(here, weighted_mean(count, weight * here).round(), wanted)
        bonus = self.bonus(count, wanted, difficulty, good)
        counted = groups.weight > 0
        columns = {**rows.columns, DIFFICULTY: difficulty}
        return rows.with_(reward=torch.where(counted, reward + bonus, reward)[:, None], columns=columns)

    def observe(self, rows: Rows, stats: Stats, metrics: dict, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The edge of the first batch that has windows stays."""
        edge = self._edge(rows, stats, state).cpu()
        return {"edge": edge} if bool(edge.isfinite()) else state

    def bonus(
        self, count: Float[Tensor, "B"], wanted: Float[Tensor, "B"], level: Int[Tensor, "B"], good: Bool[Tensor, "B"]
    ) -> Float[Tensor, "B"]:
        """What is added, given n, n*, the difficulty and who is right."""
        margin, k, width, scale = (count.new_tensor(x)[level] for x in (self.margin, self.k, self.width, self.scale))
        lenient = count.new_tensor((0.6, 0.8, 1.0))[level]
        delta, cap = count - wanted, self.alpha * scale
        margin = (margin * wanted).clamp(min=1)

        def fine(excess: Tensor, share: float = 1.0) -> Tensor:
            return -torch.minimum(cap, share * cap * huber(excess.clamp(min=0), k) / (margin + k))

        hard = torch.where(delta >= -margin, cap * torch.sigmoid((delta + margin) / width), fine(-delta - margin, 0.5))
        right = torch.where(level == 0, fine(delta - margin), torch.where(level == 1, fine(delta.abs() - margin), hard))
        wrong = lenient * cap * torch.sigmoid((delta - margin).clamp(min=0) / width)
        return torch.where(good, right, wrong)

    def windows(self, rows: Rows, stats: Stats, edge: Tensor) -> Int[Tensor, "B"]:
        """n of each row."""
        mean, whole = window_means(stats[OLD_ENTROPY], rows.mask, self.window)
        high = whole & (mean >= edge.to(mean))
        if self.triggers:
            high = high & torch.isin(rows.tokens, rows.tokens.new_tensor(self.triggers))
        return high.sum(1)

    def _edge(self, rows: Rows, stats: Stats, state: dict[str, Tensor]) -> Tensor:
        """The edge that is known, or the batch's: infinite where no completion holds a window."""
        if not bool(state["edge"].isnan()):
            return state["edge"]
        mean, whole = window_means(stats[OLD_ENTROPY].double(), rows.mask, self.window)
        top = torch.stack([weighted_quantile(m, 0.95, w.to(m)) for m, w in zip(mean, whole, strict=True)])
        weight = rows.weight.to(top) * (rows.main & whole.any(1))
        return weighted_mean(top, weight) if bool((weight > 0).any()) else top.new_tensor(torch.inf)


def window_means(
    entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], window: int
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Mean entropy of the `window` chosen tokens after each one, and whether there are so many."""
    order = torch.argsort((~mask).long(), dim=1, stable=True)  # chosen positions first, in their order
    total = torch.where(mask, entropy, torch.zeros_like(entropy)).gather(1, order).double().cumsum(1)
    later = torch.nn.functional.pad(total[:, window:], (0, min(window, total.shape[1])))
    place = torch.arange(mask.shape[1], device=mask.device)
    whole = place + window < mask.sum(1, keepdim=True)
    mean = torch.where(whole, (later - total) / window, torch.zeros_like(total)).to(entropy.dtype)
    back = torch.zeros_like(entropy).scatter(1, order, mean)
    return back, torch.zeros_like(mask).scatter(1, order, whole)


def difficulty_of(accuracy: Float[Tensor, "N"]) -> Int[Tensor, "N"]:
    """0 easy, 1 medium, 2 hard, by the share of right completions."""
    near = 1e-6  # a third of a group, rounded
    return (accuracy + near < 2 / 3).long() + (accuracy + near < 1 / 3).long()


def huber(x: Float[Tensor, "B"], k: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """x^2 / (2k) up to k, x - k/2 beyond, for x >= 0."""
    return torch.where(x <= k, ratio(x.square(), 2 * k), x - k / 2)
