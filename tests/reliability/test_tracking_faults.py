"""MLflow absent, killed, slow, damaged or shared by four: the work goes on, and no measurement is
lost.
"""

import os
import shutil
import signal
import socket
import threading
import time

import numpy as np
import pytest
from mlflow import MlflowClient
from requests import HTTPError

from wm import WMError
from wm.server import FINGERPRINT_TAG, HASTE, RECORD
from wm.stages import METRICS, Stage, read_manifest
from wm.sync import sync
from wm.tracking import Tracker, download_agent, read_metrics

CONFIG = {"env": {"name": "tiny"}, "scale": "smoke", "seed": 3}


@pytest.fixture(autouse=True)
def own_haste(monkeypatch):
    for name in HASTE:
        monkeypatch.delenv(name, raising=False)


def stage(folder):
    stage = Stage("vision", 1, {"where": str(folder)}, lambda *_: None, folder / "tiny")
    stage.folder.mkdir(parents=True, exist_ok=True)
    return stage


def work(folder, during=lambda step: None, steps=10):
    """A pipeline of one stage that measures a loss and draws a picture; its run and seconds."""
    vision, started = stage(folder), time.monotonic()
    with Tracker(folder, CONFIG, "a pipeline") as tracker, tracker.stage(vision) as run:
        for step in range(steps):
            during(step)
            run.log_metrics({"loss": 1.0 / (step + 1), "odd": float("nan")}, step)
        (vision.folder / "picture.png").write_bytes(b"picture")
        run.log_file(vision.folder / "picture.png")
        tracker.summarise({"eval/mean": 3.0}, vision)
    return vision, time.monotonic() - started


def check_told_once(uri, vision):
    """MLflow has every value once, the picture, the settings and the ends of both runs."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"vision", "tiny-smoke-seed3"}
    child, parent = runs["vision"], runs["tiny-smoke-seed3"]
    points = client.get_metric_history(child.info.run_id, "loss")
    local = read_metrics(vision.folder)["loss"]
    assert sorted((point.step, point.value) for point in points) == sorted(local.items())
    assert len(client.get_metric_history(child.info.run_id, "odd")) == len(local)
    assert [f.path for f in client.list_artifacts(child.info.run_id)] == [
        "config.yaml",
        "picture.png",
    ]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.metrics == {"eval/mean": 3.0}
    assert parent.data.tags["wm.agent"] == child.info.run_id
    assert child.data.params["seed"] == "3"
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")


def test_absent_from_the_start(tmp_path, free_port, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    vision, seconds = work(tmp_path)
    assert seconds < 20
    assert capsys.readouterr().err.count("`wm sync` sends them later") == 1  # said once
    assert len(read_metrics(vision.folder)["loss"]) == 10
    with pytest.raises(WMError, match="does not answer"):
        sync(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(tmp_path)
    check_told_once(f"sqlite:///{tmp_path}/mlflow.db", vision)
    capsys.readouterr()
    sync(tmp_path)
    assert "nothing was sent" in capsys.readouterr().out
    check_told_once(f"sqlite:///{tmp_path}/mlflow.db", vision)


def test_what_is_no_stage_is_sent_later_too(tmp_path, free_port, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    folder = tmp_path / "bench"
    folder.mkdir()
    with Tracker(tmp_path, CONFIG, "bench") as tracker, tracker.child("b", "now", folder) as run:
        run.log_metrics({"ratio": 2.0})
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {"ratio": 2.0} in [run.data.metrics for run in runs]


def test_the_cells_of_a_grid_are_told_apart_later(tmp_path, free_port, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    with Tracker(tmp_path, CONFIG, "a grid", None, "ablation-grid", "grid-smoke") as tracker:
        for heat in (0.5, 1.0):
            name = f"takecover, temperature {heat}"
            metrics = {"eval/mean": 100 * heat}
            tracker.cell(name, f"{name} abc", {"temperature": heat}, metrics, True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    grid = client.get_experiment_by_name("ablation-grid").experiment_id
    parent, *rest = sorted(client.search_runs([grid]), key=lambda run: run.info.run_name)
    assert [(run.data.params, run.data.metrics) for run in rest] == [
        ({"temperature": "0.5"}, {"eval/mean": 50.0}),
        ({"temperature": "1.0"}, {"eval/mean": 100.0}),
    ]
    assert {run.data.tags["mlflow.parentRunId"] for run in rest} == {parent.info.run_id}


def test_below_a_record_that_cannot_be_read_nothing_is_sent(
    tmp_path, free_port, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    with Tracker(tmp_path, CONFIG, "a grid", None, "ablation-grid", "grid-smoke") as tracker:
        tracker.cell("cold", "cold abc", {"temperature": 0.5}, {"eval/mean": 50.0}, True)
    whole = (tracker.folder / RECORD).read_bytes()
    (tracker.folder / RECORD).write_text("half of it")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(tmp_path)
    assert "left out, as its parent's record" in capsys.readouterr().err
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    grid = client.get_experiment_by_name("ablation-grid").experiment_id
    assert client.search_runs([grid]) == []
    (tracker.folder / RECORD).write_bytes(whole)
    sync(tmp_path)
    assert len(client.search_runs([grid])) == 2


def test_a_file_that_a_server_does_not_take_holds_up_no_other(
    tmp_path, free_port, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    for name in ("large", "small"):
        with Tracker(tmp_path, CONFIG, name, None, "files", name) as tracker:
            for file in (f"{name}.txt", "other.txt"):
                (tmp_path / file).write_text(name)
                tracker.log_file(tmp_path / file)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    usual = MlflowClient.log_artifact

    def log_artifact(self, run_id, path, under=None):
        if path.endswith("large.txt"):
            raise HTTPError("413 Request Entity Too Large")
        usual(self, run_id, path, under)

    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    sync(tmp_path)
    assert "413 Request Entity Too Large" in capsys.readouterr().err
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("files").experiment_id])
    sent = {
        run.info.run_name: {file.path for file in client.list_artifacts(run.info.run_id)}
        for run in runs
    }
    assert {"other.txt", "small.txt"} <= sent["small"]
    assert "other.txt" in sent["large"] and "large.txt" not in sent["large"]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_killed_amid_a_run_and_back_later(tmp_path, free_port, serve, monkeypatch, capsys):
    uri = f"http://127.0.0.1:{free_port}"
    options = ["--host", "127.0.0.1", "--port", str(free_port)]
    options += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with serve(free_port, tmp_path, options) as server:

        def kill(step):
            if step == 5:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()

        vision, seconds = work(tmp_path / "runs", kill)
    assert seconds < 30
    assert "`wm sync` sends them later" in capsys.readouterr().err
    assert len(read_metrics(vision.folder)["loss"]) == 10
    with serve(free_port, tmp_path, options):
        sync(tmp_path / "runs")
        sync(tmp_path / "runs")
        assert "nothing was sent" in capsys.readouterr().out.splitlines()[-1]
        check_told_once(uri, vision)


@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_damaged_database_is_named_and_what_it_lacks_goes_into_a_new_one(
    damage, finish, runs, tmp_path, capsys
):
    work(runs)
    whole, runs = (runs / "mlflow.db").read_bytes(), tmp_path / "made"
    runs.mkdir()
    half = whole[: len(whole) // 2]
    noise = np.random.default_rng(0).bytes(len(half))
    (runs / "mlflow.db").write_bytes({"cut": half, "noise": half[:5000] + noise}[damage])
    vision, _ = work(runs)
    advice = f"if {runs}/mlflow.db is damaged, move it away: `wm sync`"
    assert capsys.readouterr().err.count(advice) == 1
    assert len(read_metrics(vision.folder)["loss"]) == 10
    with pytest.raises(WMError, match=advice):
        sync(runs)
    with pytest.raises(WMError, match=advice):
        download_agent("a-run", runs)
    (runs / "mlflow.db").rename(tmp_path / "away")
    code, output = finish(tmp_path, "sync")
    assert code == 0, output
    new = shutil.copy(runs / "mlflow.db", tmp_path)  # in this process the old one is still open
    check_told_once(f"sqlite:///{new}", vision)


def test_ten_seconds_for_every_call(tmp_path, monkeypatch):
    """A server that takes a call and answers only after ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")

        def answer():
            while True:
                try:
                    call, _ = listener.accept()
                except OSError:
                    return  # the test is over
                threading.Timer(10, call.close).start()

        threading.Thread(target=answer, daemon=True).start()
        vision, seconds = work(tmp_path)
        listener.shutdown(socket.SHUT_RDWR)
    assert seconds < 30
    assert len(read_metrics(vision.folder)["loss"]) == 10


