"""Penalties that make the policy cover what a reference would do: forward divergences on samples that have a weight."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Aggregation, Groups, scalar_reward
from keel.core.registry import part
from keel.core.rows import Rows, Stream
from keel.divergences.family import f_divergence
from keel.divergences.sampled import sampled, term
from keel.parts.terms.surrogate import LIMIT
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats


@part("reweighted_reference", paper=17)
@dataclass(frozen=True)
class ReweightedReference:
    """Cross-entropy of the policy with a reference that prefers good completions: the pull of KL(ref~ || policy).

        ref~(y) = ref(y) e^(phi r(y)) / Z,   P_t = -sg(weight) log pi(y_t)

        token       weight = u min(ref / old, cap) of the token,   u = e^(phi r) / mean over the group
        sequence    weight = e^(phi r) min(ref / old, cap) of the row, over its mean in the group

    What the reference cannot write costs nothing. At level "sequence", under `Aggregation("sequence_mean_token_sum")`,
    the gradient on all completions is that of KL(ref~ || policy). At level "token" and phi 0 it is that of
    KL(ref || policy) per state, which k3 in the loss has, too; with phi above 0 every token of a completion takes the
    weight that the whole of it has earned.

    Args:
        phi: how much the reward counts; 0 is the reference as it is.
        cap: the largest ratio ref / old; None is no cap.
        level: of that ratio; whole sequences need few tokens, for their ratios degenerate.
        against: name of the reference model.

    Raises:
        ValueError: a negative phi, a cap that is not positive, or several reward columns.

    Source: "Unlocking Reasoning Capabilities in LLMs via Reinforcement Learning Exploration", 2025 (RAPO), arXiv
    2510.03865; the weights and constants are reconstructed, no code of the authors was found.
    """

    phi: float = 1.0
    cap: float | None = 5.0
    level: Literal["token", "sequence"] = "token"
    against: str = "ref"
    additive = False

    def __post_init__(self) -> None:
        if self.phi < 0:
            raise ValueError(f"phi must not be negative, got {self.phi}")
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"cap must be positive, not {self.cap}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy, the one that sampled, and the reference."""
        return (LogProb(), LogProb(of=("old",)), LogProb(of=(self.against,)))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        live, old, ref = (stats[need] for need in self.needs)
        gap = torch.where(rows.mask, ref - old, torch.zeros_like(live)).detach()
        reward = scalar_reward(rows).to(gap.dtype)
        groups = Groups.of(rows, ~reward.isnan())
        scored = groups.weight > 0
        worth = torch.where(scored, reward, -torch.inf)
        best = groups.broadcast(groups.range(worth)[1])
        preferred = torch.where(scored, (self.phi * (reward - best)).exp(), torch.zeros_like(gap[:, 0]))
        if self.level == "sequence":
            preferred = preferred * self._capped(gap.sum(1))
        mean = groups.broadcast(groups.mean(preferred))
        share = torch.where(mean > 0, preferred / mean, torch.zeros_like(preferred))[:, None]
        weight = share if self.level == "sequence" else share * self._capped(gap)
        return -weight * live

    def _capped(self, log_ratio: Tensor) -> Tensor:
        ratio = log_ratio.clamp(max=LIMIT).exp()
        return ratio if self.cap is None else ratio.clamp(max=self.cap)


@part("rehearsal_divergence", paper=21)
@dataclass(frozen=True)
class RehearsalDivergence:
    """coef D(policy || stored) on rows that an earlier policy drew, which travel in the stream REGULARISER.

        coef Agg[f(u)] over these rows,   u = pi(y_t) / stored(y_t),   log stored in logp["stored"]

    f is in standard form, f(1) = f'(1) = 0, so that nothing is lost, and nothing moves, while the policy is the one
    that drew them. No reference runs. Summed over tokens only the KLs are those of whole sequences; and rows that were
    filtered to correct ones speak of the earlier policy given that it was right.

    Args:
        coef: eta; 0.01 to 0.05 in the paper, 0.05 to 0.2 for js.
        divergence: an f-divergence by name, policy first: kl_ref_policy covers what was stored. The paper's js is
            `2*js`, its alpha a is `alpha:` 1 - a, 0.8 for its 0.2.
        aggregation: of their tokens; the mean is the paper's, a mean of sums over sequences that of the objective.

    Raises:
        ValueError: a negative coef, an unknown divergence, or rows of the stream without `logp["stored"]`.

    Source: "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in RLVR", 2025 (DPH-RL). log u
    is cut at +-20 in f and f', while the gradient of the token stays.
    """

    coef: float = 0.02
    divergence: str = "kl_ref_policy"
    aggregation: Aggregation = Aggregation("token_mean")
    needs = (LogProb(),)
    additive = False
    stream = "regulariser"
    reads_stored = True

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"coef must not be negative, got {self.coef}")
        object.__setattr__(self, "divergence", str(f_divergence(self.divergence)))

    def __call__(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        live, stored = stats[LogProb()], rows.stream == int(Stream.REGULARISER)
        if not bool(stored.any()):
            return live.new_zeros(())
        if "stored" not in rows.logp:
            raise ValueError("stored rows need their log-probabilities, logp['stored']")
        gap = (live.detach() - rows.logp["stored"].to(live)).clamp(-LIMIT, LIMIT)
        gap = torch.where(stored[:, None] & rows.mask, gap, torch.zeros_like(gap))
        values = term(*sampled(f_divergence(self.divergence), "reference", live, live.detach() - gap))
        turned = torch.where(stored, int(Stream.MAIN), int(Stream.REGULARISER))
        return self.coef * self.aggregation(values, rows.with_(stream=turned, totals=None))
