"""`wm bench`: all comparisons and tables in one run."""

import json
import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from wm.files import write_atomically
from wm.tracking import Tracker, make_runs
from wm.workers import Workers
from wm.worldmodels.bench.compare import PAIRS, Comparison
from wm.worldmodels.bench.dreams import dreams
from wm.worldmodels.bench.games import games
from wm.worldmodels.bench.growth import growth
from wm.worldmodels.bench.resources import memory_of_episodes, timed_start
from wm.worldmodels.bench.training import Loggers, training


def bench(runs: Path) -> None:
    """All comparisons and tables, on the screen, in bench.json and in MLflow."""
    started, path = time.time(), runs / "bench" / "bench.json"
    make_runs(runs)
    path.parent.mkdir(exist_ok=True)
    settings = {"env": {"name": "bench"}, "scale": "bench", "seed": 0}
    fingerprint = f"bench {started}"  # measured anew every time
    with (
        Tracker(runs, settings, fingerprint) as tracker,
        tracker.child("bench", fingerprint, path.parent) as run,
        tempfile.TemporaryDirectory(prefix="wm-bench-") as scratch,
    ):
        results, tables = measure(run.loggers, Path(scratch))
        print(f"\n{json.dumps(tables, indent=1)}\n{time.time() - started:.0f} s in all")
        record = {"comparisons": [asdict(result) for result in results], **tables}
        write_atomically(path, json.dumps({**record, "versions": tracker.versions}, indent=1))
        run.log_file(path)
        tracker.summarise({metric_name(result): median(result.ratios) for result in results})
    print(path)


def measure(loggers: Loggers, scratch: Path) -> tuple[list[Comparison], dict[str, Any]]:
    """Everything, in turn: two measurements at once would slow each other down."""
    with Workers(0) as workers, Workers(1) as alone:
        print(f"{workers.count} cores, {PAIRS} pairs each: ours, theirs, ratio [least, most]\n")
        results = [*dreams(workers, scratch), *games(workers, alone, scratch)]
        results += training(loggers, scratch)
        tables = {
            **growth(workers, alone, scratch),
            "memory of episodes": memory_of_episodes(scratch),
            "seconds to start": timed_start(),
        }
    return results, tables


def metric_name(result: Comparison) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w ./-]", "", f"ratio/{result.name} - {result.against}")
