"""Real processes of `wm` and of MLflow's server, started and killed."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

SMOKE = ["env=tiny", "scale=smoke", "trainer.workers=1", "runs=made"]


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
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def serve():
    """serve(port, folder, options): a context in which MLflow's server answers there."""

    @contextmanager
    def server(port, folder, options):
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--workers", "1", *options],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 180
            while not _healthy(port):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return server


def _healthy(port):
    with suppress(OSError):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
