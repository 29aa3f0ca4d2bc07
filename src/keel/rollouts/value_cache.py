"""Entropy steered while decoding: an offset on the last layer's cached values, tuned every few tokens.

    H = -sum_v p_v log p_v,   dV <- dV + lr s dH / d(dV),   m <- g m + (1 - g) H

dV stands on the values of the prompt's positions, one for each row, and s is +1 while the running mean m of the entropy
rises, -1 while it falls, and -1 for good once m has passed its peak. Only the last layer reads these values, so the
gradient goes through that layer, the norm and the head at the current position; everything before is constant.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.errors import UserError
from keel.core.registry import part
from keel.models.language import LanguageModel
from keel.rollouts.caches import Workspace
from keel.rollouts.decoding import Stepper
from keel.rollouts.local import LocalGenerator, evaluating
from keel.rollouts.steppers import CacheStepper


@part("value_tuning", paper=45)
@dataclass(frozen=True)
class ValueTuning:
    """How the cached values are tuned; see the module.

    The authors optimise with Adam and drop the values of low norm from the cache; here a step is a plain gradient step,
    and `keep_share` says which positions have an offset, so that with lr = 0 decoding is what it was.

    Args:
        lr: size of a step.
        every: tokens from one check to the next; the first comes after so many tokens.
        steps: gradient steps at a check.
        decay: g of the running mean; 0 is the entropy itself.
        patience: checks that the mean must stay below its maximum until the peak counts as passed.
        positions: the whole "prompt", or a span (start, stop) of it, counted from its first token.
        keep_share: share of the positions, those whose values have the largest norm, that get an offset.

    Raises:
        ValueError: a setting out of its range.

    Source: "Video Reasoning without Training", 2025, where the span is that of the video.
    """

    lr: float = 1.0
    every: int = 4
    steps: int = 1
    decay: float = 0.9
    patience: int = 4
    positions: Literal["prompt"] | tuple[int, int] = "prompt"
    keep_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise ValueError(f"lr must not be negative, but is {self.lr}")
        for name in ("every", "steps", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share must be in (0, 1], not {self.keep_share}")
        if self.positions != "prompt" and not (len(self.positions) == 2 and 0 <= self.positions[0] < self.positions[1]):
            raise ValueError(f"positions must be 'prompt' or (start, stop) with start < stop, not {self.positions}")


class EntropyTuned(LocalGenerator):
    """Draws completions while the entropy is steered; see the module, and `Generator` for what it promises.

    The behaviour log-probabilities are those under the steered distribution, which is what was sampled.

    Args:
        model: the policy.
        tuning: how.
        batch_rows, compact: see `LocalGenerator`.

    Raises:
        UserError: an architecture without a key-value cache, whose last layer cannot be run by itself, or whose last
            layer forgets the prompt (a sliding window).
    """

    def __init__(
        self,
        model: LanguageModel,
        tuning: ValueTuning = ValueTuning(),
        *,
        batch_rows: int | None = None,
        compact: float = 0.125,
    ):
        super().__init__(model, batch_rows=batch_rows, compact=compact)
        self.tuning = tuning
        if not _reached(model):
            raise UserError(
                f"the last layer of {model.architecture} cannot be run by itself over the whole prompt",
                "EntropyTuned",
                "Use an architecture of the Llama family.",
            )

    def stepper(self, length: int, workspace: Workspace | None = None) -> Stepper:
        """See `LocalGenerator`."""
        return ValueStepper(self.model, self.tuning)


def entropy_gradient(logits: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
    """dH / dz_i = -p_i (log p_i + H).

    >>> entropy_gradient(torch.tensor([1., 0., -1.]))
    tensor([-0.2826,  0.1408,  0.1418])
    """
    log_p = logits.log_softmax(-1)
    return -log_p.exp() * (log_p.clamp(min=torch.finfo(log_p.dtype).min) + entropy(logits)[..., None])


def entropy(logits: Float[Tensor, "*n V"]) -> Float[Tensor, "*n"]:
    """H of softmax(logits), in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


