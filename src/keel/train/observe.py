"""Metrics, under the field's names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import Groups, masked_mean, ratio, token_weight, weighted_mean, weighted_std
from keel.core.config import get_path
from keel.core.rows import Rows, Stop
from keel.divergences.estimators import estimate
from keel.parts.replay.streams import Selection, split
from keel.parts.rewards.transforms import summed
from keel.statistics.functionals import Divergence, Entropy, LogProb
from keel.statistics.stats import Stats
from keel.statistics.transforms import Temperature, chain
from keel.store.records import StoredRollout
from keel.tasks.environment import Ended
from keel.train.encode import token_texts
from keel.train.symptoms import entropy_by_part, sampler_ratio, term_strength

GROUPS_STORED = 2
HIDDEN = "hidden/"  # prefix of the columns of functions that are measured only: no part looks for it


def rollout_metrics(rows: Rows, rewards: Mapping[str, Any], transforms: Mapping[str, Any]) -> dict[str, float]:
    """What can be said of a scored batch before any model looks at it."""
    main = rows.select(rows.main)
    total = summed(main, transforms)
    assert main.reward is not None
    scored = ~main.reward.isnan().all(1)
    weight = main.weight * scored
    groups = Groups.of(main, scored)
    out = {
        "reward": weighted_mean(total, weight),
        "reward_std": weighted_std(total, weight),
        "frac_reward_zero_std": groups.tied(total).float().mean(),
        "completions/mean_length": weighted_mean(main.lengths.float(), main.weight),
        "completions/clipped_ratio": weighted_mean((main.stop == int(Stop.LENGTH)).float(), main.weight),
        "num_rows": torch.tensor(float(len(main))),
    }
    for k, name in enumerate(rewards):
        applies = main.weight * ~main.reward[:, k].isnan()
        out[f"rewards/{name}/mean"] = weighted_mean(main.reward[:, k], applies)
    for name, column in main.columns.items():
        if name.startswith(HIDDEN):
            out[f"rewards/{name.removeprefix(HIDDEN)}/mean"] = weighted_mean(column, main.weight * ~column.isnan())
        if name.startswith("rollout/") and bool((known := column.isfinite()).any()):  # what a sampler says of itself
            out[name] = weighted_mean(column, known.to(column))
    if "num_turns" in main.columns:
        out["turns/mean"] = weighted_mean(main.columns["num_turns"].float(), main.weight)
        for reason in Ended:
            share = (main.columns["ended"] == int(reason)).float()
            out[f"turns/ended/{reason.name.lower()}"] = weighted_mean(share, main.weight)
    return {name: float(value) for name, value in out.items()}


@torch.no_grad()
def update_metrics(session: Any, rows: Rows, stats: Stats) -> dict[str, float]:
    """What the first update of a batch saw: entropy, KL, clipping, the sampler's gap, each part of the loss."""
    method = session.method
    out = {f"terms/{name}": v for name, v in method.contributions(rows, stats, session.states).items()}
    out |= {f"rehearsal/{name}": out[f"terms/{name}"] / coef for name, coef in method.regularisers.items()}
    if method.replayed is not None:
        out |= method.replayed.metrics(rows, stats)
    strength = term_strength(method, rows, stats, session.states)
    beside = split(rows, stats)[2]
    if not bool(rows.fresh.all()):  # what follows is of this batch
        index = rows.fresh.nonzero().flatten()
        rows, stats = rows.select(index), stats.select(index)
    if Entropy() in stats:
        out["entropy"] = masked_mean(stats[Entropy()], rows)
        out |= entropy_by_part(rows, stats[Entropy()])
    out |= kl_metrics(rows, stats)
    if method.surrogate is not None:
        out |= method.surrogate.metrics(rows, stats)
    for item in (term for term in method.terms.values() if getattr(term, "coef", 1.0) != 0):
        reads = (rows, stats, (beside.rows, beside.stats)) if reads_beside(item, beside) else (rows, stats)
        if getattr(item, "stream", "main") == "regulariser":
            reads = (beside.rows, beside.stats)
        out |= item.metrics(*reads) if hasattr(item, "metrics") else {}
    if "behaviour" in rows.logp and LogProb() in stats:
        own = at_rollout_temperature(rows, method)
        sampled = [stats[f] for f in sampled_log_probs(method)]
        out |= sampler_metrics(rows, stats[LogProb()], torch.where(own[:, None], sampled[0], sampled[-1]), own)
        out |= sampler_ratio(rows, stats[LogProb()], own)
    return {name: float(value) for name, value in out.items()} | strength


def reads_beside(item: Any, beside: Selection) -> bool:
    """Whether a term reads prompts with other prompts' completions, and there are some."""
    return getattr(item, "reads_mismatched", False) and len(beside.rows) > 0


def kl_metrics(rows: Rows, stats: Stats) -> dict[str, Tensor]:
    """Mean over tokens of what `kl_by_token` says."""
    return {name: masked_mean(value, rows) for name, value in kl_by_token(rows, stats).items()}


def kl_by_token(rows: Rows, stats: Stats) -> dict[str, Tensor]:
    """KL to the reference at each token: exact over the vocabulary where measured, else k3 of the sampled token."""
    for functional in stats:
        if isinstance(functional, Divergence) and functional.against == "ref":
            name = "kl" if functional.kind == "kl_policy_ref" else f"divergence/{functional.kind}"
            found = {name: stats[functional]}
            break
    else:
        found = {}
    ref = LogProb(of=("ref",))
    if "kl" not in found and ref in stats:
        live = stats.get(LogProb(), stats.get(LogProb(of=("old",))))
        if live is not None:
            found["kl"] = estimate("k3", live - stats[ref])
    return found


