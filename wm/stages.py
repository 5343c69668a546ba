"""What a stage is: a name, a configuration, inputs, and the folder that these three determine.

The folder's name ends in the stage's fingerprint: the hash of its own configuration, its version
and the fingerprints of its inputs. So a changed configuration leads to new folders for that stage
and those below it, pipelines share the stages they have in common, and nothing is overwritten. A
stage is finished when its folder holds DONE.json.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wm import WMError
from wm.files import sha256, write_atomically

DONE = "DONE.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: what it is called on the command line.
        version: raised whenever the stage's code changes what it makes.
        config: everything its result depends on, as plain values.
        inputs: the stages whose folders it reads, by role.
        work: makes the outputs in a folder, work(folder, {role: input folder}, run), and returns
            facts for the record, numbers by name.
        root: where the folders of all stages lie.
    """

    name: str
    version: int
    config: Mapping[str, Any]
    work: Callable[[Path, dict[str, Path], Any], dict[str, Any] | None]
    root: Path
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    round: int | None = None

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
        """The DONE manifest, or None while the stage is unfinished or a file of it is missing."""
        try:
            manifest = json.loads((self.folder / DONE).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise WMError(
                f"{self.folder / DONE} is damaged ({error}); delete it and rerun"
            ) from error
        intact = all(
            (self.folder / name).is_file() and (self.folder / name).stat().st_size == entry["bytes"]
            for name, entry in manifest["files"].items()
        )
        return manifest if intact else None


def run_stage(stage: Stage, tracker: Any, command: str = "wm run") -> Path:
    """Do the stage's work unless it is done already; its folder.

    Raises:
        WMError: if an input is missing, or another process works in the folder.
    """
    if stage.done:
        print(f"{stage.label}: done before, in {stage.folder}")
        return stage.folder
    for needed in stage.inputs.values():
        if not needed.done:
            raise WMError(
                f"{stage.label} needs {needed.label}, which is not there; "
                f"`{command.replace(stage.name, needed.name, 1)}` makes it"
            )
    stage.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(stage.folder / ".lock", timeout=0):
            (stage.folder / DONE).unlink(missing_ok=True)  # of a result that was damaged since
            print(f"{stage.label}: in {stage.folder}", flush=True)
            _work(stage, tracker)
    except Timeout:
        raise WMError(f"another process is working in {stage.folder}; wait for it") from None
    return stage.folder


def _work(stage: Stage, tracker: Any) -> None:
    clock = (
        stage.folder / ".seconds"
    )  # of earlier, interrupted runs: all, and with models and games
    before, busy_before = json.loads(clock.read_text()) if clock.exists() else (0.0, 0.0)
    started = time.time()
    inputs = {role: needed.folder for role, needed in stage.inputs.items()}
    with tracker.stage(stage) as run:
        try:
            facts = stage.work(stage.folder, inputs, run) or {}
        finally:
            seconds, busy = before + time.time() - started, busy_before + run.busy_seconds
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


def _outputs(folder: Path) -> list[Path]:
    """What a stage leaves to others: not its checkpoints, nor files of its own housekeeping."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", CHECKPOINTS)) for part in path.relative_to(folder).parts)
    ]