@dataclass(frozen=True)
class Switch:
    """Which way each row's entropy is pushed.

    Args:
        decay: g.
        patience: checks below the maximum after which it counts as the peak.
        mean: m, NaN before the first check, shape [n].
        most: the largest m so far, shape [n].
        below: checks since then, shape [n].
        passed: rows whose peak has passed, shape [n].
    """

    decay: float
    patience: int
    mean: Float[Tensor, "n"]
    most: Float[Tensor, "n"]
    below: Int[Tensor, "n"]
    passed: Bool[Tensor, "n"]

    @staticmethod
    def start(rows: int, decay: float, patience: int, device: torch.device | str = "cpu") -> "Switch":
        """Before the first check."""
        mean = torch.full((rows,), math.nan, device=device)
        below = torch.zeros(rows, dtype=torch.long, device=device)
        return Switch(decay, patience, mean, torch.full_like(mean, -math.inf), below, below > 0)

    def check(self, found: Float[Tensor, "n"]) -> tuple["Switch", Float[Tensor, "n"]]:
        """The switch after another entropy, and the sign for each row: +1 or -1.

        >>> switch = Switch.start(1, decay=0.0, patience=2)
        >>> for h in (1., 2., 1.5, 1.8, 1.9):
        ...     switch, sign = switch.check(torch.tensor([h]))
        ...     print(int(sign), end=" ")
        1 1 -1 -1 -1
        """
        found = found.to(self.mean)
        mean = torch.where(self.mean.isnan(), found, self.decay * self.mean + (1 - self.decay) * found)
        below = torch.where(mean >= self.most, torch.zeros_like(self.below), self.below + 1)
        passed = self.passed | (below >= self.patience)
        down = passed | (mean < self.mean)
        after = replace(self, mean=mean, most=torch.maximum(self.most, mean), below=below, passed=passed)
        return after, torch.where(down, -torch.ones_like(mean), torch.ones_like(mean))

    def keep(self, index: Int[Tensor, "m"]) -> "Switch":
        """These rows."""
        rows = {name: getattr(self, name)[index] for name in ("mean", "most", "below", "passed")}
        return replace(self, **rows)


