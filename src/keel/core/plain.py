"""Plain values for programs, and counts in words for people."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """Lists and dictionaries with null for numbers that are NaN or infinite, which JSON does not have.

    >>> finite({"loss": float("nan"), "pass@1": (0.5, float("inf"))})
    {'loss': None, 'pass@1': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, thing: str) -> str:
    """How many of a thing, with the plural that it needs.

    >>> counted(1, "step"), counted(0, "step")
    ('1 step', '0 steps')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"
