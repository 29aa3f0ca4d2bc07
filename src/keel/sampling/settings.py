"""Checks that samplers share."""

from typing import Any


def positive(part: Any, *names: str) -> None:
    """The settings must be above 0.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(part, name)
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")


def share(part: Any, *names: str) -> None:
    """The settings must lie in [0, 1].

    Raises:
        ValueError: one does not.
    """
    for name in names:
        value = getattr(part, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {value}")
