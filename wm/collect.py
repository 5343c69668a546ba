"""Play episodes in many processes and keep them: a shard of a fixed range of seeds is one task."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from tqdm import tqdm

from wm import WMError
from wm.config import bounded
from wm.envpool import EnvPoolGames
from wm.envs import FRAME, EnvConfig, as_vector, make_env
from wm.episodes import Episode, Recorder, Shard, write_shard
from wm.ranks import leads, shares
from wm.rollout import rollout
from wm.workers import Player, Workers, time_limit

SHARD_EPISODES = 4
TYPICAL_STEPS = {"carracing": 1000, "takecover": 330, "tiny": 12}  # of a random policy


@dataclass(frozen=True)
class CollectConfig:
    episodes: int = bounded(200, 2, 100_000)  # in the first round
    later_episodes: int = bounded(100, 2, 100_000)  # in each later one
    policy: Literal["brownian", "switching", "uniform"] = "brownian"  # of the first round
    noise: float = bounded(0.1, 0.0)  # on the controller's actions in later rounds, at most
    patience: int = bounded(0, 0)  # actions without reward that cut an episode; 0: none do
    simulator: Literal["official", "envpool"] = "official"  # envpool: a fast copy of CarRacing


class Patience(VectorWrapper):
    """Games that are cut after so many actions without reward: grass teaches a driver little."""

    def __init__(self, games: VectorEnv, actions: int):
        super().__init__(games)
        self.actions = actions

    def reset(self, **options):
        self.waited = np.zeros(self.num_envs, int)
        return self.env.reset(**options)

    def step(self, actions: np.ndarray):
        frames, reward, terminated, truncated, info = self.env.step(actions)
        self.waited = np.where(reward > 0, 0, self.waited + 1)
        return frames, reward, terminated, truncated | (self.waited >= self.actions), info


def record(games: VectorEnv, player: Player, seeds: Sequence[int]) -> list[Episode]:
    """Play the seeds in turn, as many at once as there are games, and keep everything.

    The games are closed at the end.
    """
    recorder, episodes = Recorder(games), []
    try:
        envs, policy = player(recorder)
        for first in range(0, len(seeds), games.num_envs):
            rollout(envs, policy, seeds[first : first + games.num_envs])
            episodes += recorder.episodes()
        return episodes
    finally:
        recorder.close()


def shard_folder(folder: Path, seeds: Sequence[int]) -> Path:
    return folder / f"shard-{seeds[0]:010d}"


def record_shard(
    env: EnvConfig, player: Player, config: CollectConfig, folder: Path, seeds: Sequence[int]
) -> None:
    """Play a shard: in EnvPool all of its seeds at once, however many cores there are."""
    fast = config.simulator == "envpool"
    games = EnvPoolGames(env, len(seeds)) if fast else as_vector(make_env(env))
    if config.patience:
        games = Patience(games, config.patience)
    write_shard(shard_folder(folder, seeds), record(games, player, seeds))


def collect(
    env: EnvConfig,
    player: Player,
    seeds: Sequence[int],
    folder: Path,
    workers: Workers,
    config: CollectConfig | None = None,
) -> None:
    """Fill `folder` with one shard per SHARD_EPISODES seeds; sound ones that exist are kept.

    A rank that does not lead leaves when its share is there.

    Raises:
        WMError: if the disk cannot hold the estimate, or a game fails again and again.
    """
    chunks = [seeds[i : i + SHARD_EPISODES] for i in range(0, len(seeds), SHARD_EPISODES)]
    task = partial(record_shard, env, player, config or CollectConfig(), folder)
    for _, share in shares(folder, chunks):
        _remove_cut(folder, share)
        missing = [chunk for chunk in share if not _is_there(folder, chunk)]
        if not missing:
            continue
        count, rest = sum(map(len, share)), sum(map(len, missing))
        _check_disk(env, rest, folder)
        shards = workers.map(task, missing, time_limit(env, SHARD_EPISODES))
        with tqdm(
            None, "collect", count, initial=count - rest, unit="episode", disable=not leads()
        ) as bar:
            for chunk, _ in zip(missing, shards, strict=True):
                bar.update(len(chunk))


def _remove_cut(folder: Path, chunks: Sequence[Sequence[int]]) -> None:
    """Remove what a process that was killed has begun of these shards."""
    names = {f".{shard_folder(folder, chunk).name}" for chunk in chunks}
    for cut in folder.glob(".shard-*"):
        if cut.stem in names:
            shutil.rmtree(cut, ignore_errors=True)


def _is_there(folder: Path, seeds: Sequence[int]) -> bool:
    """Whether the shard of these seeds is there and sound; a damaged one is named and removed."""
    path = shard_folder(folder, seeds)
    if not path.exists():
        return False
    try:
        shard = Shard(path)
        if [entry.seed for entry in shard.index] == list(seeds) and shard.sound():
            return True
    except WMError:
        pass  # as bad as another hash
    print(f"collect: {path} is damaged and is played again", flush=True)
    shutil.rmtree(path)
    return False


def _check_disk(env: EnvConfig, episodes: int, folder: Path) -> None:
    frame_bytes = FRAME[0] * FRAME[1] * FRAME[2]
    steps = min(TYPICAL_STEPS[env.name], env.max_steps) // env.repeat
    need = episodes * (steps + 1) * frame_bytes
    free = shutil.disk_usage(folder).free
    print(f"collect: {episodes} episodes, about {need / 1e9:.2f} GB; {free / 1e9:.1f} GB free")
    if need > free:
        raise WMError(
            f"the episodes need about {need / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB "
            "free; lower collect.episodes or point `runs=` to a larger disk"
        )