def sampled_log_probs(method: Any) -> tuple[LogProb, ...]:
    """The trainer's log-probability under the distribution that was sampled, filters included; of candidates second."""
    if method.rollout is None:
        return (LogProb(),)
    own, extra = method.rollout.sampling.filter, method.rollout.extra
    if extra is None:
        return (LogProb(transform=own),)
    heat = Temperature(extra.temperature / method.rollout.temperature)
    return LogProb(transform=own), LogProb(transform=chain([heat] if own is None else [heat, own]))


def at_rollout_temperature(rows: Rows, method: Any) -> Tensor:
    """Rows that were no candidates at another temperature, [B]."""
    if method.rollout is None or "temperature" not in rows.columns:
        return torch.ones_like(rows.main)
    heat = rows.columns["temperature"]
    return torch.isclose(heat, torch.full_like(heat, method.rollout.temperature))


def sampler_metrics(rows: Rows, log_prob: Tensor, sampled: Tensor, own: Tensor) -> dict[str, Tensor]:
    """How far sampler and trainer are apart, before the first update of a batch.

    Args:
        rows: with `logp["behaviour"]`.
        log_prob: of the trainer, unfiltered; it gives the effective share of importance weights.
        sampled: of the trainer, with the sampler's temperature and filters; it should equal the behaviour's.
        own: rows at the rollout's temperature, [B]. Others are meant to be off the policy, and do not count in the
            effective share.
    """
    behaviour, nothing = rows.logp["behaviour"], torch.zeros_like(log_prob)
    gap = torch.where(rows.mask, sampled - behaviour, nothing)
    ratios = torch.where(rows.mask, log_prob - behaviour, nothing).clamp(-20, 20).exp()
    weight = token_weight(rows) * own[:, None]
    first, second = (weight * ratios).sum(), (weight * ratios.square()).sum()
    return {
        "rollout/logp_gap": masked_mean(gap.abs(), rows),
        "rollout/ess": ratio(first.square(), second * weight.sum()),
    }


def batch_metrics(session: Any) -> dict[str, float]:
    """Where the run stands, and the values that controllers have set."""
    out = {"num_tokens": float(session.position.tokens)}
    for _, path in session.method.owned():
        value = get_path(session.method, path)
        for k, number in enumerate(value if isinstance(value, tuple) else (value,)):
            if number is not None:
                out[f"controllers/{path}{f'/{k}' if isinstance(value, tuple) else ''}"] = float(number)
    return out


def stored_rollouts(
    session: Any,
    rows: Rows,
    texts: Sequence[tuple[Any, str]],
    seen: tuple[Tensor, Stats] | None,
    by_token: Mapping[str, Tensor] | None = None,
) -> list[StoredRollout]:
    """The completions of the first groups of a batch, with what is known of each token.

    Args:
        seen: the rows of the first update, and its statistics.
        by_token: what it did to each of their tokens, [rows of the update, T].
    """
    known = rows.select(rows.fresh if seen is None else seen[0][rows.fresh[seen[0]]].to(rows.device)).group
    kept = torch.isin(rows.group, known.unique()[:GROUPS_STORED]).nonzero().flatten()
    numbers = {name: value[kept].cpu() for name, value in _by_token(rows, seen, by_token or {}).items()}
    chosen, present = rows.mask[kept].cpu(), rows.present[kept].cpu()
    out = []
    for place, i in enumerate(kept.tolist()):
        mask, shown = chosen[place], present[place]
        prompt, completion = texts[i]
        earned = [] if rows.reward is None else rows.reward[i].tolist()
        compared = [float(rows.columns["score"][i])] if rows.reward is None and "score" in rows.columns else []
        ids = rows.tokens[i].cpu()[shown].tolist()
        own = {n: torch.where(mask, v[place], math.nan)[shown].numpy() for n, v in numbers.items()}
        if not bool(mask[shown].all()):
            own["chosen"] = mask[shown].float().numpy()
        out.append(
            StoredRollout(
                prompt=prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")),
                completion=completion,
                reward=math.fsum(v for v in earned or compared if v == v) if earned or compared else math.nan,
                rewards=dict(zip(session.rewards, earned, strict=False)),
                data_index=int(rows.data_index[i]),
                group=int(rows.group[i]),
                stop=Stop(int(rows.stop[i])).name.lower(),
                length=int(mask.sum()),
                tokens=tuple(token_texts(session.policy.tokenizer, ids)),
                numbers=own,
            )
        )
    return out


@torch.no_grad()
def _by_token(
    rows: Rows, seen: tuple[Tensor, Stats] | None, by_token: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "B T"]]:
    """Numbers by name, NaN in rows that the first update left out."""
    out = {"log_prob": rows.logp["behaviour"].float()} if "behaviour" in rows.logp else {}
    if rows.advantage is not None:
        several = rows.advantage.dim() == 3
        columns = rows.advantage.float().unbind(2) if several else [rows.advantage.float()]
        out |= {f"advantage/{k}" if several else "advantage": column for k, column in enumerate(columns)}
    if seen is None:
        return out
    index, stats = seen
    found = {"entropy": stats.get(Entropy()), "log_prob_ref": stats.get(LogProb(of=("ref",)))}
    found |= kl_by_token(rows.select(index), stats) | dict(by_token)
    for name, value in found.items():
        if value is not None and value.shape == (len(index), rows.tokens.shape[1]):
            out[name] = torch.full(rows.tokens.shape, math.nan, device=rows.device)
            out[name][index] = value.to(out[name])
    return out
