"""Distribution transforms: one kind of thing for samplers, targets and functionals.

A transform maps logits [n, V] to logits [n, V], -inf on removed tokens. It is a positive scale (`Temperature`,
`Power`), or a filter that keeps a set of tokens (`KeepTopK`, `KeepTopP`, `KeepMinP`); the kept set carries no gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Transform(Protocol):
    """Frozen, hashable, with a canonical name."""

    @property
    def scale(self) -> float:
        """Factor on the logits, 1 for a filter."""
        ...

    @property
    def name(self) -> str:
        """The canonical name, `top_p=0.9`."""
        ...

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Transformed logits, -inf on removed tokens."""
        ...


@dataclass(frozen=True)
class Temperature:
    """z / temperature.

    Raises:
        ValueError: temperature is not positive.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return 1 / self.temperature

    @property
    def name(self) -> str:
        return f"temperature={self.temperature:g}"

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        return logits / self.temperature


@dataclass(frozen=True)
class Power:
    """p^exponent, renormalised: exponent * z.

    Raises:
        ValueError: exponent is not positive.
    """

    exponent: float

    def __post_init__(self) -> None:
        if not self.exponent > 0:
            raise ValueError(f"exponent must be positive, not {self.exponent}")

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return self.exponent

    @property
    def name(self) -> str:
        return f"power={self.exponent:g}"

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        return logits * self.exponent


@dataclass(frozen=True)
class KeepTopK:
    """The k likeliest tokens; ties at the edge are all kept.

    Raises:
        ValueError: k below 1.
    """

    k: int
    scale = 1.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.k}")

    @property
    def name(self) -> str:
        return f"top_k={self.k}"

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        if self.k >= logits.shape[-1]:
            return logits
        edge = logits.detach().topk(self.k, dim=-1).values[..., -1:]
        return logits.masked_fill(logits < edge, float("-inf"))


@dataclass(frozen=True)
class KeepMinP:
    """Tokens with probability at least p times that of the likeliest: z >= max z + log p.

    Raises:
        ValueError: p outside [0, 1].
    """

    p: float
    scale = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"min_p must be in [0, 1], not {self.p}")

    @property
    def name(self) -> str:
        return f"min_p={self.p:g}"

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        if self.p == 0:
            return logits
        edge = logits.detach().amax(-1, keepdim=True) + torch.tensor(self.p, dtype=torch.float64).log().item()
        return logits.masked_fill(logits < edge, float("-inf"))


@dataclass(frozen=True)
class KeepTopP:
    """The smallest set {v: p_v >= c} that holds at least probability p; ties at the edge are all kept.

    The edge c is found by bisection on the logits, not by a sort, which costs ten times as much on a large vocabulary.

    Raises:
        ValueError: p outside (0, 1].
    """

    p: float
    scale = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.p}")

    @property
    def name(self) -> str:
        return f"top_p={self.p:g}"

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        if self.p >= 1:
            return logits
        probs = logits.detach().softmax(-1).float()
        return logits.masked_fill(probs < nucleus_edge(probs, self.p), float("-inf"))


def nucleus_edge(probs: Float[Tensor, "n V"], p: float) -> Float[Tensor, "n 1"]:
    """The largest c with sum of {p_v >= c} at least p, by bisection; it is itself one of the probabilities.

    Works on the bit patterns of fp32, in whose order positive numbers are integers, so 31 halvings are exact.
    """
    probs = probs.float()
    bits = probs.contiguous().view(torch.int32)
    low = torch.zeros_like(bits[..., :1])
    high = bits.amax(-1, keepdim=True)
    goal = p * probs.sum(-1, keepdim=True) * (1 - 1e-6)
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = (probs * (bits >= middle)).sum(-1, keepdim=True) >= goal
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
        if bool((low >= high).all()):
            break
    return low.view(torch.float32)


@dataclass(frozen=True)
class Chain:
    """Several transforms, one after the other."""

    steps: tuple[Transform, ...]

    @property
    def scale(self) -> float:
        """Product of the factors."""
        product = 1.0
        for step in self.steps:
            product *= step.scale
        return product

    @property
    def name(self) -> str:
        return ",".join(step.name for step in self.steps)

    def __call__(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        for step in self.steps:
            logits = step(logits)
        return logits


def chain(steps: Sequence[Transform]) -> Transform | None:
    """One transform of several; None of none."""
    if len(steps) == 1:
        return steps[0]
    return Chain(tuple(steps)) if steps else None


def filters(top_k: int | None = None, top_p: float | None = None, min_p: float | None = None) -> Transform | None:
    """The filters of a sampler in the order of transformers: top-k, top-p, min-p; neutral values are left out."""
    steps: list[Transform] = []
    if top_k:
        steps.append(KeepTopK(top_k))
    if top_p is not None and top_p < 1:
        steps.append(KeepTopP(top_p))
    if min_p:
        steps.append(KeepMinP(min_p))
    return chain(steps)
