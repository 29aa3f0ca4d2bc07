"""Keel: divergence-regularised policy optimisation, composed, verified and compared."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ENTRIES = {
    "train": "keel.train.entry",
    "evaluate": "keel.train.entry",
    "sample": "keel.train.entry",
    "from_trl": "keel.train.trl",
    "Method": "keel.method",
    "Run": "keel.train.entry",
    "recipe": "keel.recipes.registry",
    "part": "keel.core.registry",
}
__all__ = [*_ENTRIES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public entries late, so that `import keel` and `keel --help` stay fast."""
    if name in _ENTRIES:
        return getattr(importlib.import_module(_ENTRIES[name]), name)
    raise AttributeError(f"module 'keel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
