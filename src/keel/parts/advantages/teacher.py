"""Advantages that a teacher gives each token: on-policy distillation as a policy gradient without any reward."""

from dataclasses import dataclass

import torch

from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.stream import discounted_sum
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

OLD = LogProb(of=("old",))


@part("teacher_advantage", paper=41)
@dataclass(frozen=True)
class TeacherAdvantage:
    """A_t = sum_{s >= t} gamma^(s - t) a_s,   a = lam (log teacher - log base) - (log old - log base).

    The reward log teacher - log base, lam times, against the KL to the base: the optimum is base^(1 - lam) teacher^lam,
    normalised, at lam = 1 the teacher whatever the base, beyond it an extrapolation past the teacher.

    With gamma = 0 a token answers for itself alone, and the gradient is that of the KL to the optimum of each visited
    state, the visits held fixed. With gamma = 1 it is that of the KL of whole sequences.

    Args:
        lam: 1 does not read the base.
        gamma: discount of what comes later.
        own: False leaves out a_t itself, for a loss that has it exactly.
        mean: divide by the number of tokens that the sum counts, so that early tokens do not weigh more.
        teacher, base: names of the models.

    Raises:
        ValueError: gamma outside [0, 1], or a negative lam.

    Source: "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation", 2026 (gamma = 0);
    "MiniLLM: Knowledge Distillation of Large Language Models", 2024 (gamma = 1, the mean without the token itself).
    """

    lam: float = 1.0
    gamma: float = 0.0
    own: bool = True
    mean: bool = False
    teacher: str = "teacher"
    base: str = "ref"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], not {self.gamma}")
        if self.lam < 0:
            raise ValueError(f"lam must not be negative, got {self.lam}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The sampler, the teacher, and the base where it counts."""
        base = () if self.lam == 1 else (LogProb(of=(self.base,)),)
        return (OLD, LogProb(of=(self.teacher,)), *base)

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        old, teacher = stats[OLD], stats[LogProb(of=(self.teacher,))]
        if self.lam == 1:
            gain = teacher - old
        else:
            base = stats[LogProb(of=(self.base,))]
            gain = self.lam * (teacher - base) - (old - base)
        gain = torch.where(rows.mask, gain, torch.zeros_like(gain)).detach()
        if self.gamma == 0:
            return rows.with_(advantage=gain if self.own else torch.zeros_like(gain))
        total = discounted_sum(gain, rows.mask, self.gamma)
        if not self.own:
            total = total - gain
        if self.mean:
            count = discounted_sum(rows.mask.to(gain), rows.mask, self.gamma) - (0.0 if self.own else 1.0)
            total = total / count.clamp(min=1.0)
        return rows.with_(advantage=torch.where(rows.mask, total, torch.zeros_like(total)))
