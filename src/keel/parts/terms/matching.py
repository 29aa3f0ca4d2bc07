"""Losses that bring the policy to a target distribution, whatever the target is."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import Groups, ratio, weighted_mean
from keel.core.registry import part
from keel.core.rows import Rows
from keel.divergences.family import FDivergence, f_divergence
from keel.parts.terms.targets import (
    Memory,
    PosteriorTarget,
    Samples,
    Target,
    TiltTarget,
    check_samples,
    of,
    sampler_log_prob,
    sampler_needs,
    sequence,
)
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats

Baseline = Literal["none", "recent", "leave_one_out"]
RECENT = 1024  # pseudo-rewards over which the baseline `recent` is the mean
OF_TARGET = "target."  # prefix of the target's own memory within that of the loss


@part("match_target", paper=3)
@dataclass(frozen=True)
class MatchTarget:
    """D_f(pi || P / Z) of whole sequences, from samples of any q, with an unbiased gradient where Z is known (f-DPG).

        l = sg(log pi) - (log P - log Z),   w = sg(pi / q),   R = -f'(e^l)
        gradient  -mean w (R - b) grad log pi,     value  mean w f(e^l) / e^l

    f is the generator of `keel.divergences.family` with f'(1) = 0. Z is that of the row's prompt: the mean of P / q
    over the row's group, which is exact where the rows are enumerated, together with what earlier batches found for
    the same prompt. Rows that the target does not score, and groups in which no row has mass under it, are left out.

    Args:
        target: P.
        divergence: a name that `f_divergence` reads; kl_policy_ref is KL(pi || p), kl_ref_policy KL(p || pi).
        samples: what drew the rows: the live policy (w = 1), the policy when the batch was prepared, whatever was
            recorded as the behaviour, or the reference.
        baseline: none, the mean of the last 1024 pseudo-rewards R before this batch, or that of the other rows of the
            group (of the whole group where enumerated).
        log_z: log Z where it is known; None estimates it, and takes 0 from a target that is normalised.
        memory: prompts whose Z is remembered; 0 forgets it after each batch.
        cap: bound of log w from above, and of l from both sides; None is off. Rows that it meets are counted in the
            metric `target/capped`.

    Raises:
        ValueError: an unknown name, a negative memory, or a cap that is not positive.

    Source: "Aligning Language Models with Preferences through f-divergence Minimization", 2023.
    """

    target: Target = TiltTarget()
    divergence: str = "js"
    samples: Samples = "old"
    baseline: Baseline = "recent"
    log_z: float | None = None
    memory: int = 4096
    cap: float | None = None
    additive = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", str(f_divergence(self.divergence)))
        check_samples(self.samples)
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"baseline '{self.baseline}' is not one of {', '.join(get_args(Baseline))}")
        if self.memory < 0:
            raise ValueError(f"memory must not be negative, got {self.memory}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap must be positive, not {self.cap}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy, what drew the rows, and what the target reads."""
        return tuple(dict.fromkeys((LogProb(), *sampler_needs(self.samples), *self.target.needs)))

    @property
    def generator(self) -> FDivergence:
        """f."""
        return f_divergence(self.divergence)

    def init(self) -> Memory:
        """Prompts with sum and count of P / q, the last pseudo-rewards, and the target's own memory."""
        return {
            "prompts": torch.zeros(0, dtype=torch.long),
            "log_sum": torch.zeros(0, dtype=torch.float64),
            "count": torch.zeros(0, dtype=torch.float64),
            "recent": torch.zeros(0, dtype=torch.float64),
            **target_memory(self.target),
        }

    def __call__(self, rows: Rows, stats: Stats, state: Memory) -> Float[Tensor, ""]:
        log_p = sequence(stats[LogProb()], rows)
        log_q = sampler_log_prob(self.samples, rows, stats)
        log_u, log_w, used = self._log_ratio(rows, stats, log_p.detach(), log_q, state)
        weight = log_w.exp()
        reward = -self.generator.f_prime(log_u)
        gain = torch.where(used, weight * self._centred(rows, reward, used, state), torch.zeros_like(reward))
        value = torch.where(used, weight * self.generator.f_over_u(log_u), torch.zeros_like(reward))
        surrogate = -gain * log_p
        return weighted_mean(value - surrogate.detach() + surrogate, rows.weight * (rows.main & used))

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: Memory) -> Memory:
        """Remember Z of each prompt and the pseudo-rewards; the target fits what it has to fit.

        The policy is taken as it was when the batch was prepared. Metrics: `target/log_z`, `target/ess` and
        `target/max_weight` (of the self-normalised weights P / q within a group, means over groups), `target/capped`.
        """
        log_q = observed_sampler(self.samples, rows, stats)
        if log_q is None:
            return state
        before = log_q if self.samples != "reference" else _old(rows, stats)
        score = log_score(self.target, rows, stats, state)
        groups = Groups.of(rows, ~score.isnan() & (score > -math.inf))
        describe_weights(groups, score - log_q, metrics)
        new = dict(state)
        if before is not None:
            log_u, _, used = self._log_ratio(rows, stats, before, log_q, state, metrics)
            pseudo = -self.generator.f_prime(log_u[used & rows.main]).double().cpu()
            new["recent"] = torch.cat([state["recent"], pseudo[pseudo.isfinite()]])[-RECENT:]
        settled = getattr(self.target, "settled", None)
        estimated = self.log_z is None and not getattr(self.target, "normalised", False) and not rows.exact
        if estimated and self.memory and (settled is None or settled(of_target(state))):
            new |= self._remembered(rows, score - log_q, state)
        return new | observe_target(self.target, rows, stats, log_q, metrics, state)

    # -- the partition function ----------------------------------------------------------------------------------

    def _log_ratio(
        self,
        rows: Rows,
        stats: Stats,
        log_p: Float[Tensor, "B"],
        log_q: Float[Tensor, "B"],
        state: Memory,
        metrics: dict[str, float] | None = None,
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Bool[Tensor, "B"]]:
        """l and log w, 0 where a row is left out; and the rows that are not."""
        score = log_score(self.target, rows, stats, state).detach()
        log_z = self._log_z(rows, score - log_q, state)
        used = ~score.isnan() & (log_z > -math.inf)
        nothing = torch.zeros_like(log_p)
        log_u = torch.where(used, log_p - torch.where(used, score - log_z, nothing), nothing)
        log_w = nothing if self.samples == "policy" else torch.where(used, log_p - log_q, nothing)
        if self.cap is not None:
            met = rows.main & ((log_u.abs() > self.cap) | (log_w > self.cap))
            if metrics is not None:
                metrics["target/capped"] = float(met.sum())
            log_u, log_w = log_u.clamp(-self.cap, self.cap), log_w.clamp(max=self.cap)
        return log_u, log_w, used

    def _log_z(self, rows: Rows, log_weight: Float[Tensor, "B"], state: Memory) -> Float[Tensor, "B"]:
        """log Z of each row's prompt; -inf where no row has mass."""
        if self.log_z is not None or getattr(self.target, "normalised", False):
            return torch.full_like(log_weight, self.log_z or 0.0)
        groups = Groups.of(rows, ~log_weight.isnan())
        mean = groups.broadcast(log_mean_exp(groups, log_weight))
        if rows.exact or not len(state["prompts"]):
            return mean
        count = groups.broadcast(groups.size())
        known = state["prompts"].to(rows.device) == rows.data_index[:, None]
        place, seen = known.int().argmax(1), known.any(1)
        earlier = torch.where(seen, state["log_sum"].to(mean)[place], -math.inf)
        times = torch.where(seen, state["count"].to(mean)[place], 0.0)
        return torch.logaddexp(mean + count.log(), earlier) - (count + times).log()

    def _remembered(self, rows: Rows, log_weight: Float[Tensor, "B"], state: Memory) -> Memory:
        """Sums and counts with this batch; the prompts seen last come last, and the first ones leave."""
        groups = Groups.of(rows, ~log_weight.isnan())
        size, mean = groups.size(), log_mean_exp(groups, log_weight)
        first = torch.zeros(groups.count, dtype=torch.long, device=rows.device)
        first[groups.index] = rows.data_index
        known = {
            int(prompt): (float(log_sum), float(count))
            for prompt, log_sum, count in zip(state["prompts"], state["log_sum"], state["count"], strict=True)
        }
        for prompt, count, log_mean in zip(first.tolist(), size.tolist(), mean.tolist(), strict=True):
            if count > 0:
                log_sum, times = known.pop(prompt, (-math.inf, 0.0))
                known[prompt] = (float(torch.logaddexp(*_pair(log_sum, log_mean + math.log(count)))), times + count)
        kept = list(known.items())[-self.memory :]
        return {
            "prompts": torch.tensor([prompt for prompt, _ in kept], dtype=torch.long),
            "log_sum": torch.tensor([log_sum for _, (log_sum, _) in kept], dtype=torch.float64),
            "count": torch.tensor([count for _, (_, count) in kept], dtype=torch.float64),
        }

    def _centred(
        self, rows: Rows, reward: Float[Tensor, "B"], used: Bool[Tensor, "B"], state: Memory
    ) -> Float[Tensor, "B"]:
        """R - b."""
        if self.baseline == "none" or (self.baseline == "recent" and not len(state["recent"])):
            return reward
        if self.baseline == "recent":
            return reward - state["recent"].mean().to(reward)
        groups = Groups.of(rows, used)
        centred = reward - groups.broadcast(groups.mean(reward))
        if rows.exact:
            return centred
        size = groups.size()
        return centred * groups.broadcast(ratio(size, (size - 1).clamp(min=0)))


