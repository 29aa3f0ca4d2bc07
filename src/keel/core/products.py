"""Faster fp32 matrix products on CPUs, where a trial shows that they still are fp32.

PyTorch hands fp32 products to BLAS, which on many processors leaves a third to a half of the speed unused. Allowed to
take reduced precision, it hands them to oneDNN; where the processor has no unit that computes in reduced precision
(AMX, say), oneDNN computes in fp32 all the same, only faster. Where it does round, nothing is changed. It is for large
products alone: the blocks of fused attention are so small that they get slower.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

WORTH = 1 << 24  # multiplications of a product from which on it pays
_USUAL, _ALLOWED = ("none", "ieee"), "bf16"


@contextlib.contextmanager
def fast_products(active: bool = True) -> Iterator[None]:
    """Within it, fp32 products on the CPU take the faster way, if it is exact here; a user's own choice stands."""
    setting = _setting()
    before = getattr(setting, "fp32_precision", None)
    if not active or before not in _USUAL or not exact_here():
        yield
        return
    setting.fp32_precision = _ALLOWED
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def exact_here() -> bool:
    """Whether the faster way is as exact as the usual one on this machine; tried once on products of several shapes."""
    setting = _setting()
    before = getattr(setting, "fp32_precision", None)
    if before not in _USUAL or not torch.backends.mkldnn.is_available():
        return False
    try:
        return all(_as_exact(*shape) for shape in ((64, 256, 2048), (512, 128, 384), (2048, 64, 64)))
    finally:
        setting.fp32_precision = before


def worth(x: Tensor, module: nn.Module | None) -> bool:
    """Whether the products of a module's weights with the rows of `x` are large enough for the faster way to pay."""
    if module is None or x.device.type != "cpu" or len(x) == 1:
        return False
    largest = max((p.numel() for p in module.parameters(recurse=False)), default=0)
    return x.shape[:-1].numel() * largest >= WORTH


def _as_exact(rows: int, inner: int, columns: int) -> bool:
    chance = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=chance), torch.randn(columns, inner, generator=chance)
    wanted = a.double() @ b.double().t()
    errors = []
    for precision in ("ieee", _ALLOWED):
        _setting().fp32_precision = precision
        errors.append(float(((a @ b.t()).double() - wanted).abs().max()))
    return errors[1] <= 4 * errors[0]


def _setting() -> Any:
    """Of products on the CPU; None before PyTorch 2.9."""
    return getattr(torch.backends.mkldnn, "matmul", None)
