"""MLflow on sqlite: parents and children, what is logged where, and how runs end."""

import os
import shutil
import subprocess
from dataclasses import replace

import pytest

from wm import WMError, tracking
from wm.config import flat
from wm.server import RunRecord, tracking_uri
from wm.stages import Stage
from wm.tracking import LocalRecord, Tracker, download_agent, read_metrics

CONFIG = {
    "env": {"name": "tiny"},
    "scale": "smoke",
    "seed": 3,
    "part": {f"p{number}": number for number in range(150)},  # more than MLflow takes in one call
}


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "stages").mkdir()
    stage = Stage("vision", 1, {"where": str(tmp_path)}, lambda *_: None, tmp_path / "stages")
    stage.folder.mkdir()
    return stage


@pytest.fixture
def parent(runs, request):
    """A pipeline's fingerprint, of this test alone."""
    return request.node.name


def status(tracker, run_id):
    return tracker.client.get_run(run_id).info.status


def test_a_pipeline_is_a_parent_and_its_stages_are_children(runs, parent, stage):
    with Tracker(runs, CONFIG, parent) as tracker:
        with tracker.stage(stage) as run, tracker.stage(replace(stage, round=1)) as other:
            assert status(tracker, tracker.run_id) == status(tracker, run.run_id) == "RUNNING"
        assert status(tracker, run.run_id) == "FINISHED"
        assert status(tracker, tracker.run_id) == "RUNNING"
    above = tracker.client.get_run(tracker.run_id)
    assert above.info.status == "FINISHED"
    assert above.info.run_name == "tiny-smoke-seed3"
    query = f"tags.`mlflow.parentRunId` = '{tracker.run_id}'"
    children = tracker.client.search_runs([tracker.experiment_id], query)
    assert {child.info.run_id for child in children} == {run.run_id, other.run_id}
    assert {child.info.run_name for child in children} == {"vision", "vision-1"}
    params = {key: str(value) for key, value in flat(CONFIG).items()}
    for shown in (above, *children):  # every axis on every run: the table sorts by any
        assert shown.data.params == params
        assert shown.data.tags["version.torch"] and "version.commit" in shown.data.tags


def test_metrics_are_on_the_child_and_in_the_local_record(runs, parent, stage):
    with Tracker(runs, CONFIG, parent) as tracker, tracker.stage(stage) as run:
        for step, loss in enumerate([3.0, 2.0, 1.5]):
            run.log_metrics({"vision/loss": loss}, step)
    history = tracker.client.get_metric_history(run.run_id, "vision/loss")
    assert {point.step: point.value for point in history} == {0: 3.0, 1: 2.0, 2: 1.5}
    assert read_metrics(stage.folder) == {"vision/loss": {0: 3.0, 1: 2.0, 2: 1.5}}
    assert tracker.client.get_run(tracker.run_id).data.metrics == {}


def test_what_is_no_stage_has_a_child_run_too(runs, parent, tmp_path):
    with Tracker(runs, CONFIG, parent) as tracker, tracker.child("bench", "now", tmp_path) as run:
        run.log_metrics({"ratio": 2.0})
    child = tracker.client.get_run(run.run_id)
    assert (child.info.run_name, child.data.metrics) == ("bench", {"ratio": 2.0})
    assert child.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert read_metrics(tmp_path) == {"ratio": {0: 2.0}}


def test_the_summary_is_on_the_parent(runs, parent, stage):
    with Tracker(runs, CONFIG, parent) as tracker:
        with tracker.stage(stage) as run:
            pass
        tracker.summarise({"eval/mean": 12.5, "eval/ci_low": 11.0}, stage)
    shown = tracker.client.get_run(tracker.run_id).data
    assert shown.metrics == {"eval/mean": 12.5, "eval/ci_low": 11.0}
    assert shown.tags["wm.agent"] == run.run_id


@pytest.mark.parametrize(
    "failure, ending",
    [
        (ValueError, "FAILED"),
        (WMError, "FAILED"),
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),  # what a SIGTERM becomes
    ],
)
def test_a_run_ends_as_it_went(failure, ending, runs, parent, stage):
    with (
        pytest.raises(failure),
        Tracker(runs, CONFIG, parent) as tracker,
        tracker.stage(stage) as run,
    ):
        raise failure
    assert status(tracker, run.run_id) == status(tracker, tracker.run_id) == ending


