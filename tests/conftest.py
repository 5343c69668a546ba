"""What many tests share: a folder of their own, game processes, a tracker, a full disk."""

import resource
from contextlib import contextmanager

import pytest

from wm.tracking import Tracker
from wm.workers import Workers


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    """Nothing is tracked on a server that whoever runs the tests may use."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The current folder is empty, and whatever is left in it is not left in the checkout."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def workers():
    """Two game processes for all tests: their imports take longer than the games."""
    with Workers(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A runs folder for all tests: to make its database takes longer than to use it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tracker(runs):
    """A parent run for the stages that tests make up."""
    return Tracker(runs, {"env": {"name": "tiny"}, "scale": "smoke", "seed": 0}, "made up")


@pytest.fixture
def disk_full():
    """A context in which no file can grow beyond so many bytes, whoever runs the tests."""

    @contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
