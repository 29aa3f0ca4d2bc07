"""An untrained model of some thousand parameters."""

import pytest

from tests.compare.lengths import ALPHABET


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Its folder."""
    from keel.models.load import save
    from keel.models.tiny import TinyConfig, build_tiny

    folder = tmp_path_factory.mktemp("compared") / "model"
    save(build_tiny(ALPHABET, TinyConfig(dim=16, layers=1, heads=2, feed_forward=32, context=48)), folder)
    return str(folder)


@pytest.fixture(scope="session")
def finished(model, tmp_path_factory):
    """Two arms with two seeds, run once for all tests that only look."""
    from tests.compare.small import Forks, asked, compared

    runs, forks = tmp_path_factory.mktemp("finished") / "runs", Forks()
    found, said = compared(asked(model, runs, "grpo", "dr_grpo", name="both"), forks)
    return found, said, forks, runs
