"""How close CarRacing in EnvPool is to the official game, on the same tracks.

EnvPool's tracks come from another random generator. Here the official code draws from that one, so
that a seed means the same track in both, and what is left is a difference of drawing or physics.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from gymnasium.envs.box2d.car_racing import CarRacing
from gymnasium.wrappers import TimeLimit

from wm.collect import SHARD_EPISODES, record
from wm.envpool import EnvPoolGames
from wm.envs import CroppedFrame, EnvConfig, HeldAction, as_vector
from wm.episodes import Episode
from wm.evaluate import score
from wm.workers import Player, Workers, time_limit


class MersenneTwister:
    """Uniform numbers as C++'s standard library draws them."""

    def __init__(self, seed: int):
        self.generator = np.random.RandomState(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * int.from_bytes(self.generator.bytes(8), "little") / 2**64


class SameTracks(CarRacing):
    """The official game on the track that EnvPool makes of a seed."""

    def reset(self, *, seed: int, options: dict | None = None):
        self.twister = MersenneTwister(seed)
        return super().reset(seed=seed, options=options)

    @property
    def np_random(self) -> MersenneTwister:
        return self.twister


@dataclass(frozen=True)
class Pair:
    """One seed played in both: returns, and means of absolute differences while both last."""

    official: float
    envpool: float
    reward: float  # of a step
    first_frame: float  # of a colour at 64x64, in levels of 255
    frames: float


def compare(env: EnvConfig, player: Player, seeds: Sequence[int]) -> list[Pair]:
    """Play the seeds in both."""
    held = HeldAction(TimeLimit(SameTracks(), env.max_steps), env.repeat)
    game = CroppedFrame(held, env.crop)
    official = record(as_vector(game), player, seeds)
    envpool = record(EnvPoolGames(env, len(seeds)), player, seeds)
    return [pair(*both) for both in zip(official, envpool, strict=True)]


def pair(official: Episode, envpool: Episode) -> Pair:
    steps = min(len(official.rewards), len(envpool.rewards))
    reward = np.abs(official.rewards[:steps] - envpool.rewards[:steps])
    frames = np.abs(official.frames[: steps + 1] - envpool.frames[: steps + 1].astype(np.int16))
    returns = (float(episode.rewards.sum()) for episode in (official, envpool))
    return Pair(*returns, float(reward.mean()), float(frames[0].mean()), float(frames.mean()))


def table(
    env: EnvConfig, players: Mapping[str, Player], seeds: Sequence[int], workers: Workers
) -> Iterator[str]:
    """The lines of the table, as they are known.

    Args:
        players: by their names; the first one's actions depend on the seed alone, so that it does
            the same in both.
    """
    chunks = [seeds[i : i + SHARD_EPISODES] for i in range(0, len(seeds), SHARD_EPISODES)]
    yield f"{'':44}{'mean':>10}{'std':>10}   95 % interval of the mean"
    for number, (name, player) in enumerate(players.items()):
        task = partial(compare, env, player)
        played = workers.map(task, chunks, 2 * time_limit(env, SHARD_EPISODES))
        pairs = [pair for part in played for pair in part]
        if number == 0:
            yield f"{name}, the same actions: absolute difference"
            yield _row("  reward of a step", [pair.reward for pair in pairs])
            yield _row("  first frame, in levels of 255", [pair.first_frame for pair in pairs])
            yield _row("  all frames, in levels of 255", [pair.frames for pair in pairs])
        yield f"{name}: return"
        yield _row("  official", [pair.official for pair in pairs])
        yield _row("  EnvPool", [pair.envpool for pair in pairs])
        yield _row("  EnvPool - official", [pair.envpool - pair.official for pair in pairs])


def _row(name: str, values: Sequence[float]) -> str:
    result = score(values)
    interval = f"[{result.ci_low:.4g}, {result.ci_high:.4g}]"
    return f"{name:44}{result.mean:10.4g}{result.std:10.4g}   {interval}"
