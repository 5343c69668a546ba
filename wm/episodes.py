"""Episodes on disk: uint8 frames in memory-mapped shards, with what was done and what came of it.

A shard is a folder of plain .npy files and an index; it appears whole or not at all. The frames of
an episode of T steps are T+1: the last one is what the final action led to.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorWrapper

from wm import WMError
from wm.config import one_line
from wm.envs import FRAME
from wm.files import cannot_write, check_kinds, read_array, read_json, sha256

ARRAYS = ("frames", "actions", "rewards")
VALIDATION_EVERY = 10  # every tenth episode is for validation


@dataclass(frozen=True)
class Episode:
    """T steps: frames [T+1,64,64,3] uint8, actions [T,A] float32, rewards [T] float32."""

    seed: int
    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool  # the game ended it; a truncated one was cut
    truncated: bool


@dataclass(frozen=True)
class EpisodeIndex:
    """What the index of a shard says of one episode."""

    seed: int
    steps: int
    episode_return: float
    terminated: bool
    truncated: bool


class Recorder(VectorWrapper):
    """Keeps what happens in N games; put it below whatever the policy looks through."""

    def reset(self, *, seed: Sequence[int], options: dict | None = None):
        frames, info = self.env.reset(seed=seed, options=options)
        self.seeds, self.frames, self.steps = seed, [frames], []
        return frames, info

    def step(self, actions: np.ndarray):
        frames, *outcome, info = self.env.step(actions)
        self.frames.append(frames)
        self.steps.append((np.array(actions, np.float32), *outcome))
        return frames, *outcome, info

    def episodes(self) -> list[Episode]:
        """The N episodes, when all have ended: each up to its own end, whatever came after it."""
        frames = np.stack(self.frames, axis=1)  # [N,T+1,64,64,3]
        parts = (np.stack(part, axis=1) for part in zip(*self.steps, strict=True))
        actions, rewards, terminated, truncated = parts  # [N,T,...]
        ends = (terminated | truncated).argmax(axis=1)  # the first
        return [
            Episode(
                seed,
                frames[i, : end + 2],
                actions[i, : end + 1],
                rewards[i, : end + 1].astype(np.float32),
                bool(terminated[i, end]),
                bool(truncated[i, end]),
            )
            for i, (seed, end) in enumerate(zip(self.seeds, ends, strict=True))
        ]


def write_shard(folder: Path, episodes: Sequence[Episode]) -> None:
    """Write a shard: into a temporary folder beside the target, synced, then renamed.

    Raises:
        WMError: if the disk is full, saying how much is needed; nothing partial is left.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        for name in ARRAYS:
            array = np.concatenate([getattr(episode, name) for episode in episodes])
            with open(partial / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        index = [
            EpisodeIndex(e.seed, len(e.actions), float(e.rewards.sum()), e.terminated, e.truncated)
            for e in episodes
        ]
        hashes = {path.name: sha256(path) for path in sorted(partial.glob("*.npy"))}
        record = {"episodes": [asdict(entry) for entry in index], "sha256": hashes}
        with open(partial / "index.json", "w") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # before the space is measured
        need = sum(getattr(episode, name).nbytes for episode in episodes for name in ARRAYS)
        raise cannot_write(folder, need, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Shard:
    """One shard, read-only, its frames memory-mapped.

    Its hashes are not looked at here, which would read every frame: see `sound`.

    Raises:
        WMError: if it is damaged, or something else.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            record = read_json(folder / "index.json")
            self.index = [_checked(EpisodeIndex(**entry)) for entry in record["episodes"]]
            self.sha256 = dict(record["sha256"])
            steps = sum(entry.steps for entry in self.index)
            self.frames = read_array(
                folder / "frames.npy", np.uint8, steps + len(self.index), *FRAME
            )
            self.actions = np.array(read_array(folder / "actions.npy", np.float32, steps, None))
            self.rewards = np.array(read_array(folder / "rewards.npy", np.float32, steps))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WMError(
                f"{folder} is damaged ({one_line(error)}); `--repair` behind the words of its "
                "`wm collect` plays it again, the same"
            ) from error

    def sound(self) -> bool:
        """Whether every array has the hash that the index says."""
        names = [f"{name}.npy" for name in ARRAYS]
        return all(self.sha256.get(name) == sha256(self.folder / name) for name in names)


ENTRY_KINDS = {
    **dict.fromkeys(("seed", "steps"), int),
    **dict.fromkeys(("terminated", "truncated"), bool),
    "episode_return": int | float,
}


def _checked(entry: EpisodeIndex) -> EpisodeIndex:
    check_kinds(vars(entry), ENTRY_KINDS)
    if entry.steps < 1 or not -math.inf < entry.episode_return < math.inf:
        raise ValueError(f"an episode of {entry.steps} steps, {entry.episode_return} reward")
    return entry


class EpisodeStore:
    """All episodes of some folders of shards, in a fixed order, seen as one sequence of frames.

    Episode e of T steps owns the T+1 frames from `first_frame[e]` on.
    """

    def __init__(self, folders: Sequence[Path]):
        paths = [path for folder in folders for path in sorted(Path(folder).glob("shard-*"))]
        self.shards = [Shard(path) for path in paths]
        self.index = [entry for shard in self.shards for entry in shard.index]
        if not self.index:
            raise WMError(f"no episodes in {', '.join(map(str, folders))}; run `wm collect` first")
        self.steps = np.array([entry.steps for entry in self.index])
        self.first_frame = np.cumsum(np.append(0, self.steps + 1))[:-1]
        self.shard_starts = np.cumsum([0] + [len(shard.frames) for shard in self.shards])
        self.places = [
            (shard, i) for shard in range(len(paths)) for i in range(len(self.shards[shard].index))
        ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Episode:
        shard_number, i = self.places[number]
        shard, entry = self.shards[shard_number], self.index[number]
        step = sum(earlier.steps for earlier in shard.index[:i])
        frames = shard.frames[step + i : step + i + entry.steps + 1]
        steps = slice(step, step + entry.steps)
        actions, rewards = shard.actions[steps], shard.rewards[steps]
        return Episode(entry.seed, frames, actions, rewards, entry.terminated, entry.truncated)

    @property
    def total_frames(self) -> int:
        return int(self.shard_starts[-1])

    def frames(self, numbers: np.ndarray) -> np.ndarray:
        """Gather frames [B,64,64,3] by their numbers in the whole store, any order."""
        batch = np.empty((len(numbers), *self.shards[0].frames.shape[1:]), np.uint8)
        owner = np.searchsorted(self.shard_starts, numbers, side="right") - 1
        for shard in np.unique(owner):
            mine = owner == shard
            batch[mine] = self.shards[shard].frames[numbers[mine] - self.shard_starts[shard]]
        return batch

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Episode numbers for training and for validation: whole episodes, never frames."""
        numbers = np.arange(len(self))
        validation = numbers % VALIDATION_EVERY == VALIDATION_EVERY - 1
        if not validation.any():
            validation = numbers == numbers[-1]
        return numbers[~validation], numbers[validation]

    def summary(self) -> dict[str, Any]:
        returns = np.array([entry.episode_return for entry in self.index])
        return {
            "episodes": len(self),
            "steps": int(self.steps.sum()),
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
        }
