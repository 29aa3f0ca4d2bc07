"""K8: two prompts with four completions each, 20 tokens, numbers worked out by hand; the padding holds garbage."""

import pytest
import torch
from torch import Tensor

from keel.core.aggregate import Aggregation
from keel.core.rows import Rows
from keel.method import Method
from keel.parts.advantages.group import GroupCentre, GroupStd
from keel.parts.terms.surrogate import Objective, Surrogate
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

REWARD = [1, 0, 0, 1, 0, 0, 0, 1]
OLD = [[-0.7, -1.2, -0.9], [-0.5, -2.0, -0.9, -3.0], [-1.0, -0.4], [-0.6],
       [-0.6, -1.5], [-0.8, -0.4, -2.2, -1.1], [-0.9, -0.5, -1.6], [-2.5]]  # fmt: skip
LIVE_OLD = [[0.10, -0.30, 0.50], [-0.05, 0.25, -0.40, 1.30], [0.00, 0.20], [0.22],
            [-0.10, -0.25], [0.05, 0.15, -0.15, 0.30], [-0.60, 0.10, 0.40], [0.35]]  # fmt: skip
OLD_BEHAVIOUR = [[0.05, -0.10, 0.90], [0.00, 0.02, -0.80, 0.01], [0.30, -0.02], [0.00],
                 [-0.05, 0.04], [0.02, 0.00, 0.60, -0.03], [1.80, -0.01, 0.03], [-0.01]]  # fmt: skip
LENGTHS = torch.tensor([len(row) for row in OLD])
MASK = torch.arange(4) < LENGTHS[:, None]
ALIKE = 5.1e-7  # six digits


def padded(ragged: list[list[float]], fill: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """[8, 4], right-padded."""
    return torch.tensor([row + [fill] * (4 - len(row)) for row in ragged], dtype=dtype)


def k8_rows(dtype: torch.dtype = torch.float64) -> Rows:
    """The batch; log-ratios in the padding are 7."""
    ids = torch.zeros(8, 4, dtype=torch.long)
    return Rows.build(
        ids[:, :1],
        torch.ones(8, 1, dtype=torch.bool),
        ids,
        MASK,
        group=torch.arange(8) // 4,
        reward=torch.tensor(REWARD, dtype=dtype)[:, None],
        logp={"behaviour": padded(OLD, 0.0, dtype) - padded(OLD_BEHAVIOUR, 7.0, dtype)},
    )


def k8_stats(dtype: torch.dtype = torch.float64) -> Stats:
    """Log-probabilities, live (a leaf) and old."""
    old = padded(OLD, 0.0, dtype)
    live = (old + padded(LIVE_OLD, 7.0, dtype)).requires_grad_()
    return Stats({LogProb(): live, LogProb(of=("old",)): old})


def k8_method(f: Objective, level="token", mode="token_mean", epsilon: float = 1e-6, weights=None) -> Method:
    """A surrogate with GRPO's advantage."""
    return Method(
        rollout=Rollout(num_generations=4),
        advantage={"centre": GroupCentre(), "std": GroupStd(epsilon)},
        surrogate=Surrogate(f, level),
        aggregation=Aggregation(mode, 4 if mode == "constant" else None),
        weights=weights or {},
    )


def k8_loss(method: Method, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The loss on K8, and its gradient with respect to the live log-probabilities."""
    stats = k8_stats(dtype)
    rows = method.prepare(k8_rows(dtype), stats, method.initial_states())
    loss = method.loss(rows, stats, method.initial_states())
    (grad,) = torch.autograd.grad(loss, stats[LogProb()])
    return loss.detach(), grad


def assert_gradient_of_value(method: Method) -> None:
    """The gradient on K8 is that of the loss's value, by central differences at every token."""
    _, grad = k8_loss(method)
    stats = k8_stats()
    rows = method.prepare(k8_rows(), stats, {})
    live = stats[LogProb()].detach()
    for b, t in MASK.nonzero().tolist():
        step = torch.zeros_like(live)
        step[b, t] = 1e-6
        up = method.loss(rows, stats.merged({LogProb(): live + step}), {})
        down = method.loss(rows, stats.merged({LogProb(): live - step}), {})
        assert float(up - down) / 2e-6 == pytest.approx(float(grad[b, t]), abs=1e-8)
