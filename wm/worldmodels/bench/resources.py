"""What is not a rate: the memory that episodes take, and the seconds until a command begins."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from wm.data import Frames
from wm.episodes import Episode, EpisodeStore, write_shard
from wm.workers import Workers
from wm.worldmodels.bench.compare import seconds


def memory_of_episodes(scratch: Path) -> dict[str, dict[str, int]]:
    """Megabytes of a process that draws batches of frames from 100 and from 2,000 episodes."""
    sizes = {}
    for count in (100, 2000):
        folder = scratch / f"{count} episodes"
        for first in range(0, count, 100):
            hollow_shard(folder / f"shard-{first:010d}", 100)
        with Workers(1) as fresh:
            (sizes[str(count)],) = fresh.map(draw_batches, [folder], 600.0)
    return sizes


def hollow_shard(folder: Path, episodes: int, steps: int = 330) -> None:
    """A shard of black frames that takes no disk: its file is a hole."""
    empty = [
        Episode(i, np.zeros((1, 64, 64, 3), np.uint8), np.zeros((0, 1)), np.zeros(0), True, False)
        for i in range(episodes)
    ]
    write_shard(folder, empty)
    index = json.loads((folder / "index.json").read_text())
    for entry in index["episodes"]:
        entry["steps"] = steps
    (folder / "index.json").write_text(json.dumps(index))
    shape = (episodes * (steps + 1), 64, 64, 3)
    np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, shape).flush()
    np.save(folder / "actions.npy", np.zeros((episodes * steps, 1), np.float32))
    np.save(folder / "rewards.npy", np.zeros(episodes * steps, np.float32))


def draw_batches(folder: Path) -> dict[str, int]:
    """Megabytes of this process after a thousand batches of V."""
    store = EpisodeStore([folder])
    batches = Frames(store, store.split()[0], 100, 0)
    for step in range(1000):
        batches(step)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(status[key].split()[0]) // 1024
        for name, key in (("own", "RssAnon"), ("pages of files, given back at need", "RssFile"))
    }


def timed_start() -> float:
    """Seconds until a command of `wm` begins its work."""
    command = [sys.executable, "-c", "import wm.worldmodels.pipeline"]
    return round(seconds(lambda: subprocess.run(command, check=True)), 1)
