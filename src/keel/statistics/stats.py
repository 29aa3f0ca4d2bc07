"""The measured numbers, looked up by functional."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from keel.core.errors import KeelError
from keel.statistics.functionals import Functional


class MissingStatistic(KeelError, KeyError):
    """A part read a functional that it does not list in `needs`."""

    def __str__(self) -> str:
        return str(self.args[0])


class Stats(Mapping[Functional, Tensor]):
    """Numbers per functional: [B, T, *F] with 0 off the mask, [B, *F] for `last`, packed [n, *F] for another mask.

    Args:
        values: the numbers.
        masks: the masks [B, T] of packed functionals, by name, without which their rows cannot be told apart.
    """

    def __init__(self, values: Mapping[Functional, Tensor] | None = None, masks: Mapping[str, Tensor] | None = None):
        self._values, self.masks = dict(values or {}), dict(masks or {})

    def __getitem__(self, functional: Functional) -> Tensor:
        try:
            return self._values[functional]
        except KeyError:
            known = ", ".join(sorted(f.name for f in self._values)) or "none"
            raise MissingStatistic(
                f"{functional.name} was not measured: it is missing in a part's `needs`", None, f"Measured: {known}."
            ) from None

    def __iter__(self) -> Iterator[Functional]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def merged(self, other: Mapping[Functional, Tensor]) -> "Stats":
        """These and others; the others win."""
        return Stats({**self._values, **other}, {**self.masks, **getattr(other, "masks", {})})

    def select(self, index: Tensor, width: int | None = None) -> "Stats":
        """The rows of an index; `width` cuts the token dimension to that of the selected rows."""
        masks = {name: mask[index] for name, mask in self.masks.items()}
        values = {f: self._select(f, value, index) for f, value in self._values.items()}
        if width is None:
            return Stats(values, masks)
        cut = {f: v if f.where == "last" or packed(f) else v[:, :width] for f, v in values.items()}
        return Stats(cut, {name: mask[:, :width] for name, mask in masks.items()})

    def _select(self, functional: Functional, value: Tensor, index: Tensor) -> Tensor:
        if not packed(functional):
            return value[index]
        if functional.where not in self.masks:
            raise KeelError(f"{functional.name} is packed, and its mask '{functional.where}' is not known here")
        mask = self.masks[functional.where]
        return value[slots_of(mask)[index][mask[index]]]

    def detached(self) -> "Stats":
        """The same numbers without gradient."""
        return Stats({f: value.detach() for f, value in self._values.items()}, self.masks)


def packed(functional: Functional) -> bool:
    """Whether the numbers of a functional are those of a named mask, [n, *F]."""
    return functional.where not in ("mask", "last")


def slots_of(mask: Tensor) -> Tensor:
    """Where the number of each position of a mask [B, T] stands among the packed ones; -1 off it.

    >>> import torch
    >>> slots_of(torch.tensor([[True, False], [True, True]])).tolist()
    [[0, -1], [1, 2]]
    """
    return torch.where(mask, mask.flatten().cumsum(0).view_as(mask) - 1, -1)
