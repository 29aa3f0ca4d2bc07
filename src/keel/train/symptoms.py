"""Numbers by which a diagnosis tells what is wrong, and where: all from statistics that a step has measured anyway."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import masked_mean, token_weight, weighted_mean
from keel.core.rows import Rows
from keel.statistics.stats import Stats

THIRDS = ("first", "middle", "last")
TURNS = 8  # turns that are told apart
FAR = math.log(2.0)  # |log ratio| from which a token counts as far from the policy that drew it
LIMIT = 20.0  # log-ratios beyond it are cut before exp


def entropy_by_part(rows: Rows, entropy: Float[Tensor, "B T"]) -> dict[str, Tensor]:
    """Mean entropy in each third of the completions, and in each turn of episodes, in nats a token.

    The i-th of L chosen tokens, i from 0, is in third floor(3 (i + 1/2) / L). Parts without tokens are left out.

    Args:
        rows: with the column `turn`, counted from 0, where there are turns.
        entropy: of the policy at each token.
    """
    place = rows.mask.cumsum(1) - 0.5
    third = (3 * place / rows.mask.sum(1, keepdim=True).clamp(min=1)).floor()
    parts = {f"entropy/{name}": third == k for k, name in enumerate(THIRDS)}
    turn = rows.columns.get("turn")
    if turn is not None:
        turn = turn if turn.dim() == 2 else turn[:, None].expand_as(rows.mask)
        parts |= {f"entropy/turn_{k + 1}": turn == k for k in range(TURNS)}
    weight = token_weight(rows)
    return {
        name: weighted_mean(entropy, weight * where)
        for name, where in parts.items()
        if bool((where & rows.mask & (weight > 0)).any())
    }


def ratio_metrics(rows: Rows, log_ratio: Float[Tensor, "B T"]) -> dict[str, Tensor]:
    """How far an update is from the policy that drew the tokens: the largest ratio, and the share beyond a factor of 2.

    Args:
        rows: of the update.
        log_ratio: log rho at each token, at the surrogate's level.
    """
    counted = token_weight(rows) > 0
    log_ratio = torch.where(counted, log_ratio, torch.zeros_like(log_ratio))
    return {
        "ratio/max": log_ratio.max().clamp(max=LIMIT).exp(),
        "ratio/far": masked_mean((log_ratio.abs() > FAR).to(log_ratio), rows),
    }


def sampler_ratio(rows: Rows, log_prob: Float[Tensor, "B T"], own: Bool[Tensor, "B"]) -> dict[str, Tensor]:
    """Mean ratio of trainer to sampler, of a token and of a whole completion; without filters both are 1 on average.

    With a filter that keeps the probability m of the vocabulary, the ratio is m at every token that it lets pass.

    Args:
        rows: with `logp["behaviour"]`, under the filtered distribution.
        log_prob: of the trainer, unfiltered.
        own: rows drawn at the rollout's own temperature.
    """
    nothing = torch.zeros_like(log_prob)
    gap = torch.where(rows.mask, log_prob - rows.logp["behaviour"], nothing)
    token = gap.clamp(-LIMIT, LIMIT).exp()
    whole = gap.sum(1).clamp(-LIMIT, LIMIT).exp()
    return {
        "rollout/ratio": weighted_mean(token, token_weight(rows) * own[:, None]),
        "rollout/ratio_completion": weighted_mean(whole, rows.weight * (rows.main & own)),
    }


def term_strength(method: Any, rows: Rows, stats: Stats, states: Mapping[str, Any]) -> dict[str, float]:
    """For each term, the most that its gradient can be, over the noise of the policy gradient.

        sum_i |g_i|  /  sqrt( sum_i |p_i|^2 )

    g_i and p_i are the gradients of the term and of the policy term with respect to all statistics of row i. Rows are
    drawn independently, so that the policy gradient's noise adds up in squares; the term's is at its strongest if all
    rows pull in one direction. Left out where the policy term has no gradient (all groups tied).

    Args:
        method: the composition.
        rows, stats, states: those of the update, `old` included.
    """
    live = [f for f in stats if "policy" in f.of and "policy" not in f.stop and stats[f].is_floating_point()]
    leaves = [stats[f].detach().requires_grad_() for f in live]
    with torch.enable_grad():
        parts = method.contributions(rows, stats.merged(dict(zip(live, leaves, strict=True))), states)
    if "policy" not in parts or len(parts) < 2:
        return {}
    squares = {name: _squares(value, leaves, len(rows)) for name, value in parts.items()}
    noise = float(squares.pop("policy").sum().sqrt())
    return {f"strength/{name}": float(found.sqrt().sum()) / noise for name, found in squares.items()} if noise else {}


def _squares(value: Tensor, leaves: list[Tensor], rows: int) -> Float[Tensor, "_"]:
    """Squared norm of the gradient in each row; statistics that are packed count entry by entry."""
    if not value.requires_grad:
        return torch.zeros(1)
    found = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
    by_row, packed = torch.zeros(rows, device=value.device), [torch.zeros(0, device=value.device)]
    for grad in found:
        if grad is not None and len(grad) == rows:
            by_row = by_row + grad.float().square().reshape(rows, -1).sum(1)
        elif grad is not None:
            packed.append(grad.float().square().reshape(len(grad), -1).sum(1))
    return torch.cat([by_row, *packed])
