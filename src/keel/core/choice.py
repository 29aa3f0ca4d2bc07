"""Randomness from counters: a number depends on what it is for, never on what was drawn before."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def counter_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all of `parts` and their order.

    >>> counter_seed(0, "rollout", 3) == counter_seed(0, "rollout", 3)
    True
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `counter_seed`."""
    return torch.Generator().manual_seed(counter_seed(*parts))


def row_ids(
    seed: int, step: int, data_index: Sequence[int] | Int[Tensor, "n"], sample: Int[Tensor, "n"]
) -> Int[Tensor, "n"]:
    """Identity of a row, a hash of (seed, step, data_index, sample), non-negative."""
    index = torch.as_tensor(data_index, dtype=torch.long, device=sample.device)
    start = torch.full_like(sample, counter_seed(seed, step))
    mixed = _mix(_mix(start + index * _GOLDEN) + sample * _GOLDEN)
    return mixed & 0x7FFFFFFFFFFFFFFF


def uniforms(row: Int[Tensor, "n"], counter: int | Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """One uniform in [0, 1) for each row and counter (a token's position, say), in fp64: a splitmix64 of the two."""
    mixed = _mix(_mix(row + _GOLDEN) + torch.as_tensor(counter, device=row.device) * _GOLDEN)
    return _shift(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
