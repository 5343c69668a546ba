"""`wm sync`: tell MLflow what it has not heard, once.

The local records are compared with what MLflow has, value by value and file by file; nothing has to
be remembered, and doing it again sends nothing.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Metric
from requests import HTTPError

from wm import WMError
from wm.config import flat, one_line
from wm.files import inside
from wm.server import (
    AGENT_TAG,
    FAILURES,
    RECORD,
    RunRecord,
    find_run,
    if_damaged,
    log_params,
    name_agent,
    new_run,
    open_experiment,
    tags_below,
    tracking_uri,
)
from wm.tracking import RECORDS, read_metrics

RUN_ID_LETTERS = 32  # of MLflow; the folder of a record has fewer
METRICS_PER_CALL = 1000  # the limit of MLflow's batch call


def sync(runs: Path) -> None:
    """Send what is missing of all runs in a folder, parents first.

    Raises:
        WMError: if there is no such folder, or MLflow does not answer.
    """
    if not runs.is_dir():
        raise WMError(f"there is no folder {runs}")
    uri = tracking_uri(runs)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    parents, sent = {}, 0  # runs by the folders of their records
    folders = [path.parent for path in sorted(runs.glob(f"{RECORDS}/*/{RECORD}"))]
    for places in ("[!.]*", "[!.]*/*"):
        folders += [path.parent for path in sorted(runs.glob(f"{places}/{RECORD}"))]
    try:
        client = MlflowClient(uri)
        for folder in folders:
            sent += _sync_unlocked(client, runs, folder, parents)
        for folder in folders:  # when all runs are there
            _name_agent(client, folder, parents)
    except FAILURES as error:
        raise WMError(
            f"MLflow at {uri} does not answer ({one_line(error)}); try again{if_damaged(uri)}"
        ) from None
    print(f"{uri}: {sent} values and files sent" if sent else f"{uri}: nothing was sent")


def _sync_unlocked(client: MlflowClient, runs: Path, folder: Path, parents: dict[str, str]) -> int:
    """The number of values and files that were sent of a run, if no process works on it."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            record = RunRecord.load(folder)
            return _sync_run(client, runs, folder, record, parents)
    except Timeout:
        print(f"{folder}: another process is working in it", file=sys.stderr)
    except (WMError, HTTPError) as error:  # that of a web server before it, which answers
        print(f"{folder}: {one_line(error)}", file=sys.stderr)
    return 0


def _sync_run(
    client: MlflowClient, runs: Path, folder: Path, record: RunRecord, parents: dict[str, str]
) -> int:
    artifacts = inside(runs / "artifacts", record.experiment)
    experiment = open_experiment(client, record.experiment, artifacts)
    parent = parents.get(record.parent, record.parent)
    if parent and len(parent) != RUN_ID_LETTERS:  # the folder of a record that could not be read
        raise WMError(f"left out, as its parent's record in {runs / RECORDS / parent} was not sent")
    found = find_run(client, experiment, tags_below(record, parent))
    run_id = found or new_run(client, experiment, record, parent)
    parents[folder.name] = run_id
    run = client.get_run(run_id)
    params = {key: str(value) for key, value in flat(record.config).items()}
    log_params(client, run_id, {k: v for k, v in params.items() if k not in run.data.params})
    if not any(file.path == "config.yaml" for file in client.list_artifacts(run_id)):
        client.log_dict(run_id, record.config, "config.yaml")
    values = list(_missing_values(client, run_id, folder))
    for first in range(0, len(values), METRICS_PER_CALL):
        client.log_batch(run_id, values[first : first + METRICS_PER_CALL])
    if record.status not in ("RUNNING", run.info.status):
        client.set_terminated(run_id, record.status)
    files = [
        _send(client, run_id, *file) for file in _missing_files(client, run_id, folder, record)
    ]
    if values or files:
        print(f"{record.name}: {len(values)} values and {sum(files)} of {len(files)} files sent")
    return len(values) + sum(files)


def _send(client: MlflowClient, run_id: str, path: Path, under: str | None) -> bool:
    """Whether a server that answers takes a file: a web server before it may find it too large."""
    try:
        client.log_artifact(run_id, str(path), under)
    except HTTPError as error:
        print(f"{path}: {one_line(error)}", file=sys.stderr)
        return False
    return True


def _name_agent(client: MlflowClient, folder: Path, parents: dict[str, str]) -> None:
    if folder.name in parents and (agent := RunRecord.load(folder).agent):
        run = client.get_run(parents[folder.name])
        if AGENT_TAG not in run.data.tags:
            name_agent(client, run.info.experiment_id, run.info.run_id, agent)


def _missing_values(client: MlflowClient, run_id: str, folder: Path) -> Iterator[Metric]:
    for name, history in read_metrics(folder).items():
        known = client.get_metric_history(run_id, name)
        there = {(point.step, _kept(point.value)) for point in known}
        for step, value in history.items():
            if (step, _kept(value)) not in there:
                yield Metric(name, value, int(1000 * (folder / RECORD).stat().st_mtime), step)


def _kept(value: float) -> float | str:
    """A value as MLflow keeps it, to be compared: infinity is its largest number."""
    if math.isnan(value):
        return "nan"
    return max(-sys.float_info.max, min(value, sys.float_info.max))


def _missing_files(
    client: MlflowClient, run_id: str, folder: Path, record: RunRecord
) -> Iterator[tuple[Path, str | None]]:
    for name, under in record.artifacts:
        path = inside(folder, name)
        listed = client.list_artifacts(run_id, under)
        there = {PurePosixPath(file.path).name: file.file_size for file in listed}
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            file = inside(folder, str(file.relative_to(folder)))
            if file.is_file() and there.get(file.name) != file.stat().st_size:
                yield file, under
