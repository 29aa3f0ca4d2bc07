"""Keel: divergence-regularised policy optimisation, composed, verified and compared."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PACKAGES = ("train", "evaluate", "verify", "compare")  # packages that can be called
_ENTRIES = {
    "sample": "keel.train.samples",
    "frontier": "keel.train.samples",
    "fit_value": "keel.train.samples",
    "cold_start": "keel.train.cold_start",
    "target": "keel.train.target",
    "from_trl": "keel.train.trl",
    "Method": "keel.method",
    "Run": "keel.train.lifecycle",
    "recipe": "keel.recipes.registry",
    "part": "keel.core.registry",
}
__all__ = [*_PACKAGES, *_ENTRIES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public entries late, so that `import keel` and `keel --help` stay fast."""
    if name in _PACKAGES:
        return importlib.import_module(f"keel.{name}")
    if name in _ENTRIES:
        return getattr(importlib.import_module(_ENTRIES[name]), name)
    raise AttributeError(f"module 'keel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
