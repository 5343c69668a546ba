"""MLflow: a parent run per pipeline, a child run per stage, and a local record beside each.

Local by default (sqlite in the runs folder); MLFLOW_TRACKING_URI names a server instead. The local
record, metrics.jsonl in the stage's folder, is the truth that reports are made from.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from wm import WMError
from wm.config import flat
from wm.stages import Stage

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it announces every table it creates

PACKAGES = ("wm", "torch", "lightning", "gymnasium", "vizdoom", "mlflow", "cma", "numpy")
PIPELINE_TAG = "wm.pipeline"
FINGERPRINT_TAG = "wm.fingerprint"
AGENT_TAG = "wm.agent"
PARAMS_PER_CALL = 100  # the limit of MLflow's batch call


def tracking_uri(runs: Path) -> str:
    """The configured server, or an sqlite file in the runs folder (always absolute)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs.resolve()}/mlflow.db"


def ui_command(runs: Path) -> str:
    """The command line that shows the runs, or the address of the server that does."""
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return server
    mlflow = os.path.relpath(Path(sys.executable).parent / "mlflow")
    database = os.path.relpath(runs / "mlflow.db")
    return f"{mlflow} ui --host 127.0.0.1 --backend-store-uri sqlite:///{database}"


def git_commit() -> str:
    """The commit of the checkout this code runs from, `+` when it has changes, or 'none'."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=-3).strip()
        dirty = subprocess.check_output([*git, "status", "--porcelain", str(here)], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return commit + ("+" if dirty.strip() else "")


class LocalRecord(Logger):
    """Metrics as lines of JSON in the stage's folder; reading keeps the last value of a step."""

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / "metrics.jsonl"

    name = version = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        line = json.dumps({"step": step or 0, **{k: float(v) for k, v in metrics.items()}})
        with open(self.path, "a") as file:
            file.write("\n" + line)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in DONE.json."""


def read_metrics(folder: Path) -> dict[str, dict[int, float]]:
    """{metric: {step: value}} of a stage's local record."""
    history: dict[str, dict[int, float]] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut by a crash
        step = entry.pop("step")
        for name, value in entry.items():
            history.setdefault(name, {})[step] = value
    return history


class StageRun:
    """A child run: metrics go to MLflow and to the local record, files to MLflow."""

    def __init__(self, client: MlflowClient, logger: MLFlowLogger, folder: Path):
        self.client, self.run_id, self.busy_seconds = client, logger.run_id, 0.0
        self.loggers = [logger, LocalRecord(folder)]

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Time inside is spent with models and games; all other time of a stage is overhead."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.busy_seconds += time.perf_counter() - started

    def log_file(self, path: Path, under: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), under)

    def log_folder(self, path: Path, under: str) -> None:
        self.client.log_artifacts(self.run_id, str(path), under)


