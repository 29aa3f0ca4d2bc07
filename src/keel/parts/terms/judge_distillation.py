"""The loss of a judge that learns with a reference, and teaches itself to do without one.

    L = CE_T + a CE_S + b KL( sg[p_T] || p_S )

T is the judge with the reference in its prompt, S without; both write the same answer. `rows.pairs` say who is who: the
chosen row is T's, the rejected one S's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.pairs import pairs_of
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.positions import Positions
from keel.statistics.stats import Stats, slots_of

DISTIL = "distil"  # mask: the answer without its end token


@dataclass(frozen=True)
class WholeLogProbs:
    """log pi of every token of the vocabulary at the positions of a named mask alone, packed as [n, V].

    The gradient of the logits is that of a log-softmax, by autograd. Numbers and gradients exist for these positions
    only, such as those of a judge's digit.

    Raises:
        ValueError: all tokens are asked for.
    """

    of: tuple[str, ...] = ("policy",)
    where: str = DISTIL
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.where in ("mask", "last"):
            raise ValueError("whole distributions are measured at a named mask of few positions")

    @property
    def name(self) -> str:
        return f"whole_log_probs({self.of[0]})"

    def __call__(self, at: Positions) -> Float[Tensor, "n V"]:
        return at.log_probs(self.of[0])


@part("judge_distillation", paper=179)
@dataclass(frozen=True)
class JudgeDistillation:
    """CE_T + student * CE_S + distil * KL( sg[p_T] || p_S ) over pairs of rows, each a mean over its tokens.

    CE counts every token of an answer, its end included; the KL is over the whole vocabulary at the tokens of the mask
    `distil`, which the k-th of T's shares with the k-th of S's, wherever their prompts end. It does not reach T.

    Args:
        student: a, of the cross-entropy without a reference.
        distil: b, of the KL.
        coef: of the whole; 0 drops the term.

    Returns:
        A number; 0 without any pair.

    Raises:
        ValueError: a negative coefficient.
        MethodError: rows without pairs.

    Source: "Self-Judge: Selective Instruction Following with Alignment Self-Evaluation", 2024; nusnlp/Self-J.
    """

    student: float = 0.3
    distil: float = 2.0
    coef: float = 1.0
    additive = False
    twin = "prompt_without_reference"  # column of the data with the other prompt

    def __post_init__(self) -> None:
        for name in ("student", "distil"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The log-probability of the answer; and whole distributions, where they are compared."""
        return (LogProb(), WholeLogProbs()) if self.distil else (LogProb(),)

    def parts(self, rows: Rows, stats: Stats) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        """CE_T, CE_S and the KL."""
        pairs = pairs_of(rows)
        losses = []
        for index in (pairs.chosen, pairs.rejected):
            weight = rows.mask[index] * pairs.measure.to(stats[LogProb()])[:, None]
            found = stats[LogProb()][index]
            losses.append(-ratio((weight * torch.where(rows.mask[index], found, 0.0 * found)).sum(), weight.sum()))
        if not self.distil:
            return losses[0], losses[1], torch.zeros_like(losses[0])
        mask = rows.masks[DISTIL] & rows.mask
        place = torch.where(mask, torch.arange(1, mask.shape[1] + 1, device=mask.device), 0)  # from 1; 0 is nowhere
        teacher, student = _aligned(place[pairs.chosen]), _aligned(place[pairs.rejected])
        both = (teacher > 0) & (student > 0)
        pair = both.nonzero()[:, 0]
        found, slots = stats[WholeLogProbs()], slots_of(rows.masks[DISTIL])
        first = found[slots[pairs.chosen[pair], teacher[both] - 1]].detach()
        second = found[slots[pairs.rejected[pair], student[both] - 1]]
        p = first.exp()
        gap = torch.where(p > 0, p * (first - second), torch.zeros_like(p)).sum(1)
        weight = pairs.measure[:, None].expand(both.shape)[both].to(gap)
        return losses[0], losses[1], ratio((weight * gap).sum(), weight.sum())

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        teacher, student, kl = self.parts(rows, stats)
        return self.coef * (teacher + self.student * student + self.distil * kl)

    @torch.no_grad()
    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """The three summands without their coefficients."""
        names = ("judge/with_reference", "judge/without_reference", "judge/kl")
        return dict(zip(names, self.parts(rows, stats), strict=True))


def _aligned(place: Tensor) -> Tensor:
    """The entries above 0 of each row, in their order, at its beginning."""
    order = torch.argsort((place == 0).long(), dim=1, stable=True)
    return place.gather(1, order)
