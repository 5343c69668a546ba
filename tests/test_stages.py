"""Stages: what makes a new one, what is done again and what is not."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from wm import WMError
from wm.ranks import led
from wm.stages import CHECKPOINTS, DONE, METRICS, Stage, run_stage
from wm.tracking import Silence


class Work:
    """Writes what it was given, and counts."""

    def __init__(self, fails=0):
        self.calls, self.fails = 0, fails

    def __call__(self, folder, inputs, run):
        self.calls += 1
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        (folder / CHECKPOINTS / "step=1.ckpt").write_text("half")
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / "output").write_text("".join(sorted(inputs)) + "made")
        if self.calls <= self.fails:
            raise RuntimeError("the work failed")
        return {"fact": 4.0}


@pytest.fixture
def first(tmp_path):
    return Stage("first", 1, {"size": 1, "deep": {"er": 2}}, Work(), tmp_path)


@pytest.fixture
def second(first, tmp_path):
    return Stage("second", 1, {"size": 1}, Work(), tmp_path, {"source": first})


def with_input(stage, **changes):
    return replace(stage, inputs={"source": replace(stage.inputs["source"], **changes)})


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: replace(stage, config={"size": 2}),
        lambda stage: replace(stage, config={"size": 1, "more": 0}),
        lambda stage: replace(stage, version=2),
        lambda stage: replace(stage, round=0),
        lambda stage: replace(stage, name="other"),
        lambda stage: replace(stage, inputs={}),
        lambda stage: replace(stage, inputs={"role": stage.inputs["source"]}),
        lambda stage: with_input(stage, config={"size": 1, "deep": {"er": 3}}),
        lambda stage: with_input(stage, version=2),
    ],
    ids=[
        "config",
        "key",
        "version",
        "round",
        "name",
        "no input",
        "role",
        "config of an input",
        "version of an input",
    ],
)
def test_whatever_decides_the_result_leads_to_another_folder(change, second):
    assert change(second).fingerprint != second.fingerprint
    assert change(second).folder != second.folder


@pytest.mark.parametrize(
    "change",
    [
        lambda stage: replace(stage, root=Path("/elsewhere")),
        lambda stage: replace(stage, work=Work()),
        lambda stage: with_input(stage, root=Path("/elsewhere")),
        lambda stage: with_input(stage, config={"deep": {"er": 2}, "size": 1}),  # another order
        lambda stage: replace(stage),
    ],
    ids=["root", "work", "root of an input", "order", "nothing"],
)
def test_nothing_else_does(change, second):
    assert change(second).fingerprint == second.fingerprint


def test_a_finished_stage_is_skipped_and_says_so(second, tracker, capsys):
    for stage in (second.inputs["source"], second):
        run_stage(stage, tracker)
    assert second.record["facts"] == {"fact": 4.0}
    assert second.record["inputs"] == {"source": second.inputs["source"].fingerprint}
    assert list(second.record["files"]) == ["deep/output", "metrics.jsonl"]  # no checkpoints
    again = replace(second, work=Work())
    capsys.readouterr()
    assert run_stage(again, tracker) == second.folder
    assert again.work.calls == 0
    assert "second: done before" in capsys.readouterr().out


def test_a_missing_input_names_the_command_that_makes_it(second, tracker):
    with pytest.raises(WMError, match=r"second needs first.*`wm first env=tiny seed=3` makes it"):
        run_stage(second, tracker, ["env=tiny", "seed=3"])
    assert second.work.calls == 0 and not second.folder.exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 2)])
def test_a_missing_or_cut_output_is_made_again(damage, first, tracker):
    run_stage(first, tracker)
    output = first.folder / "deep" / "output"
    damage(output)
    assert not first.done
    run_stage(first, tracker)
    assert first.work.calls == 2
    assert first.done and output.read_text() == "made"
    run_stage(first, tracker)
    assert first.work.calls == 2  # once


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 2)])
def test_measurements_are_made_again_with_the_steps_they_were_made_in(damage, first, tracker):
    run_stage(first, tracker)
    damage(first.folder / METRICS)
    leftover = first.folder / CHECKPOINTS / "of the first making"
    leftover.touch()
    run_stage(first, tracker)
    assert first.done and not leftover.exists()


def test_what_another_process_has_finished_meanwhile_is_left_as_it_is(
    first, second, tracker, monkeypatch
):
    run_stage(first, tracker)
    looks = []

    def look(stage, names):  # takes so long that another process finishes what waits for it
        if not looks:
            looks.append(stage)
            run_stage(second, tracker)
        return []

    monkeypatch.setattr("wm.stages.damaged", look)
    run_stage(second, tracker)
    assert looks == [first] and second.work.calls == 1 and second.done


def test_only_what_a_stage_reads_of_its_inputs_must_be_undamaged(first, second, tracker):
    run_stage(first, tracker)
    path = first.folder / "deep" / "output"
    path.write_text(path.read_text().swapcase())  # as long as before
    with pytest.raises(WMError, match="output is damaged"):
        run_stage(second, tracker)
    with pytest.raises(WMError, match="output is damaged"):
        run_stage(replace(second, reads=("*put",)), tracker)
    run_stage(replace(second, reads=(METRICS,)), tracker)
    assert second.done


def test_another_rank_works_when_the_leader_does_and_stays_until_all_is_done(
    first, tracker, as_rank
):
    run_stage(first, tracker)
    done, away = first.folder / DONE, first.folder / "away"
    done.rename(away)
    as_rank(1, 2)
    rank = threading.Thread(target=run_stage, args=(first, Silence()), daemon=True)
    rank.start()
    rank.join(0.5)
    assert first.work.calls == 1  # the leader's: it may be waiting for others in the folder
    with led(first.folder):
        rank.join(1.5)
        assert first.work.calls == 2 and rank.is_alive()
        away.rename(done)
    rank.join(10)
    assert not rank.is_alive()
    assert not list(first.folder.glob(".led*"))


def test_a_stage_that_is_made_again_and_fails_is_not_done(first, tracker):
    run_stage(first, tracker)
    (first.folder / "deep" / "output").unlink()
    with pytest.raises(RuntimeError, match="the work failed"):
        run_stage(replace(first, work=Work(fails=1)), tracker)
    assert not first.done  # though every output is there again, half made


@pytest.mark.parametrize("text", ["", '{"files": '])
def test_a_damaged_manifest_is_named(text, first, tracker):
    run_stage(first, tracker)
    (first.folder / DONE).write_text(text)
    with pytest.raises(WMError, match=rf"{DONE} is damaged.*delete it and rerun"):
        run_stage(first, tracker)


def test_a_failing_stage_is_not_done_and_goes_on_where_it_was(first, tracker):
    stage = replace(first, work=Work(fails=1))
    with pytest.raises(RuntimeError, match="the work failed"):
        run_stage(stage, tracker)
    assert not stage.done and not (stage.folder / DONE).exists()
    assert (stage.folder / CHECKPOINTS / "step=1.ckpt").exists()
    run_stage(stage, tracker)
    assert stage.done and stage.work.calls == 2


def test_a_second_process_on_a_folder_is_refused_or_waits(first, tracker, capsys):
    first.folder.mkdir()
    hold = "import sys, filelock; l = filelock.FileLock(sys.argv[1]); l.acquire(); print(); input()"
    command = [sys.executable, "-c", hold, str(first.folder / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()  # it has the lock
        with pytest.raises(WMError, match="another process is working in"):
            run_stage(first, tracker)
        assert first.work.calls == 0
        threading.Timer(1, other.kill).start()
        run_stage(first, tracker, wait=True)
    assert first.done and "first: waits for another process" in capsys.readouterr().out
