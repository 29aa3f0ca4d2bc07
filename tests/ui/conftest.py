"""The application over a folder of known runs."""

import shutil

import pytest
from fastapi.testclient import TestClient
from tests.ui.known_runs import build

from keel.ui.app import create_app


@pytest.fixture(scope="session", autouse=True)
def library(tmp_path_factory):
    """What a reader imports and looks at is kept in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEEL_HOME", str(tmp_path_factory.mktemp("library")))
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder; tests only read it."""
    return build(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def client(runs):
    """Asks the application without a network."""
    return TestClient(create_app(runs), base_url="http://127.0.0.1:8765", raise_server_exceptions=False)


@pytest.fixture
def own(runs, tmp_path):
    """A copy of the folder that a test may write to, and a client of it."""
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    return folder, TestClient(create_app(folder), base_url="http://127.0.0.1:8765", raise_server_exceptions=False)
