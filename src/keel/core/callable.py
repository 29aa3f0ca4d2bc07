"""Packages that can be called: `keel.train(...)` although `keel.train` is a package, too."""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(module: str, entry: str) -> None:
    """Let a module be called as the function `entry` ("package.module:function"), which is imported at the first call.

    Args:
        module: name of the module, as in `sys.modules`.
        entry: what it stands for.
    """

    def target() -> Any:
        place, _, name = entry.partition(":")
        return getattr(importlib.import_module(place), name)

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return target()(*args, **kwargs)

        @property
        def __wrapped__(self) -> Any:
            """What `inspect.signature` and `help` look at."""
            return target()

    sys.modules[module].__class__ = CallableModule
