"""Completions with known sums of log-probabilities, spread evenly over their tokens; the padding holds garbage."""

from collections.abc import Sequence

import torch
from torch import Tensor

from keel.core.rows import Pairs, Rows
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

REF = LogProb(of=("ref",))
V1 = {"policy": (-12.0, -15.0), "ref": (-13.0, -14.0), "lengths": (10, 12)}
V2 = {"policy": (-10.0, -16.0), "ref": (-11.5, -15.25), "lengths": (8, 14)}
ALIKE = 5.1e-7  # six digits


def completions(
    policy: Sequence[float],
    ref: Sequence[float],
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    **known,
) -> tuple[Rows, Stats]:
    """Rows of a group each, and their statistics; the policy's is a leaf."""
    lengths = [2] * len(policy) if lengths is None else lengths
    width = max(lengths) + 2
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    prompt = torch.arange(len(lengths))[:, None]
    rows = Rows.build(prompt, torch.ones_like(prompt, dtype=torch.bool), ids, mask, **known)

    def spread(sums: Sequence[float]) -> Tensor:
        each = torch.tensor(sums, dtype=torch.float64) / torch.tensor(lengths)
        return torch.where(mask, each[:, None], 7.0).to(dtype)

    return rows, Stats({LogProb(): spread(policy).requires_grad_(), REF: spread(ref)})


def paired(rows: Rows, chosen: Sequence[int], rejected: Sequence[int], measure: Sequence[float] | None = None) -> Rows:
    """The rows with pairs."""
    ones = torch.ones(len(chosen), dtype=torch.float64)
    weight = ones if measure is None else torch.tensor(measure, dtype=torch.float64)
    return rows.with_(pairs=Pairs(torch.tensor(chosen), torch.tensor(rejected), weight, ones, ones, 0 * ones))


def beside(gaps: Sequence[float], dtype: torch.dtype = torch.float64) -> tuple[Rows, Stats]:
    """Mismatched rows with these log-ratios."""
    return completions([-3.0 + gap for gap in gaps], [-3.0] * len(gaps), dtype=dtype)


def assert_gradient(loss, rows: Rows, stats: Stats, step: float = 1e-6) -> None:
    """The gradient with respect to the policy's numbers, by central differences at every token."""
    live = stats[LogProb()].detach()
    leaf = live.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(rows, stats.merged({LogProb(): leaf})), leaf)
    assert float(grad[~rows.mask].abs().max()) == 0 and float(grad.abs().max()) > 0
    for b, t in rows.mask.nonzero().tolist():
        values = []
        for sign in (1, -1):
            moved = live.clone()
            moved[b, t] += sign * step
            values.append(float(loss(rows, stats.merged({LogProb(): moved}))))
        assert abs((values[0] - values[1]) / (2 * step) - float(grad[b, t])) < 1e-6, (b, t)
