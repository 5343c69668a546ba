"""MLflow: a parent run per pipeline, a child run per stage, and a local record beside each.

Local by default (sqlite in the runs folder); MLFLOW_TRACKING_URI names a server instead. The local
record is the truth that reports are made from: .run.json says what a run is, metrics.jsonl what was
measured. MLflow is told afterwards, as long as it answers; `wm sync` (sync.py) tells it the rest.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from wm import WMError
from wm.config import one_line
from wm.files import cannot_write, inside
from wm.ranks import rank
from wm.server import (
    AGENT_TAG,
    FAILURES,
    FINGERPRINT_TAG,
    HASTE,
    PIPELINE_TAG,
    RunRecord,
    Server,
    ServerLogger,
    if_damaged,
    name_agent,
    open_experiment,
    open_run,
    tracking_uri,
)
from wm.stages import METRICS, Stage

PACKAGES = ("wm", "torch", "lightning", "gymnasium", "vizdoom", "mlflow", "cma", "numpy")
RECORDS = ".tracking"  # of the runs that are no stages

T = TypeVar("T")


def ui_command(runs: Path) -> str:
    """The command line that shows the runs, or the address of the server that does."""
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        return server
    mlflow = os.path.relpath(Path(sys.executable).parent / "mlflow")
    database = os.path.relpath(runs / "mlflow.db")
    return f"{mlflow} ui --host 127.0.0.1 --backend-store-uri sqlite:///{database}"


def git_commit() -> str:
    """The commit of the checkout this code runs from, `+` when it has changes, or 'none'.

    None, too, where it is installed in a folder that another project's git knows.
    """
    code = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(code.parent), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        git("ls-files", "--error-unmatch", code.name)
        changes = git("status", "--porcelain", ".", "../conf")
        return git("rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def make_runs(runs: Path) -> None:
    """The runs folder.

    Raises:
        WMError: if it cannot be made or written to.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=runs).close()
    except OSError as error:
        raise WMError(f"runs={runs} cannot be used: {error.strerror}") from None


