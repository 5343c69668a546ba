"""Many pipelines at once: what is done once, what waits, what fails alone, what is stopped."""

import multiprocessing
import os
import time
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from wm import schedule
from wm.schedule import START, Pipeline, last_lines, missing_tasks, run_tasks, similar_seconds
from wm.stages import Stage, run_stage


@pytest.fixture(autouse=True)
def quick_processes(monkeypatch):
    """Forks: what is tested is the order, and imports would take most of the time."""
    monkeypatch.setattr(schedule, "CONTEXT", multiprocessing.get_context("fork"))


class NoTracker:
    """Keeps nothing."""

    versions = {}

    def stage(self, stage):
        nothing = SimpleNamespace(busy_seconds=0.0, run_id="", log_metrics=lambda facts: None)
        return nullcontext(nothing)


@pytest.fixture
def make(tmp_path):
    """make(name, *inputs, **config): a stage that counts in `begun`, takes 0.1 s, may fail."""

    def make(name, *inputs, **config):
        def work(folder, inputs, run):
            (tmp_path / "begun").open("a").write(f"{name} {os.getpid()} {time.time()}\n")
            time.sleep(config.get("seconds", 0.1))
            if (tmp_path / "broken").exists() and config.get("fails"):
                raise RuntimeError(f"{name} is broken")

        needed = {stage.name: stage for stage in inputs}
        return Stage(name, 1, config, work, tmp_path / "stages", needed)

    return make


@pytest.fixture
def run(tmp_path):
    """run(pipelines, limit): every task that was run, by name, with its success."""

    def run(pipelines, limit=2, jobs=None):
        stages = {stage.name: stage for p in pipelines for stage in p.stages}
        tasks = missing_tasks(pipelines, tmp_path / "logs")

        def do(label, words):
            print("the words are", *words, flush=True)
            run_stage(stages[label], NoTracker())

        with closing(run_tasks(tasks, do, limit)) as results:
            return {task.stage.name: done for task, done in results}

    return run


def begun(tmp_path):
    return [line.split()[0] for line in (tmp_path / "begun").read_text().splitlines()]


def test_what_pipelines_share_is_done_once_and_inputs_come_first(make, run, tmp_path):
    shared = make("shared")
    left, right = make("left", shared), make("right", shared)
    both = [Pipeline(("a=1",), (shared, left)), Pipeline(("a=2",), (shared, right))]
    assert run(both) == {"shared": True, "left": True, "right": True}
    assert begun(tmp_path)[0] == "shared" and sorted(begun(tmp_path)[1:]) == ["left", "right"]
    assert run(both) == {}  # nothing is missing


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_run_side_by_side_than_they_may(limit, make, run, tmp_path):
    stages = [make(f"s{number}", seconds=0.4) for number in range(3)]
    started = time.time()
    run([Pipeline((), tuple(stages))], limit)
    assert (time.time() - started > 1.2) == (limit == 1)


def test_a_failure_stops_what_needs_it_and_nothing_else(make, run, tmp_path):
    (tmp_path / "broken").touch()
    first, fails = make("first"), make("fails", fails=True)
    below, other = make("below", fails), make("other", first)
    pipelines = [Pipeline(("x=1",), (fails, below)), Pipeline((), (first, other))]
    assert run(pipelines) == {"fails": False, "first": True, "other": True}
    log = next((tmp_path / "logs").glob("fails-*.log"))
    assert "the words are x=1" in log.read_text()
    assert last_lines(log).endswith("RuntimeError: fails is broken")
    (tmp_path / "broken").unlink()
    assert run(pipelines) == {"fails": True, "below": True}  # where it was


def test_closing_stops_the_processes_that_run(make, tmp_path):
    slow, quick = make("slow", seconds=60), make("quick")
    tasks = missing_tasks([Pipeline((), (slow, quick))], tmp_path)
    stages = {"slow": slow, "quick": quick}
    started = time.time()
    with closing(
        run_tasks(tasks, lambda label, words: run_stage(stages[label], NoTracker()), 2)
    ) as r:
        assert next(r)[0].stage is quick
    assert time.time() - started < 30
    pids = [int(line.split()[1]) for line in (tmp_path / "begun").read_text().splitlines()]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_stage_ends_with_the_grid_that_was_killed(make, tmp_path):
    slow = make("slow", seconds=60)

    def grid():
        tasks = missing_tasks([Pipeline((), (slow,))], tmp_path)
        list(run_tasks(tasks, lambda label, words: run_stage(slow, NoTracker()), 1))

    process = schedule.CONTEXT.Process(target=grid)
    process.start()
    deadline = time.time() + 30
    while not (tmp_path / "begun").exists() or not begun(tmp_path):
        assert time.time() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    (pid,) = (int(line.split()[1]) for line in (tmp_path / "begun").read_text().splitlines())
    deadline = time.time() + 30
    while alive(pid):
        assert time.time() < deadline
        time.sleep(0.01)


def alive(pid):
    """Whether a process runs; an ended one may wait for whoever has inherited it to ask."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_the_time_is_that_of_the_most_similar_finished_stage(make, run, tmp_path):
    small, large = make("s", size=1, kind="a"), make("s", size=9, kind="b", seconds=0.5)
    (task,) = missing_tasks([Pipeline((), (small,), minutes=2)], tmp_path).values()
    assert similar_seconds(small) is None and task.seconds == START + 120
    (unknown,) = missing_tasks([Pipeline((), (small,))], tmp_path).values()
    assert unknown.seconds == 0
    for stage in (small, large):
        run([Pipeline((), (stage,))])
    assert 0.1 <= similar_seconds(make("s", size=1, kind="c", seed=2)) < 0.5
    assert similar_seconds(make("s", size=9, kind="a")) >= 0.5
    assert similar_seconds(make("s", size=2, kind="a")) is None  # another amount of work


def test_the_end_of_a_log_has_no_traces_of_progress_bars(tmp_path):
    (tmp_path / "log").write_text("begin\n 10%\r 20%\rdone\n\nend\n")
    assert last_lines(tmp_path / "log", 2) == "    done\n    end"
    assert last_lines(tmp_path / "none") == ""
