"""Settings of all tests: one thread, no network, a cache of their own, and shapes that are checked."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import annotations

gc.disable()  # until all tests are collected: what is imported until then stays

CHECKED = (
    "keel.compare.statistics",
    "keel.core",
    "keel.divergences",
    "keel.exact",
    "keel.parts.advantages",
    "keel.parts.controllers",
    "keel.parts.masks",
    "keel.parts.rewards.anchored",
    "keel.parts.rewards.curation",
    "keel.parts.rewards.transforms",
    "keel.parts.terms",
    "keel.parts.weights",
    "keel.sampling",
    "keel.statistics.functionals",  # the engine's own functions name no shapes
    "keel.statistics.transforms",
)
early = sorted(name for name in sys.modules if name.startswith(CHECKED))
assert not early, f"the shapes of {early[0]} cannot be checked: it was imported before the tests"
annotations.install(list(CHECKED))

# Before anything of Keel is imported. The workers of pytest-xdist inherit what the first process sets.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "KEEL_CACHE" not in os.environ:
    os.environ["KEEL_CACHE"] = tempfile.mkdtemp(prefix="keel-tests-")
    made_by = os.getpid()  # a forked child must not remove it
    atexit.register(lambda: os.getpid() == made_by and shutil.rmtree(os.environ["KEEL_CACHE"], ignore_errors=True))

torch.set_num_threads(1)
settings.register_profile(
    "keel", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("keel")


def pytest_collection_finish() -> None:
    """The collector need not walk through what all tests have imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """The global generator depends on the test alone; tests of Keel draw from `keel.core.choice` instead."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes of a test are gone after it: others ask for all that there are."""
    from keel.recipes import registry

    registry.recipes()  # all are loaded, once
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
