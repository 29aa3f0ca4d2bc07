"""Buffers for copies of a chunk's logits, which the chunks take in turn: fresh memory costs page faults.

Large ones on a CPU are stored with the vocabulary first: the product W h^T runs faster than h W^T.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 1 << 18  # numbers


class Workspace:
    """Lends tensors [n, V]."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}

    def take(self, n: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n V"]:
        """A tensor of arbitrary content."""
        size = n * vocabulary
        fits = (i for i, b in enumerate(self._free) if b.numel() >= size and (b.dtype, b.device) == (dtype, device))
        place = next(fits, None)
        buffer = torch.empty(size, dtype=dtype, device=device) if place is None else self._free.pop(place)
        if size:
            self._lent[buffer.data_ptr()] = buffer
        flat = buffer[:size]
        first = device.type == "cpu" and size >= LARGE
        return flat.view(vocabulary, n).T if first else flat.view(n, vocabulary)

    def give(self, tensor: Float[Tensor, "n V"]) -> None:
        """Take back what was lent; nobody may read it from now on."""
        buffer = self._lent.pop(tensor.data_ptr(), None)
        if buffer is not None:
            self._free.append(buffer)

    def give_all(self) -> None:
        """Take everything back."""
        self._free.extend(self._lent.values())
        self._lent.clear()
