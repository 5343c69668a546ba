"""How fast real games are collected and scored, beside one process and beside Gymnasium's own."""

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from wm.collect import CollectConfig, collect
from wm.envs import EnvConfig, validation_seeds
from wm.episodes import EpisodeStore
from wm.workers import Player, RandomPlayer, Workers
from wm.worldmodels.agent import AgentPlayer
from wm.worldmodels.bench import plain
from wm.worldmodels.bench.compare import Comparison, Rate, compare, quiet
from wm.worldmodels.bench.dreams import SIZES, save_dreamer

FAST = {game: EnvConfig(game, max_steps=160) for game in SIZES}
OFFICIAL = {game: replace(env, fast_drawing=False) for game, env in FAST.items()}


def played(workers: Workers, env: EnvConfig, player: Player, episodes: int = 8) -> Rate:
    """Steps a second of episodes in a pool, which has its imports behind it."""
    list(workers.play(env, player, range(workers.count)))

    def measure() -> float:
        started = time.perf_counter()
        outcomes = list(workers.play(env, player, range(episodes)))
        return sum(outcome.steps for outcome in outcomes) / (time.perf_counter() - started)

    return measure


def collected(workers: Workers, env: EnvConfig, scratch: Path, simulator: str = "official") -> Rate:
    """Steps a second of `wm collect`: played and written to disk."""
    config = CollectConfig(simulator=simulator)

    def measure() -> float:
        with tempfile.TemporaryDirectory(dir=scratch) as folder, quiet():
            path, player = Path(folder), RandomPlayer("brownian")
            started = time.perf_counter()
            collect(env, player, validation_seeds(8), path, workers, config)
            seconds = time.perf_counter() - started
            return int(EpisodeStore([path]).steps.sum()) / seconds

    measure()
    return measure


def games(workers: Workers, alone: Workers, scratch: Path) -> Iterator[Comparison]:
    for game in SIZES:
        sides = (collected(pool, FAST[game], scratch) for pool in (workers, alone))
        yield compare(f"collect, {game}", "in one process", "step", *sides, 1.8)
        save_dreamer(scratch / game, game)
        player = AgentPlayer(scratch / game)
        sides = (played(pool, OFFICIAL[game], player) for pool in (workers, alone))
        yield compare(f"evaluate, {game}", "in one process", "step", *sides, 1.8)
    random, car = RandomPlayer("brownian"), "carracing"  # one who could look: else nothing is drawn
    sides = (played(alone, kind[car], random, 2) for kind in (FAST, OFFICIAL))
    yield compare("carracing, our drawing", "Gymnasium's, the same pixels", "step", *sides, 2)
    theirs = partial(plain.play_async, OFFICIAL[car], workers.count, 600)
    ours = collected(workers, FAST[car], scratch)
    yield compare("collect, carracing", "AsyncVectorEnv", "step", ours, theirs)
    if importlib.util.find_spec("envpool"):
        ours = collected(workers, FAST[car], scratch, "envpool")
        yield compare("collect, carracing, EnvPool", "AsyncVectorEnv", "step", ours, theirs, 5)
