"""How much of a completion's key content was deleted, read off the policy's last state."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from keel.core.aggregate import ratio
from keel.core.errors import MethodError
from keel.core.registry import part
from keel.core.rows import Rows, Stream
from keel.statistics.functionals import Functional, Value
from keel.statistics.stats import Stats

DEGREE = "degree"  # column: the place of a copy's share among those of the term
Deletion = Literal["key", "random"]
Copied = Literal["chosen", "both"]


@part("deletion_degree", paper=68)
@dataclass(frozen=True)
class DeletionDegree:
    """coef * mean of the cross-entropy between a head's classes at the last token and the share that was deleted.

    Each completion brings a copy for every share, of whose n key phrases round(share n) are gone, the same ones first;
    copies that equal one of a smaller share are left out, and so are completions without key phrases. The copies are
    rows of the stream REGULARISER, which no other term reads. The gradient reaches policy and head.

    Args:
        coef: gamma; 0 drops the term, and no copies are made.
        shares: of the key phrases that are deleted, from 0 upwards; one class each.
        head: name of the method's head, a `Classifier` with as many classes.
        deletion: key phrases, or words by chance, as many as there are in these phrases: what length alone tells.
        copied: completions that are chosen, or those of both sides.

    Raises:
        ValueError: shares that do not increase from 0, or reach beyond 1; an unknown deletion or side.

    Source: "Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness",
    2024; there is no public code. The last token's state, the shares and the copied side are a reading.
    """

    coef: float = 0.1
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    head: str = "degree"
    deletion: Deletion = "key"
    copied: Copied = "chosen"
    stream = "regulariser"
    additive = False
    reads = "pairs"

    def __post_init__(self) -> None:
        shares = self.shares
        if len(shares) < 2 or shares[0] != 0 or any(a >= b for a, b in pairwise(shares)):
            raise ValueError(f"shares must increase from 0, not {shares}")
        if shares[-1] > 1:
            raise ValueError(f"shares must not be above 1, not {shares[-1]}")
        for name, value, known in (("deletion", self.deletion, Deletion), ("copied", self.copied, Copied)):
            if value not in get_args(known):
                raise ValueError(f"{name} '{value}' is not one of {', '.join(get_args(known))}")

    @property
    def _logits(self) -> Value:
        return Value(self.head, where="last")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The head at the last token."""
        return (self._logits,)

    @property
    def heads_read(self) -> tuple[str, ...]:
        """The head."""
        return (self.head,)

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        logits = self._read(rows, stats)
        loss = cross_entropy(logits, rows.columns[DEGREE], reduction="none")
        weight = rows.weight.to(loss)
        return self.coef * ratio((weight * loss).sum(), weight.sum())

    def _read(self, rows: Rows, stats: Stats) -> Float[Tensor, "B K"]:
        logits = stats[self._logits]
        if logits.dim() != 2 or logits.shape[1] != len(self.shares):
            found = logits.shape[1] if logits.dim() == 2 else 1
            raise MethodError(
                f"{len(self.shares)} shares and a head of {found} classes",
                f"heads.{self.head}",
                f"Give Classifier({len(self.shares)}).",
            )
        return logits

    @torch.no_grad()
    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """degree/accuracy, of the copies among the rows; nothing where there are none."""
        copies = (rows.stream == int(Stream.REGULARISER)).nonzero().flatten()
        if not len(copies):
            return {}
        right = self._read(rows, stats)[copies].argmax(1) == rows.columns[DEGREE][copies]
        return {"degree/accuracy": right.float().mean()}
