"""The measured numbers, looked up by functional."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from keel.core.errors import KeelError
from keel.statistics.functionals import Functional


class MissingStatistic(KeelError, KeyError):
    """A part read a functional that it does not list in `needs`."""

    def __str__(self) -> str:
        return str(self.args[0])


class Stats(Mapping[Functional, Tensor]):
    """Numbers per functional: [B, T, *F] with 0 off the mask, [B, *F] for `last`, packed [n, *F] for another mask."""

    def __init__(self, values: Mapping[Functional, Tensor] | None = None):
        self._values = dict(values or {})

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
        return Stats({**self._values, **other})

    def select(self, index: Tensor, width: int | None = None) -> "Stats":
        """The rows of an index; `width` cuts or pads the token dimension to that of the selected rows."""
        return Stats({f: _fit(value[index], f, width) for f, value in self._values.items()})

    def detached(self) -> "Stats":
        """The same numbers without gradient."""
        return Stats({f: value.detach() for f, value in self._values.items()})


def _fit(value: Tensor, functional: Functional, width: int | None) -> Tensor:
    if width is None or functional.where == "last":
        return value
    return value[:, :width]