@part("posterior_matching", paper=216)
@dataclass(frozen=True)
class PosteriorMatching:
    """KL between the target and the policy, both normalised over the rows of a group (BRAIn).

        a = softmax(log P - log q),   b = softmax(log pi - log q)   over the group;   mean over groups of KL(a || b)

    Its gradient is -sum (a_i - b_i) grad log pi_i. In a group of two, with all of a on one row and the reference as q,
    it is DPO's loss. It is no unbiased estimate of the gradient of KL(p || pi), but has far less variance than one.

    Args:
        target: P, which need not be normalised.
        samples: what drew the rows; see `MatchTarget`.

    Raises:
        ValueError: an unknown sampler.

    Source: "BRAIn: Bayesian Reward-conditioned Amortized Inference for natural language generation from feedback",
    2024.
    """

    target: Target = PosteriorTarget()
    samples: Samples = "old"
    additive = False

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The policy, what drew the rows, and what the target reads."""
        return tuple(dict.fromkeys((LogProb(), *sampler_needs(self.samples), *self.target.needs)))

    def init(self) -> Memory:
        """The target's memory."""
        return target_memory(self.target)

    def __call__(self, rows: Rows, stats: Stats, state: Memory) -> Float[Tensor, ""]:
        log_p = sequence(stats[LogProb()], rows)
        log_q = sampler_log_prob(self.samples, rows, stats)
        score = log_score(self.target, rows, stats, state).detach()
        groups = Groups.of(rows, ~score.isnan())
        used = groups.weight > 0
        log_a = _log_softmax(groups, torch.where(used, score - log_q, torch.zeros_like(score)))
        log_b = _log_softmax(groups, torch.where(used, log_p - log_q, torch.zeros_like(score)))
        a = torch.where(used, groups.weight * log_a.exp(), torch.zeros_like(score))
        terms = torch.where(a > 0, a * (log_a - log_b), torch.zeros_like(score))
        weight = groups.sum(groups.weight)
        if not rows.exact:  # every prompt counts alike, however many of its rows are scored
            weight = ratio(weight, groups.sum(used.to(weight)))
        return weighted_mean(groups.sum(terms), weight)

    def observe(self, rows: Rows, stats: Stats, metrics: dict[str, float], state: Memory) -> Memory:
        """Metrics as those of `MatchTarget`; the target fits what it has to fit."""
        log_q = observed_sampler(self.samples, rows, stats)
        if log_q is None:
            return state
        score = log_score(self.target, rows, stats, state)
        describe_weights(Groups.of(rows, ~score.isnan() & (score > -math.inf)), score - log_q, metrics)
        return state | observe_target(self.target, rows, stats, log_q, metrics, state)