def test_calls_that_take_too_long_in_all_are_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("wm.server.PATIENCE", 0.0)
    monkeypatch.setattr("wm.server.SHARE", 0.0)
    vision, _ = work(tmp_path)
    assert "it has taken" in capsys.readouterr().err
    assert len(read_metrics(vision.folder)["loss"]) == 10
    monkeypatch.undo()
    sync(tmp_path)
    check_told_once(f"sqlite:///{tmp_path}/mlflow.db", vision)


def test_four_pipelines_at_once_on_a_fresh_database(start, tmp_path, capsys):
    """All begin at the same moment, and make the random policy's score, which they share, once."""
    four = [start(tmp_path, "run", f"seed={seed}") for seed in range(4)]
    outputs = [process.communicate(timeout=600)[0] for process in four]
    for process, output in zip(four, outputs, strict=True):
        assert process.returncode == 0, output
        assert "does not answer" not in output
    runs = tmp_path / "made"
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    children = {r.data.tags.get(FINGERPRINT_TAG): r for r in client.search_runs([experiment])}
    folders = [record.parent for record in runs.glob(f"tiny/*/{RECORD}")]
    assert len(folders) == 4 * 6 + 1
    for folder in folders:
        run = children[read_manifest(folder)["fingerprint"]]
        measured = read_metrics(folder)
        assert measured and run.info.status == "FINISHED"
        for name, history in measured.items():
            points = client.get_metric_history(run.info.run_id, name)
            assert {point.step: point.value for point in points} == pytest.approx(history)
            assert len(points) == (folder / METRICS).read_text().count(f'"{name}": ')
    sync(runs)
    assert "nothing was sent" in capsys.readouterr().out