class LocalRecord(Logger):
    """Metrics as lines of JSON in the stage's folder; reading keeps the last value of a step."""

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / METRICS

    name = version = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        line = json.dumps({"step": step or 0, **{k: float(v) for k, v in metrics.items()}})
        try:
            with open(self.path, "a") as file:
                file.write("\n" + line)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint that outlives a power cut counts on it
        except OSError as error:
            raise cannot_write(self.path, len(line), error) from error

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in DONE.json."""


def read_metrics(folder: Path) -> dict[str, dict[int, float]]:
    """{metric: {step: value}} of a stage's local record; lines that are none are passed over."""
    history: dict[str, dict[int, float]] = {}
    path = inside(folder, METRICS)
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
            values = {name: float(value) for name, value in entry.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            continue  # cut by a crash
        for name, value in values.items():
            history.setdefault(name, {})[step] = value
    return history


class StageRun:
    """A child run: metrics and files are recorded here, then sent to MLflow."""

    def __init__(self, server: Server, run_id: str | None, folder: Path, record: RunRecord):
        self.server, self.run_id, self.folder, self.record = server, run_id, folder, record
        self.busy_seconds = 0.0
        self.loggers = [LocalRecord(folder), ServerLogger(server, run_id)]

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
        self._note(path, under)
        self.server.attempt(lambda: self.server.client.log_artifact(self.run_id, str(path), under))

    def log_folder(self, path: Path, under: str) -> None:
        self._note(path, under)
        self.server.attempt(lambda: self.server.client.log_artifacts(self.run_id, str(path), under))

    def _note(self, path: Path, under: str | None) -> None:
        artifact = [os.path.relpath(path, self.folder), under]
        if artifact not in self.record.artifacts:
            self.record.artifacts.append(artifact)
            self.record.save(self.folder)


class Tracker:
    """The parent run of one pipeline and the children of its stages; use as a context manager.

    Args:
        runs: the runs folder.
        config: the resolved configuration as plain values.
        fingerprint: of the pipeline; with the same one, the same parent run goes on.
        run_id: an existing run to be the parent instead; it keeps its own end.
        experiment: another than the game's, for what is no pipeline.
        name: of the parent run.
        all_done: whether it is, asked when this ends; else the run is SCHEDULED: some is to come.
    """

    def __init__(
        self,
        runs: Path,
        config: dict[str, Any],
        fingerprint: str,
        run_id: str | None = None,
        experiment: str | None = None,
        name: str | None = None,
        all_done: Callable[[], bool] = lambda: True,
    ):
        make_runs(runs)
        self.config, self.experiment = config, experiment or config["env"]["name"]
        self.versions = {name: version(name) for name in PACKAGES} | {"commit": git_commit()}
        name = name or f"{self.experiment}-{config['scale']}-seed{config['seed']}"
        self.record = self._describe(name, {PIPELINE_TAG: fingerprint})
        self.folder = runs / RECORDS / hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
        self.parent = run_id or self.folder.name
        with FileLock(runs / ".mlflow.lock"):  # two that make the database at once crash
            self.server = Server(tracking_uri(runs))
            self.client = self.server.client
            self.artifacts = runs / "artifacts" / self.experiment
            self.experiment_id = self._attempt(open_experiment, self.experiment, self.artifacts)
            self.run_id = run_id or self._open(self.record, self.folder)
        self._end: AbstractContextManager[None] = (
            nullcontext()
            if run_id
            else self._ending(self.run_id, self.record, self.folder, all_done)
        )

    def _describe(
        self,
        name: str,
        tags: dict[str, str],
        parent: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> RunRecord:
        packages = {f"version.{key}": value for key, value in self.versions.items()}
        return RunRecord(self.experiment, name, tags, packages, config or self.config, parent)

    def _attempt(self, do: Callable[..., T], *arguments: Any) -> T | None:
        return self.server.attempt(do, self.client, *arguments)

    def _open(self, record: RunRecord, folder: Path, parent: str | None = None) -> str | None:
        """The run of a record, kept in a folder; None where MLflow does not answer."""
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(WMError):  # what was sent, or should have been, before; if there is any
            earlier = RunRecord.load(folder)
            record.artifacts, record.agent = earlier.artifacts, earlier.agent
        record.save(folder)
        return self._attempt(open_run, self.experiment_id, record, parent)

    def stage(self, stage: Stage) -> AbstractContextManager[StageRun]:
        """The child run of a stage."""
        return self.child(stage.label, stage.fingerprint, stage.folder)

    @contextmanager
    def child(self, name: str, fingerprint: str, folder: Path) -> Iterator[StageRun]:
        """A run below the parent; it ends FINISHED, FAILED, or KILLED when interrupted.

        fingerprint: with the same one, the same child goes on.
        folder: of its local record.
        """
        record = self._describe(name, {FINGERPRINT_TAG: fingerprint}, self.parent)
        run_id = self._open(record, folder, self.run_id)
        with self._ending(run_id, record, folder):
            yield StageRun(self.server, run_id, folder, record)

    def cell(
        self,
        name: str,
        fingerprint: str,
        config: dict[str, Any],
        metrics: Mapping[str, float],
        finished: bool,
    ) -> None:
        """A run below a grid's parent: what was set, and what came of it."""
        key = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
        folder = self.folder.with_name(f"{self.folder.name}-{key}")  # after its parent
        record = self._describe(name, {FINGERPRINT_TAG: key}, self.parent, config)
        run_id = self._open(record, folder, self.run_id)
        StageRun(self.server, run_id, folder, record).log_metrics(metrics)
        self._end_run(run_id, record, folder, "FINISHED" if finished else "FAILED")

    def log_file(self, path: Path) -> None:
        """Put a file on the parent run, and beside its record."""
        kept = Path(shutil.copy(path, self.folder))
        StageRun(self.server, self.run_id, self.folder, self.record).log_file(kept)

    @contextmanager
    def _ending(
        self,
        run_id: str | None,
        record: RunRecord,
        folder: Path,
        all_done: Callable[[], bool] = lambda: True,
    ) -> Iterator[None]:
        status = "KILLED"
        try:
            yield
            status = "FINISHED" if all_done() else "SCHEDULED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            self._end_run(run_id, record, folder, status)

    def _end_run(self, run_id: str | None, record: RunRecord, folder: Path, status: str) -> None:
        record.status = status
        self._attempt(MlflowClient.set_terminated, run_id, status)
        with suppress(WMError):  # a full disk has ended it
            record.save(folder)

    def __enter__(self) -> "Tracker":
        self._end.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._end.__exit__(*failure)

    def summarise(self, metrics: Mapping[str, float], agent: Stage | None = None) -> None:
        """Put metrics on the parent run, so that the table of runs ranks agents.

        agent: the stage that holds the agent, if there is one; its run may be another pipeline's.
        """
        for logger in (LocalRecord(self.folder), ServerLogger(self.server, self.run_id)):
            logger.log_metrics(metrics)
        if agent:
            self.record.agent = agent.fingerprint
            self.record.save(self.folder)
            self._attempt(name_agent, self.experiment_id, self.run_id, agent.fingerprint)


class Silence(AbstractContextManager):
    """Tracker and stage's run of a rank that does not lead: the leader says and records it all."""

    loggers = ()

    def busy(self) -> AbstractContextManager[None]:
        return nullcontext()

    def log_metrics(self, *args: Any) -> None:
        """The leader's are the same."""

    summarise = log_file = log_folder = log_metrics

    def __exit__(self, *failure: Any) -> None:
        """There is nothing to end."""


def download_agent(run_id: str, runs: Path) -> Path:
    """The folder of a run's agent, or of that of one of its children; on local disk.

    Raises:
        WMError: if there is no such run or it holds no agent.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (runs / "mlflow.db").is_file():
        raise WMError(f"no folder is called '{run_id}', and {runs} has no MLflow database")
    for variable, value in HASTE.items():
        os.environ.setdefault(variable, value)
    uri = tracking_uri(runs)
    try:
        return _download(MlflowClient(uri), run_id, runs)
    except FAILURES as error:
        raise WMError(
            f"no folder is called '{run_id}', and MLflow has no such run or does not answer: "
            f"{one_line(error)}{if_damaged(uri)}"
        ) from None


def _download(client: MlflowClient, run_id: str, runs: Path) -> Path:
    run = client.get_run(run_id)
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'"
    children = client.search_runs([run.info.experiment_id], query)  # the newest first
    shared = [run.data.tags[AGENT_TAG]] if AGENT_TAG in run.data.tags else []
    for candidate in [run_id, *shared, *(child.info.run_id for child in children)]:
        if client.list_artifacts(candidate, "agent"):
            target = runs / "downloads" / f"{candidate}{rank() or ''}"  # each rank its own
            target.mkdir(parents=True, exist_ok=True)
            return Path(client.download_artifacts(candidate, "agent", str(target)))
    raise WMError(f"run {run_id} holds no agent; it has not come so far yet")