# -- what the losses share -------------------------------------------------------------------------------------------


def target_memory(target: Target) -> Memory:
    """The initial memory of a target, as part of that of a loss."""
    return {OF_TARGET + key: value for key, value in target.init().items()} if hasattr(target, "init") else {}


def of_target(state: Memory) -> Memory:
    """The target's own part of a loss's memory."""
    return {key.removeprefix(OF_TARGET): value for key, value in state.items() if key.startswith(OF_TARGET)}


def log_score(target: Any, rows: Rows, stats: Stats, state: Memory) -> Float[Tensor, "B"]:
    """log P of each row, from a target with or without memory."""
    return target(rows, stats, of_target(state)) if hasattr(target, "init") else target(rows, stats)


def observe_target(
    target: Any, rows: Rows, stats: Stats, log_q: Tensor, metrics: dict[str, float], state: Memory
) -> Memory:
    """The target's memory after a batch."""
    if not hasattr(target, "observe"):
        return {}
    new = target.observe(rows, of(target.against, rows, stats) - log_q, metrics, of_target(state))
    return {OF_TARGET + key: value for key, value in new.items()}


def observed_sampler(samples: Samples, rows: Rows, stats: Stats) -> Tensor | None:
    """log q when a batch is observed, where the live policy is no longer at hand; None if nothing says it."""
    if samples == "reference":
        return sampler_log_prob(samples, rows, stats)
    return _old(rows, stats) if samples != "behaviour" else sampler_log_prob(samples, rows, stats)


