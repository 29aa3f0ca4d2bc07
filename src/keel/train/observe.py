"""Metrics, under the field's names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keel.core.aggregate import Groups, masked_mean, ratio, token_weight, weighted_mean, weighted_std
from keel.core.config import get_path
from keel.core.rows import Rows, Stop
from keel.divergences.estimators import estimate
from keel.statistics.functionals import Divergence, Entropy, LogProb
from keel.statistics.stats import Stats
from keel.store.records import StoredRollout

GROUPS_STORED = 2


def rollout_metrics(rows: Rows, rewards: Mapping[str, Any]) -> dict[str, float]:
    """What can be said of a scored batch before any model looks at it."""
    assert rows.reward is not None
    main = rows.select(rows.main)
    assert main.reward is not None
    total = torch.nansum(main.reward, 1)
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
        if name.startswith("rollout/") and bool((known := column.isfinite()).any()):  # what a sampler says of itself
            out[name] = weighted_mean(column, known.to(column))
    return {name: float(value) for name, value in out.items()}


@torch.no_grad()
def update_metrics(session: Any, rows: Rows, stats: Stats) -> dict[str, float]:
    """What the first update of a batch saw: entropy, KL, clipping, the sampler's gap, each part of the loss."""
    method = session.method
    out: dict[str, Tensor] = {}
    if Entropy() in stats:
        out["entropy"] = masked_mean(stats[Entropy()], rows)
    out |= kl_metrics(rows, stats)
    if method.surrogate is not None:
        out |= method.surrogate.metrics(rows, stats)
    if "behaviour" in rows.logp and LogProb() in stats:
        out |= sampler_metrics(rows, stats[LogProb()], stats[sampled_log_prob(method)])
    for name, value in method.contributions(rows, stats, session.states).items():
        out[f"terms/{name}"] = value
    return {name: float(value) for name, value in out.items()}


def kl_metrics(rows: Rows, stats: Stats) -> dict[str, Tensor]:
    """KL to the reference per token: exact over the vocabulary where measured, else k3 of the sampled tokens."""
    for functional in stats:
        if isinstance(functional, Divergence) and functional.against == "ref":
            name = "kl" if functional.kind == "kl_policy_ref" else f"divergence/{functional.kind}"
            found = {name: masked_mean(stats[functional], rows)}
            break
    else:
        found = {}
    ref = LogProb(of=("ref",))
    if "kl" not in found and ref in stats:
        live = stats.get(LogProb(), stats.get(LogProb(of=("old",))))
        if live is not None:
            found["kl"] = masked_mean(estimate("k3", live - stats[ref]), rows)
    return found


def sampled_log_prob(method: Any) -> LogProb:
    """The trainer's log-probability under the distribution that was sampled, filters included."""
    return LogProb(transform=None if method.rollout is None else method.rollout.sampling.filter)


def sampler_metrics(rows: Rows, log_prob: Tensor, sampled: Tensor) -> dict[str, Tensor]:
    """How far sampler and trainer are apart, before the first update of a batch.

    Args:
        rows: with `logp["behaviour"]`.
        log_prob: of the trainer, unfiltered; it gives the effective share of importance weights.
        sampled: of the trainer, with the sampler's filters; it should equal the behaviour's.
    """
    behaviour, nothing = rows.logp["behaviour"], torch.zeros_like(log_prob)
    gap = torch.where(rows.mask, sampled - behaviour, nothing)
    ratios = torch.where(rows.mask, log_prob - behaviour, nothing).clamp(-20, 20).exp()
    weight = token_weight(rows)
    first, second = (weight * ratios).sum(), (weight * ratios.square()).sum()
    return {
        "rollout/logp_gap": masked_mean(gap.abs(), rows),
        "rollout/ess": ratio(first.square(), second * weight.sum()),
    }


def batch_metrics(session: Any) -> dict[str, float]:
    """Where the run stands, and the values that controllers have set."""
    out = {"num_tokens": float(session.position.tokens)}
    for item in session.method.controllers.values():
        if (path := getattr(item, "path", None)) is not None:
            out[f"controllers/{path}"] = float(get_path(session.method, path))
    return out


def stored_rollouts(
    session: Any, rows: Rows, texts: Sequence[tuple[Any, str]], seen: tuple[Tensor, Stats] | None
) -> list[StoredRollout]:
    """The completions of the first groups of a batch, with what is known of each token."""
    kept = rows.group.unique()[:GROUPS_STORED]
    numbers = {"log_prob": rows.logp["behaviour"]} if "behaviour" in rows.logp else {}
    if rows.advantage is not None:
        numbers["advantage"] = rows.advantage
    for name, functional in (("entropy", Entropy()), ("log_prob_ref", LogProb(of=("ref",)))):
        if seen is not None and functional in seen[1]:
            whole = torch.full(rows.tokens.shape, float("nan"), device=rows.device)
            whole[seen[0]] = seen[1][functional].float()
            numbers[name] = whole
    out = []
    for i in torch.isin(rows.group, kept).nonzero().flatten().tolist():
        mask = rows.mask[i]
        prompt, completion = texts[i]
        earned = [] if rows.reward is None else rows.reward[i].tolist()
        out.append(
            StoredRollout(
                prompt=prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")),
                completion=completion,
                reward=math.fsum(value for value in earned if value == value) if earned else math.nan,
                rewards=dict(zip(session.rewards, earned, strict=False)),
                data_index=int(rows.data_index[i]),
                group=int(rows.group[i]),
                stop=Stop(int(rows.stop[i])).name.lower(),
                length=int(mask.sum()),
                tokens=tuple(session.policy.tokenizer.convert_ids_to_tokens(rows.tokens[i][mask].tolist())),
                numbers={name: value[i][mask].float().cpu().numpy() for name, value in numbers.items()},
            )
        )
    return out
