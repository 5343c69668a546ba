"""Many pipelines at once: every stage once, each in a process of its own, some side by side.

Stages of equal fingerprint are one, so two processes never meet in a folder. A stage that fails
holds up those that need it and no others.
"""

import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from wm import WMError
from wm.config import flat
from wm.processes import end_with_parent
from wm.stages import DONE, Stage, read_manifest

CONTEXT = multiprocessing.get_context("spawn")
START = 8.0  # seconds that a process takes to begin (7.6 in README)
SECONDS_TO_END = 60.0  # seconds that a stage has to write its checkpoint when all are stopped

RunStage = Callable[[str, Sequence[str]], None]  # (label, words) -> the stage is done


@dataclass(frozen=True)
class Pipeline:
    """The stages of one configuration, in order, and the words that say it."""

    words: tuple[str, ...]
    stages: tuple[Stage, ...]
    minutes: float = 0.0  # that it takes, as far as known


@dataclass(frozen=True)
class Task:
    """A stage, the words of a pipeline that it belongs to, and where it says what it does.

    guess: seconds that it may take, for want of better; 0: unknown.
    """

    stage: Stage
    words: tuple[str, ...]
    log: Path
    guess: float = 0.0

    @property
    def command(self) -> str:
        return f"wm {self.stage.name} {shlex.join(self.words)}"

    @property
    def seconds(self) -> float:
        """About how long it takes; 0: unknown."""
        known = similar_seconds(self.stage) or self.guess
        return known and START + known


def missing_tasks(pipelines: Iterable[Pipeline], logs: Path) -> dict[str, Task]:
    """What is to be done, by fingerprint, in the order of the pipelines."""
    missing: dict[str, Task] = {}
    for pipeline in pipelines:
        for stage in pipeline.stages:
            if stage.fingerprint not in missing and not stage.done:
                log, share = logs / f"{stage.folder.name}.log", len(pipeline.stages)
                task = Task(stage, pipeline.words, log, 60 * pipeline.minutes / share)
                missing[stage.fingerprint] = task
    return missing


def run_tasks(
    tasks: Mapping[str, Task], run_stage: RunStage, limit: int
) -> Iterator[tuple[Task, bool]]:
    """Run tasks, at most `limit` at once, as their inputs get done; yields each with its success.

    Tasks that need one that failed are never begun. Closing the iterator stops all processes.
    """
    waiting, unfinished, running = dict(tasks), set(tasks), {}
    try:
        while True:
            for task in _ready(waiting, unfinished)[: limit - len(running)]:
                del waiting[task.stage.fingerprint]
                process = _start(task, run_stage, one_thread=limit > 1)
                running[process.sentinel] = (process, task)
            if not running:
                return
            for sentinel in wait(list(running)):
                process, task = running.pop(sentinel)
                process.join()
                if done := task.stage.done:  # an exit code says little
                    unfinished.remove(task.stage.fingerprint)
                else:
                    _say_more(task.log, process.exitcode or 0)
                yield task, done
    finally:
        _stop([process for process, _ in running.values()])


def _ready(waiting: Mapping[str, Task], unfinished: set[str]) -> list[Task]:
    return [
        task
        for task in waiting.values()
        if not any(needed.fingerprint in unfinished for needed in task.stage.inputs.values())
    ]


def _start(task: Task, run_stage: RunStage, one_thread: bool) -> BaseProcess:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    arguments = (run_stage, task.stage.label, task.words, task.log, one_thread, os.getpid())
    process = CONTEXT.Process(target=_work, args=arguments)
    process.start()
    return process


def _work(
    run_stage: RunStage, label: str, words: Sequence[str], log: Path, one_thread: bool, owner: int
) -> None:
    """In the process: what it prints goes to its log; a SIGTERM ends it as it ends `wm run`, and
    comes too when its owner is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the parent hears, and sends SIGTERM
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    end_with_parent(signal.SIGTERM)
    if os.getppid() != owner:  # it has ended already
        sys.exit(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 (to the process's end)
    for stream in (1, 2):  # of libraries and of its own processes
        os.dup2(sys.stdout.fileno(), stream)
    if one_thread:
        torch.set_num_threads(1)
    run_stage(label, words)


def _say_more(log: Path, exit_code: int) -> None:
    """Add to the log of a failed stage what its process cannot have said."""
    if exit_code > 0:
        return
    changed = "not the stage that was asked for: configuration or code has changed meanwhile"
    with open(log, "a") as file:
        print(f"killed by signal {-exit_code}" if exit_code else changed, file=file)


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(SECONDS_TO_END)
        process.kill()


def similar_seconds(stage: Stage) -> float | None:
    """What the finished stage of this name took whose configuration agrees in most keys.

    In all whole numbers, too, but the training seed: they say how much there is to do.
    """
    wanted, seconds = flat(dict(stage.config)), {}
    for path in stage.root.glob(f"{stage.label}-*/{DONE}"):
        with suppress(WMError):  # a damaged one says nothing of time
            config, taken = _finished(path)
            if _amounts(config) == _amounts(wanted):
                seconds[sum(item in config.items() for item in wanted.items())] = taken
    return seconds[max(seconds)] if seconds else None


def _amounts(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        key: value
        for key, value in config.items()
        if type(value) is int and key.split(".")[-1] != "seed"
    }


@cache
def _finished(manifest: Path) -> tuple[dict[str, Any], float]:
    """Configuration and seconds of a finished stage."""
    record = read_manifest(manifest.parent)
    return flat(record["config"]), record["seconds"]


def last_lines(log: Path, count: int = 8) -> str:
    """The end of a log, without the traces of progress bars."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-count:])
