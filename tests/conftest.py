"""What many tests share: a folder of their own, game processes, a tracker, a full disk, and whole
processes of `wm`.
"""

import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from wm.tracking import Tracker
from wm.workers import Workers

SMOKE = ["env=tiny", "scale=smoke", "trainer.workers=1", "runs=made"]


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


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(rank, ranks): from now on this process is one of several, as torchrun says it."""

    def be(rank, ranks):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))

    return be


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


@pytest.fixture(scope="session")
def start():
    """start(folder, command, *words): `wm` in a process group of its own, its runs in `made`."""

    def begin(folder, command, *words):
        return subprocess.Popen(
            [sys.executable, "-m", "wm", command, *SMOKE, *words],
            cwd=folder,
            env={key: os.environ[key] for key in os.environ if key != "MLFLOW_TRACKING_URI"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return begin


@pytest.fixture(scope="session")
def finish(start):
    """finish(folder, command, *words): the same to its end; its exit code and its output."""

    def run(folder, command, *words):
        process = start(folder, command, *words)
        output = process.communicate(timeout=600)[0]
        return process.returncode, output

    return run


@pytest.fixture(scope="session")
def wait_until():
    """wait_until(seen, process): until seen() is true of what a process leaves; what it returns."""

    def wait(seen, process, seconds=300):
        deadline = time.time() + seconds
        while not (found := seen()):
            assert process.poll() is None, process.stdout.read()
            assert time.time() < deadline
            time.sleep(0.005)
        return found

    return wait
