"""One pair of completions with its numbers by token; the padding holds garbage."""

import pytest
import torch
from torch import Tensor

from keel.core.rows import Pairs, Rows
from keel.method import Method
from keel.statistics.functionals import Divergence, Functional, LogProb, Value
from keel.statistics.stats import Stats

KL = Divergence("kl_ref_policy", "ref")
REF = LogProb(of=("ref",))
GARBAGE = 7.0


def pair_rows(
    lengths: tuple[int, int], tokens: list[list[int]] | None = None, wide: int = 0, dtype=torch.float64
) -> Rows:
    """A chosen and a rejected completion of one prompt, with `wide` columns of padding beyond the longer one."""
    width = max(lengths) + wide
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(2, width, dtype=torch.long)
    for i, row in enumerate(tokens or []):
        ids[i, : len(row)] = torch.tensor(row)
    one = torch.ones(1, dtype=dtype)
    return Rows.build(
        torch.zeros(2, 1, dtype=torch.long),
        torch.ones(2, 1, dtype=torch.bool),
        ids,
        mask,
        group=torch.zeros(2, dtype=torch.long),
        weight=torch.ones(2, dtype=dtype),
        pairs=Pairs(torch.tensor([0]), torch.tensor([1]), one, one, one, 0 * one),
    )


def spread(rows: Rows, chosen: list[float], rejected: list[float], dtype=torch.float64) -> Tensor:
    """Numbers of both rows, garbage in the padding; a leaf."""
    out = torch.full(rows.tokens.shape, GARBAGE, dtype=dtype)
    for i, row in enumerate((chosen, rejected)):
        out[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return out.requires_grad_()


def numbers(rows: Rows, dtype=torch.float64, **named: tuple[list[float], list[float]]) -> dict[str, Tensor]:
    return {name: spread(rows, *sides, dtype=dtype) for name, sides in named.items()}


def stats_of(found: dict[str, Tensor]) -> Stats:
    """Log-ratios `u` against a reference of 0, KLs `k`, and masks by the name of their head."""
    known: dict[Functional, Tensor] = {LogProb(): found["u"], REF: torch.zeros_like(found["u"])}
    known |= {KL: found["k"]} if "k" in found else {}
    for name in found:
        if name.startswith("mask"):
            known[Value(name, of=("layers", "policy"))] = found[name]
    return Stats(known)


def loss_of(method: Method, rows: Rows, found: dict[str, Tensor]) -> Tensor:
    return method.loss(rows, stats_of(found), {})


def assert_gradients_of_value(method: Method, rows: Rows, found: dict[str, Tensor], constant: tuple = ()) -> None:
    """By central differences at every token; 0 off the completions."""
    grads = torch.autograd.grad(loss_of(method, rows, found), list(found.values()), allow_unused=True)
    for (name, leaf), grad in zip(found.items(), grads, strict=True):
        assert grad is not None and not bool(grad[~rows.mask].any())
        for b, t in rows.mask.nonzero().tolist():
            if (name, b) in constant:
                assert float(grad[b, t]) == 0
                continue
            step = torch.zeros_like(leaf)
            step[b, t] = 1e-6
            up = loss_of(method, rows, {**found, name: leaf + step})
            down = loss_of(method, rows, {**found, name: leaf - step})
            assert float(up - down) / 2e-6 == pytest.approx(float(grad[b, t]), abs=1e-8)
