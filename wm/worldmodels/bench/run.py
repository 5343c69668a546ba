"""`wm bench`: all comparisons and tables in one run."""

import json
import re
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from wm.files import write_atomically
from wm.stages import Stage
from wm.tracking import Tracker
from wm.workers import Workers
from wm.worldmodels.bench.compare import PAIRS, Comparison
from wm.worldmodels.bench.dreams import dreams, growth
from wm.worldmodels.bench.games import games
from wm.worldmodels.bench.resources import memory_of_episodes, timed_start
from wm.worldmodels.bench.training import training


def bench(runs: Path) -> None:
    """All comparisons and tables, on the screen, in bench.json and in MLflow."""
    started = time.time()
    settings = {"env": {"name": "bench"}, "scale": "bench", "seed": 0}
    (runs / "bench").mkdir(parents=True, exist_ok=True)
    with (
        Tracker(runs, settings, f"bench {started}") as tracker,
        tempfile.TemporaryDirectory(prefix="wm-bench-") as scratch,
    ):
        stage = Stage("bench", 1, settings, print, runs / "bench")
        stage.folder.mkdir(exist_ok=True)
        with tracker.stage(stage) as run, Workers(0) as workers, Workers(1) as alone:
            print(f"{workers.count} cores, {PAIRS} pairs each: ours, theirs, ratio [least, most]\n")
            results = [*dreams(workers, Path(scratch)), *games(workers, alone, Path(scratch))]
            results += [*training(run.loggers, Path(scratch))]
            tables = {
                "dream seconds": growth(workers, Path(scratch)),
                "memory of episodes": memory_of_episodes(Path(scratch)),
                "seconds to start": timed_start(),
            }
        print(f"\n{json.dumps(tables, indent=1)}\n{time.time() - started:.0f} s in all")
        record = {"comparisons": [asdict(result) for result in results], **tables}
        path = runs / "bench" / "bench.json"
        write_atomically(path, json.dumps({**record, "versions": tracker.versions}, indent=1))
        ratios = {metric_name(result): median(result.ratios) for result in results}
        tracker.summarise(ratios, run.run_id)
        run.log_file(path)
    print(path)


def metric_name(result: Comparison) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w ./-]", "", f"ratio/{result.name} - {result.against}")