def test_a_run_of_which_more_is_to_come_is_scheduled(runs, parent, stage):
    unfinished = Tracker(runs, CONFIG, parent, all_done=lambda: False)
    with unfinished as tracker, tracker.stage(stage) as run:
        pass
    assert status(tracker, tracker.run_id) == "SCHEDULED"
    assert status(tracker, run.run_id) == "FINISHED"
    assert RunRecord.load(tracker.folder).status == "SCHEDULED"


def test_the_same_fingerprint_goes_on_in_the_same_runs(runs, parent, stage):
    ids = []
    for step in (1, 2):
        with Tracker(runs, CONFIG, parent) as tracker, tracker.stage(stage) as run:
            assert status(tracker, run.run_id) == status(tracker, tracker.run_id) == "RUNNING"
            run.log_metrics({"loss": 1.0 / step}, step)
            ids.append((tracker.run_id, run.run_id))
    assert ids[0] == ids[1]
    assert len(tracker.client.get_metric_history(run.run_id, "loss")) == 2
    with Tracker(runs, CONFIG, f"{parent}, changed") as tracker, tracker.stage(stage) as run:
        assert tracker.run_id != ids[0][0]
        assert run.run_id != ids[0][1]


def test_an_agent_is_found_by_its_stages_run_and_by_the_pipelines(runs, parent, stage, tmp_path):
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "config.yaml").write_text("of the agent")
    with Tracker(runs, CONFIG, parent) as tracker:
        with pytest.raises(WMError, match="holds no agent"):
            download_agent(tracker.run_id, runs)
        with tracker.stage(stage) as run:
            run.log_folder(tmp_path / "agent", "agent")
            run.log_file(tmp_path / "agent" / "config.yaml", "elsewhere")
    for run_id in (run.run_id, tracker.run_id):
        folder = download_agent(run_id, runs)
        assert (folder / "config.yaml").read_text() == "of the agent"


def test_a_run_that_is_not_there_is_named(runs):
    with pytest.raises(WMError, match="no folder is called 'f00', and MLflow has no such run"):
        download_agent("f00", runs)


def test_a_pipeline_does_not_draw_the_next_one_into_its_runs_folder(runs, parent, stage, tmp_path):
    Tracker(runs, CONFIG, parent)
    copy = shutil.copytree(runs, tmp_path / "copy")  # a new place without the wait for a database
    with Tracker(copy, CONFIG, parent) as tracker, tracker.stage(stage) as run:
        run.log_metrics({"loss": 1.0})
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert "MLFLOW_TRACKING_URI" not in os.environ  # which later processes would inherit


def test_a_server_in_the_environment_takes_the_place_of_the_file(runs, monkeypatch):
    assert tracking_uri(runs) == f"sqlite:///{runs.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(runs) == "http://127.0.0.1:5000"


def test_the_local_record_keeps_the_last_value_of_a_step(tmp_path):
    record = LocalRecord(tmp_path)
    for loss in (5.0, 4.0):  # a resumed training passes through some steps again
        record.log_metrics({"loss": loss}, 10)
    record.log_metrics({"loss": 3.0, "score": float("nan")}, 20)
    assert read_metrics(tmp_path)["loss"] == {10: 4.0, 20: 3.0}
    assert list(read_metrics(tmp_path)["score"]) == [20]
    assert read_metrics(tmp_path / "nowhere") == {}


def test_a_line_cut_by_a_crash_does_not_spoil_the_local_record(tmp_path):
    record = LocalRecord(tmp_path)
    record.log_metrics({"loss": 5.0}, 1)
    record.log_metrics({"loss": 4.0}, 2)
    text = record.path.read_text()
    record.path.write_text(text[:-5])
    record = LocalRecord(tmp_path)
    record.log_metrics({"loss": 3.0}, 3)
    history = read_metrics(tmp_path)["loss"]
    assert (history[1], history[3]) == (5.0, 3.0)


def test_the_commit_is_of_the_code_s_own_checkout_and_marks_changes(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)
        return done.stdout.decode().strip()

    for folder in ("wm", "conf"):
        (tmp_path / folder).mkdir()
    code = tmp_path / "wm" / "tracking.py"
    code.touch()
    monkeypatch.setattr(tracking, "__file__", str(code))
    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert tracking.git_commit() == "none"  # the code is only installed there
    git("add", "wm")
    git("commit", "-m", "this one")
    head = git("rev-parse", "HEAD")
    assert tracking.git_commit() == head
    (tmp_path / "conf" / "new.yaml").touch()
    assert tracking.git_commit() == f"{head}+"
