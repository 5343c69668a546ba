"""What a stage is: a name, a configuration, inputs, and the folder that these three determine.

The folder's name ends in the stage's fingerprint: the hash of its own configuration, its version
and the fingerprints of its inputs. So a changed configuration leads to new folders for that stage
and those below it, pipelines share the stages they have in common, and nothing is overwritten. A
stage is finished when its folder holds DONE.json.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wm import WMError
from wm.config import one_line
from wm.files import check_kinds, inside, read_json, sha256, write_atomically
from wm.ranks import is_led, leads, led

DONE = "DONE.json"
CHECKPOINTS = "checkpoints"
CLOCK = ".seconds"  # what interrupted runs took
LOCK = ".lock"  # of a stage that has been begun
GLANCE = 0.2  # seconds between two looks for what another rank makes
METRICS = "metrics.jsonl"  # what the stage has measured: reports are made from it
MANIFEST = {  # what DONE.json holds, and of which kind
    "fingerprint": str,
    "config": dict,
    "inputs": dict,
    "seconds": int | float,
    "busy_seconds": int | float,
    "facts": dict,
    "versions": dict,
    "run_id": str | None,
    "files": dict,
}


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: what it is called on the command line.
        version: raised whenever the stage's code changes what it makes.
        config: everything its result depends on, as plain values.
        inputs: the stages whose folders it reads, by role.
        round: of a pipeline that goes round more than once; None for what is done once.
        work: makes the outputs in a folder, work(folder, {role: input folder}, run), and returns
            facts for the record, numbers by name.
        root: where the folders of all stages lie.
        reads: the files of its inputs that it reads, as patterns of their names.
    """

    name: str
    version: int
    config: Mapping[str, Any]
    work: Callable[[Path, dict[str, Path], Any], dict[str, Any] | None]
    root: Path
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    round: int | None = None
    reads: tuple[str, ...] = ("*",)

    @cached_property
    def fingerprint(self) -> str:
        inputs = {role: stage.fingerprint for role, stage in self.inputs.items()}
        record = [self.name, self.version, self.round, dict(self.config), inputs]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    @property
    def label(self) -> str:
        return self.name if self.round is None else f"{self.name}-{self.round}"

    @property
    def folder(self) -> Path:
        return self.root / f"{self.label}-{self.fingerprint[:12]}"

    @property
    def done(self) -> bool:
        return self.record is not None

    @property
    def record(self) -> dict[str, Any] | None:
        """The DONE manifest, or None while the stage is unfinished or a file of it is missing.

        Raises:
            WMError: if the manifest is damaged, another stage's, or names files elsewhere.
        """
        manifest = read_manifest(self.folder)
        if manifest and manifest["fingerprint"] != self.fingerprint:
            raise WMError(
                f"{self.folder} holds a stage of another configuration; move it elsewhere and rerun"
            )
        return manifest if manifest and _all_there(self.folder, manifest) else None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What DONE.json of a folder says, or None where there is none.

    Raises:
        WMError: if it is no manifest.
    """
    try:
        manifest = read_json(folder / DONE)
        check_kinds(manifest, MANIFEST)
        if not all(isinstance(fact, int | float) for fact in manifest["facts"].values()):
            raise TypeError("a fact is no number")
        for entry in manifest["files"].values():
            int(entry["bytes"]), str(entry["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise WMError(
            f"{folder / DONE} is damaged ({one_line(error)}); delete it and rerun"
        ) from error
    return manifest


def _all_there(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every output has its size; to look at hashes here would read all data every time."""
    paths = {inside(folder, name): entry["bytes"] for name, entry in manifest["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def damaged(stage: Stage, names: tuple[str, ...] = ("*",)) -> list[Path]:
    """The outputs of a finished stage, of such names, that have not the hash they had then."""
    return _damaged(stage.folder, (stage.folder / DONE).stat().st_mtime_ns, names)


@cache
def _damaged(folder: Path, written: int, names: tuple[str, ...]) -> list[Path]:
    """Every command reads what it builds on once from end to end; `written` tells one making of a
    stage from the next.
    """
    files = read_manifest(folder)["files"].items()
    read = [(name, entry) for name, entry in files if any(fnmatch(name, n) for n in names)]
    paths = {inside(folder, name): entry["sha256"] for name, entry in read}
    return [path for path, digest in paths.items() if not path.is_file() or sha256(path) != digest]


def run_stage(
    stage: Stage,
    tracker: Any,
    words: Sequence[str] = (),
    repair: bool = False,
    wait: bool = False,
) -> Path:
    """Do the stage's work unless it is done already; its folder.

    words: of the command, for messages that say which one makes what is missing.
    repair: look at the hashes of what is done, and make again what is damaged.
    wait: for another process that works in the folder, which pipelines may share.

    Raises:
        WMError: if an input is missing or damaged, or another process works in the folder.
    """
    if not leads():
        return _help(stage, tracker)
    if stage.done and not (repair and damaged(stage)):
        print(f"{stage.label}: done before, in {stage.folder}")
        return stage.folder
    for needed in stage.inputs.values():
        its_name = stage.name if needed.name == "agent" else needed.name  # which has no command
        its_command = " ".join(["wm", its_name, *words])
        if not needed.done:
            everything = " ".join(["wm", "run", *words])
            raise WMError(
                f"{stage.label} needs {needed.label}, which is not there; `{its_command}` makes "
                f"it, and `{everything}` all that is missing"
            )
        if bad := damaged(needed, stage.reads):
            raise WMError(f"{bad[0]} is damaged; `{its_command} --repair` makes it again, the same")
    stage.folder.mkdir(parents=True, exist_ok=True)
    with _locked(stage, wait):
        if stage.done and not (repair and damaged(stage)):  # by another process, meanwhile
            return stage.folder
        if (stage.folder / DONE).is_file():
            _remove(stage, damaged(stage))
        (stage.folder / DONE).unlink(missing_ok=True)  # of a result that was damaged since
        print(f"{stage.label}: in {stage.folder}", flush=True)
        with led(stage.folder):
            _work(stage, tracker)
    return stage.folder


def _locked(stage: Stage, wait: bool) -> AbstractContextManager:
    """The lock of a stage's folder, held until its context ends."""
    lock = FileLock(stage.folder / LOCK)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise WMError(f"another process is working in {stage.folder}; wait for it") from None
    print(f"{stage.label}: waits for another process, in {stage.folder}", flush=True)
    return lock.acquire()


def _help(stage: Stage, tracker: Any) -> Path:
    """Do this rank's share of a stage that the leader works on, and wait until all is done."""
    _wait_until(lambda: stage.done or is_led(stage.folder))
    if not stage.done:
        inputs = {role: needed.folder for role, needed in stage.inputs.items()}
        stage.work(stage.folder, inputs, tracker)
        _wait_until(lambda: stage.done)
    return stage.folder


def _wait_until(seen: Callable[[], bool]) -> None:
    while not seen():  # a launcher ends those who wait for a leader that is gone
        time.sleep(GLANCE)


def _remove(stage: Stage, paths: list[Path]) -> None:
    """Remove what is damaged; where measurements are, the steps too that they were made in."""
    for path in paths:
        print(f"{stage.label}: {path} is damaged and is made again", flush=True)
        path.unlink(missing_ok=True)
    if stage.folder / METRICS in paths:
        shutil.rmtree(stage.folder / CHECKPOINTS, ignore_errors=True)
        (stage.folder / CLOCK).unlink(missing_ok=True)


def _work(stage: Stage, tracker: Any) -> None:
    clock = stage.folder / CLOCK
    before, busy_before = _earlier_seconds(clock)
    started = time.time()
    inputs = {role: needed.folder for role, needed in stage.inputs.items()}
    with tracker.stage(stage) as run:
        try:
            facts = stage.work(stage.folder, inputs, run) or {}
        finally:
            seconds, busy = before + time.time() - started, busy_before + run.busy_seconds
            with suppress(WMError):  # a full disk has stopped the work: say that instead
                write_atomically(clock, json.dumps([seconds, busy]))
        run.log_metrics({"seconds": seconds, "busy_seconds": busy, **facts})
    manifest = {
        "stage": stage.label,
        "fingerprint": stage.fingerprint,
        "config": dict(stage.config),
        "inputs": {role: needed.fingerprint for role, needed in stage.inputs.items()},
        "seconds": seconds,
        "busy_seconds": busy,
        "facts": facts,
        "versions": tracker.versions,
        "run_id": run.run_id,
        "files": {
            str(path.relative_to(stage.folder)): {
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path in _outputs(stage.folder)
        },
    }
    write_atomically(stage.folder / DONE, json.dumps(manifest, indent=1))
    print(f"{stage.label}: finished in {seconds:.0f} s", flush=True)


def _earlier_seconds(clock: Path) -> tuple[float, float]:
    """What earlier, interrupted runs took: in all, and with models and games."""
    try:
        seconds, busy = map(float, read_json(clock))
        return seconds, busy
    except (OSError, ValueError, TypeError):  # there was none
        return 0.0, 0.0


def _outputs(folder: Path) -> list[Path]:
    """What a stage leaves to others: not its checkpoints, nor files of its own housekeeping."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", CHECKPOINTS)) for part in path.relative_to(folder).parts)
    ]
