"""What is left of a session, and MLflow's server."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def alive():
    """alive(session): the names of the processes of a session that run, by their numbers."""

    def look(session):
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, fields = stat.read_text().split("(", 1)[1].rsplit(")", 1)
            except OSError:
                continue  # it ended while we looked
            state, _, _, its_session, *_ = fields.split()
            if int(its_session) == session and state != "Z":
                found[int(stat.parent.name)] = name
        return found

    return look


@pytest.fixture(scope="session")
def left(alive):
    """left(session): the names of those that still run after some seconds; then they are killed."""

    def wait(session, seconds=20):
        deadline = time.time() + seconds
        while (found := alive(session)) and time.time() < deadline:
            time.sleep(0.2)
        for number in found:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return list(found.values())

    return wait


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