def _old(rows: Rows, stats: Stats) -> Tensor | None:
    """log-probability under the policy that prepared the batch, or as it was recorded."""
    if LogProb(of=("old",)) in stats:
        return of("old", rows, stats)
    return sequence(rows.logp["behaviour"], rows) if "behaviour" in rows.logp else None


def describe_weights(groups: Groups, log_weight: Float[Tensor, "B"], metrics: dict[str, float]) -> None:
    """Effective sample size and largest share of the weights P / q within groups, and log Z, means over groups."""
    used = groups.weight > 0
    share = torch.where(used, _log_softmax(groups, torch.where(used, log_weight, 0.0)).exp() * groups.weight, 0.0)
    filled = groups.sum(groups.weight) > 0
    if not bool(filled.any()):
        return
    metrics["target/ess"] = float(
        ratio(torch.ones_like(filled, dtype=share.dtype), groups.sum(share.square()))[filled].mean()
    )
    metrics["target/max_weight"] = float(groups.range(share)[1][filled].mean())
    metrics["target/log_z"] = float(log_mean_exp(groups, log_weight)[filled].mean())


def log_mean_exp(groups: Groups, values: Float[Tensor, "B"]) -> Float[Tensor, "N"]:
    """log of the weighted mean of exp(values) in each group; -inf without mass."""
    top = groups.range(values)[1]
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    return groups.mean((values - groups.broadcast(top)).exp()).log() + top


def _log_softmax(groups: Groups, values: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """values - log of the weighted sum of exp(values) over the group; differentiable."""
    top = groups.range(values.detach())[1]
    top = groups.broadcast(torch.where(top.isfinite(), top, torch.zeros_like(top)))
    shifted = values - top
    total = groups.sum(torch.where(groups.weight > 0, groups.weight * shifted.exp(), torch.zeros_like(shifted)))
    total = torch.where(total > 0, total, torch.ones_like(total))
    return shifted - groups.broadcast(total.log())


def _pair(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)
