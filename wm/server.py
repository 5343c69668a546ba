"""What is told to MLflow, and that nobody waits for it.

A run is found by its tags, never by its id alone, so that it can be told at any time and only once.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from sqlalchemy.exc import SQLAlchemyError

from wm import WMError
from wm.config import flat, one_line
from wm.files import check_kinds, read_json, write_atomically

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it announces every table it creates

PIPELINE_TAG = "wm.pipeline"
FINGERPRINT_TAG = "wm.fingerprint"
AGENT_TAG = "wm.agent"
PARAMS_PER_CALL = 100  # the limit of MLflow's batch call
RECORD = ".run.json"
HASTE = {  # of calls to a server; by default a dead one holds up each of them for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what is sent again may arrive twice
}
PATIENCE, SHARE = 30.0, 0.1  # seconds, and a share of the time, that MLflow may take in all

FAILURES = (MlflowException, SQLAlchemyError)  # of a server or of a database

T = TypeVar("T")


def tracking_uri(runs: Path) -> str:
    """The configured server, or an sqlite file in the runs folder (always absolute)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs.resolve()}/mlflow.db"


def if_damaged(uri: str) -> str:
    """What to do then about the local database; nothing of a server's."""
    path = uri.removeprefix("sqlite:///")
    if path == uri:
        return ""
    return f"; if {path} is damaged, move it away: `wm sync` sends everything into a new one"


class Server:
    """MLflow, as long as it answers.

    A run must not wait for its bookkeeping, nor end with it: the first call that fails, or the one
    with which all calls have taken too long, is the last.
    """

    def __init__(self, uri: str):
        for name, value in HASTE.items():
            os.environ.setdefault(name, value)
        self.uri, self.answers = uri, True
        self.started, self.waited = time.monotonic(), 0.0
        self.client = self.attempt(MlflowClient, uri)
        self.started, self.waited = time.monotonic(), 0.0  # a new database takes its time

    def attempt(self, do: Callable[..., T], *arguments: Any) -> T | None:
        """What `do` returns, or None when MLflow does not answer or has ceased to."""
        if not self.answers:
            return None
        began = time.monotonic()
        try:
            result = do(*arguments)
        except Exception as error:
            self._give_up(one_line(error))
            return None
        now = time.monotonic()
        self.waited += now - began
        if self.waited > PATIENCE + SHARE * (now - self.started):
            self._give_up(f"it has taken {self.waited:.0f} s so far")
        return result

    def _give_up(self, reason: str) -> None:
        self.answers = False
        print(
            f"MLflow at {self.uri} does not answer ({reason}); the work goes on, its numbers are "
            f"kept here, and `wm sync` sends them later{if_damaged(self.uri)}",
            file=sys.stderr,
            flush=True,
        )


class ServerLogger(Logger):
    """Metrics to a run on the server."""

    name = version = None

    def __init__(self, server: Server, run_id: str | None):
        super().__init__()
        self.server, self.run_id = server, run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(1000 * time.time())
        points = [Metric(key, float(value), now, step or 0) for key, value in metrics.items()]
        self.server.attempt(lambda: self.server.client.log_batch(self.run_id, metrics=points))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are logged when a run is made."""


@dataclass
class RunRecord:
    """What a run is, in .run.json beside its measurements; enough to make it anew in MLflow."""

    experiment: str
    name: str
    tags: dict[str, str]  # by which it is found
    versions: dict[str, str]
    config: dict[str, Any]
    parent: str | None = None  # the folder of the parent's record, or, if it has none, its run
    agent: str | None = None  # the fingerprint of the stage that holds the pipeline's agent
    artifacts: list[list[str | None]] = field(default_factory=list)  # [path, folder in MLflow]
    status: str = "RUNNING"

    def save(self, folder: Path) -> None:
        write_atomically(folder / RECORD, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "RunRecord":
        """Read a record back.

        Raises:
            WMError: if it is none.
        """
        try:
            record = cls(**read_json(folder / RECORD))
            check_kinds(vars(record), RECORD_KINDS)
            for path, under in record.artifacts:
                _ = path + (under or "")  # both are text
        except (OSError, ValueError, TypeError) as error:
            raise WMError(f"{folder / RECORD} is damaged ({one_line(error)}); delete it") from None
        return record


RECORD_KINDS = {
    **dict.fromkeys(("experiment", "name", "status"), str),
    **dict.fromkeys(("tags", "versions", "config"), dict),
    **dict.fromkeys(("parent", "agent"), str | None),
    "artifacts": list,
}


def open_experiment(client: MlflowClient, name: str, artifacts: Path) -> str:
    """The id of an experiment, made where there is none."""
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    local = client.tracking_uri.startswith("sqlite")  # a server has a place of its own for them
    return client.create_experiment(name, artifacts.resolve().as_uri() if local else None)


def open_run(
    client: MlflowClient, experiment_id: str, record: RunRecord, parent: str | None = None
) -> str:
    """The run of a record, set running again, or a new one."""
    if found := find_run(client, experiment_id, tags_below(record, parent)):
        client.update_run(found, status="RUNNING")
        return found
    return new_run(client, experiment_id, record, parent)


def new_run(
    client: MlflowClient, experiment_id: str, record: RunRecord, parent: str | None = None
) -> str:
    """A run with everything that describes it."""
    tags = {**tags_below(record, parent), **record.versions, MLFLOW_RUN_NAME: record.name}
    run_id = client.create_run(experiment_id, tags=tags).info.run_id
    client.log_dict(run_id, record.config, "config.yaml")
    log_params(client, run_id, {k: str(value) for k, value in flat(record.config).items()})
    return run_id


def tags_below(record: RunRecord, parent: str | None) -> dict[str, str]:
    """The tags by which the run of a record is found below a parent."""
    return record.tags | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    params = [Param(key, value) for key, value in values.items()]
    for first in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[first : first + PARAMS_PER_CALL])


def find_run(client: MlflowClient, experiment_id: str, tags: Mapping[str, str]) -> str | None:
    query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment_id], query, max_results=1)
    return found[0].info.run_id if found else None


def name_agent(client: MlflowClient, experiment_id: str, run_id: str, fingerprint: str) -> None:
    """Say on a pipeline's run which run holds its agent."""
    if found := find_run(client, experiment_id, {FINGERPRINT_TAG: fingerprint}):
        client.set_tag(run_id, AGENT_TAG, found)