class Tracker:
    """The parent run of one pipeline and the children of its stages; use as a context manager.

    Args:
        runs: the runs folder.
        config: the resolved configuration as plain values.
        fingerprint: of the pipeline; with the same one, the same parent run goes on.
        run_id: an existing run to be the parent instead.
        experiment: another than the game's, for what is no pipeline.
        name: of the parent run.
    """

    def __init__(
        self,
        runs: Path,
        config: dict[str, Any],
        fingerprint: str,
        run_id: str | None = None,
        experiment: str | None = None,
        name: str | None = None,
    ):
        runs.mkdir(parents=True, exist_ok=True)
        self.uri, self.config = tracking_uri(runs), config
        self.experiment = experiment or config["env"]["name"]
        self.versions = {name: version(name) for name in PACKAGES} | {"commit": git_commit()}
        name = name or f"{self.experiment}-{config['scale']}-seed{config['seed']}"
        # Two that make the database at once crash, and two stages of a pipeline share one parent.
        with FileLock(runs / ".mlflow.lock"):
            self.client = MlflowClient(self.uri)
            self.experiment_id = self._experiment(runs / "artifacts" / self.experiment)
            self.run_id = run_id or self._run(name, {PIPELINE_TAG: fingerprint}, config)

    def _experiment(self, artifacts: Path) -> str:
        if found := self.client.get_experiment_by_name(self.experiment):
            return found.experiment_id
        local = self.uri.startswith("sqlite")  # a server has a place of its own for artifacts
        location = artifacts.resolve().as_uri() if local else None
        return self.client.create_experiment(self.experiment, location)

    def _run(self, name: str, tags: dict[str, str], config: dict[str, Any]) -> str:
        """The run with these tags, set running again, or a new one with everything recorded."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        if found := self.client.search_runs([self.experiment_id], query, max_results=1):
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        packages = {f"version.{key}": value for key, value in self.versions.items()}
        tags = {**tags, **packages, MLFLOW_RUN_NAME: name}
        run_id = self.client.create_run(self.experiment_id, tags=tags).info.run_id
        self.client.log_dict(run_id, config, "config.yaml")
        params = [Param(key, str(value)) for key, value in flat(config).items()]
        for first in range(0, len(params), PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=params[first : first + PARAMS_PER_CALL])
        return run_id

    def stage(self, stage: Stage) -> AbstractContextManager[StageRun]:
        """The child run of a stage."""
        return self.child(stage.label, stage.fingerprint, stage.folder)

    @contextmanager
    def child(self, name: str, fingerprint: str, folder: Path) -> Iterator[StageRun]:
        """A run below the parent; it ends FINISHED, FAILED, or KILLED when interrupted.

        fingerprint: with the same one, the same child goes on.
        folder: of its local record.
        """
        tags = {MLFLOW_PARENT_RUN_ID: self.run_id, FINGERPRINT_TAG: fingerprint}
        run_id = self._run(name, tags, self.config)
        with self._ending(run_id):
            yield StageRun(self.client, self._logger(run_id), folder)

    def cell(
        self, name: str, fingerprint: str, config: dict[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """A run below a grid's parent: what was set, and what came of it; FAILED if nothing did."""
        tags = {MLFLOW_PARENT_RUN_ID: self.run_id, FINGERPRINT_TAG: fingerprint}
        run_id = self._run(name, tags, config)
        for key, value in metrics.items():
            self.client.log_metric(run_id, key, value)
        self.client.set_terminated(run_id, "FINISHED" if metrics else "FAILED")

    def log_file(self, path: Path) -> None:
        """Put a file on the parent run."""
        self.client.log_artifact(self.run_id, str(path))

    def _logger(self, run_id: str) -> MLFlowLogger:
        """Lightning's logger, without the address that it leaves in the environment."""
        server = os.environ.get("MLFLOW_TRACKING_URI")
        logger = MLFlowLogger(self.experiment, tracking_uri=self.uri, run_id=run_id)
        _ = logger.experiment  # made when first asked for
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if server:
            os.environ["MLFLOW_TRACKING_URI"] = server
        return logger

    @contextmanager
    def _ending(self, run_id: str) -> Iterator[None]:
        status = "KILLED"
        try:
            yield
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self.client.set_terminated(run_id, status)

    def __enter__(self) -> "Tracker":
        self._end = self._ending(self.run_id)
        self._end.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._end.__exit__(*failure)

    def summarise(self, metrics: Mapping[str, float], agent_run: str | None = None) -> None:
        """Put metrics on the parent run, so that the table of runs ranks agents.

        agent_run: the run that holds the agent, if there is one; another pipeline's, where the
            stage is shared.
        """
        if agent_run:
            self.client.set_tag(self.run_id, AGENT_TAG, agent_run)
        for key, value in metrics.items():
            self.client.log_metric(self.run_id, key, value)


def download_folder(run_id: str, name: str, runs: Path) -> Path:
    """A folder of a run's artifacts, or of one of its children's; on local disk.

    Raises:
        WMError: if there is no such run or no such folder.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (runs / "mlflow.db").is_file():
        raise WMError(f"no folder is called '{run_id}', and {runs} has no MLflow database")
    client = MlflowClient(tracking_uri(runs))
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise WMError(f"no folder and no MLflow run is called '{run_id}': {error}") from None
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'"
    children = client.search_runs([run.info.experiment_id], query)  # the newest first
    shared = [run.data.tags[AGENT_TAG]] if AGENT_TAG in run.data.tags else []
    for candidate in [run_id, *shared, *(child.info.run_id for child in children)]:
        if client.list_artifacts(candidate, name):
            target = runs / "downloads" / candidate
            target.mkdir(parents=True, exist_ok=True)
            return Path(client.download_artifacts(candidate, name, str(target)))
    raise WMError(f"run {run_id} holds no {name}; it has not come so far yet")