class ValueStepper(CacheStepper):
    """A stepper that tunes the last layer's cached values as it goes.

    Attributes:
        offset: dV of each row, in fp32 at least, shape [n, K, P, d].
        chosen: where it may differ from 0, shape [n, P].
        values: what the last layer had cached of the prompt, shape [n, K, P, d].
        switch: the sign rule.
    """

    def __init__(self, model: LanguageModel, tuning: ValueTuning):
        super().__init__(model)
        self.tuning = tuning
        self.count = 0

    def expand(self, index: Int[Tensor, "n"]) -> None:
        """See `Stepper`."""
        super().keep(index)
        self.values = self.cache.layers[-1].values
        self.offset = torch.zeros_like(self.values, dtype=torch.promote_types(self.values.dtype, torch.float32))
        self.chosen = chosen_positions(self.mask.bool(), self.values, self.tuning)
        self.switch = Switch.start(len(index), self.tuning.decay, self.tuning.patience, self.values.device)
        self.count = 0

    def keep(self, index: Int[Tensor, "m"]) -> None:
        """See `Stepper`."""
        super().keep(index)
        self.values, self.offset, self.chosen = self.values[index], self.offset[index], self.chosen[index]
        self.switch = self.switch.keep(index)

    def step(self, tokens: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """See `Stepper`."""
        self.count += 1
        if self.count % self.tuning.every:
            return super().step(tokens)
        seen: dict[str, Any] = {}

        def watch(layer: torch.nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
            seen.update(inputs=inputs, options=options)

        handle = self.base.layers[-1].register_forward_pre_hook(watch, with_kwargs=True)
        try:
            super().step(tokens)
        finally:
            handle.remove()
        return self._tuned(seen["inputs"], seen["options"])

    def _tuned(self, inputs: tuple, options: dict[str, Any]) -> Float[Tensor, "n D"]:
        """The current state after the check; what went into the last layer is constant."""
        where = self.chosen[:, None, :, None]
        for i in range(self.tuning.steps):
            offset = self.offset.detach().requires_grad_()
            with torch.enable_grad():
                logits = self._logits(self._states(offset, inputs, options))
            if i == 0:
                self.switch, sign = self.switch.check(entropy(logits.detach()))
            (slope,) = torch.autograd.grad(logits, offset, entropy_gradient(logits.detach()))
            step = self.tuning.lr * sign[:, None, None, None].to(slope) * slope
            self.offset = torch.where(where, self.offset + step, self.offset)
        self.cache.layers[-1].values = self._shifted(self.offset)
        return self._states(self.offset, inputs, options)

    def _states(self, offset: Float[Tensor, "n K P d"], inputs: tuple, options: dict[str, Any]) -> Float[Tensor, "n D"]:
        """The last layer and the norm at the current position, whose key and value are cached already."""
        cache = _Shifted(self.cache, self.cache.layers[-1].keys, self._shifted(offset))
        options = {name: cache if value is self.cache else value for name, value in options.items()}
        found = self.base.layers[-1](*inputs, **options)
        return self.base.norm(found[0] if isinstance(found, tuple) else found)[:, -1]

    def _shifted(self, offset: Float[Tensor, "n K P d"]) -> Float[Tensor, "n K S d"]:
        written = self.cache.layers[-1].values[:, :, self.values.shape[2] :]
        return torch.cat([(self.values + offset).to(written), written], 2)

    def _logits(self, states: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        with torch.autocast(states.device.type, enabled=False):  # the head runs in its own precision
            return self.model.head.logits(self.model.for_head(states))


def chosen_positions(
    mask: Bool[Tensor, "n P"], values: Float[Tensor, "n K P d"], tuning: ValueTuning
) -> Bool[Tensor, "n P"]:
    """Positions of the prompt that get an offset.

    Args:
        mask: 1 on the prompt, which is padded on its left.
        values: cached.
        tuning: `positions` and `keep_share`.
    """
    place = mask.long().cumsum(1) - 1
    chosen = mask
    if tuning.positions != "prompt":
        start, stop = tuning.positions
        chosen = mask & (place >= start) & (place < stop)
    if tuning.keep_share == 1:
        return chosen
    norm = values.float().square().sum((1, 3)).masked_fill(~chosen, -1.0)
    rank = norm.argsort(dim=1, descending=True, stable=True).argsort(1)
    return chosen & (rank < (tuning.keep_share * chosen.sum(1, keepdim=True)).ceil())


class _Shifted:
    """The cache as the last layer sees it: with other values, and with the current token in it already."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor):
        self.cache, self.keys, self.values = cache, keys, values

    def update(self, *new: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _reached(model: LanguageModel) -> bool:
    """Whether the last layer, run by itself, gives the model's state."""
    from transformers import DynamicCache

    base = model.transformer.base_model
    layers = DynamicCache(config=model.transformer.config).layers
    if not (hasattr(base, "layers") and hasattr(base, "norm")) or any(layer.is_sliding for layer in layers[-1:]):
        return False
    ids = (torch.arange(3, device=model.device) % model.vocabulary_size)[None]
    found = []
    for stepper in (CacheStepper(model), ValueStepper(model, ValueTuning(lr=0.0, every=1))):
        with evaluating(model), model.mixed():
            stepper.prefill(ids[:, :2], torch.ones_like(ids[:, :2], dtype=torch.bool), 1)
            stepper.expand(torch.zeros(1, dtype=torch.long, device=model.device))
            found.append(stepper.step(ids[:, 2]).float())
    scale = found[0].abs().max().clamp(min=1e-6)
    coarse = model.autocast is not None or model.transformer.dtype not in (torch.float32, torch.float64)
    return bool((found[0] - found[1]).abs().max() <= (0.1 if coarse else 1e-3) * scale)
