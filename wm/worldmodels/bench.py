"""`wm bench`: how fast the parts are, each beside what it is measured against, in one run.

Both sides of a comparison are timed in turn, A B A B, because machines are shared and noisy: what
counts is the median of their ratios and its spread, not one absolute time.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from wm.collect import collect, record
from wm.data import Frames, Latents, frames_data, sequences_data
from wm.envs import EnvConfig, action_space, as_vector, make_env, validation_seeds
from wm.episodes import Episode, EpisodeStore, write_shard
from wm.files import write_atomically
from wm.stages import Stage
from wm.tracking import Tracker
from wm.training import StepsData, TrainerConfig, fit
from wm.workers import RandomPlayer, Workers
from wm.worldmodels import plain
from wm.worldmodels.agent import Agent, AgentConfig, AgentPlayer
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.engine import PRECISIONS, join_weights
from wm.worldmodels.evolution import dream_fitness
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.starts import Starts
from wm.worldmodels.vae import ConvVAE, VisionConfig, encode_frames
from wm.worldmodels.work import ENCODE_BATCH, encode_store

PAIRS = 3
POPULATION, EPISODES, HORIZON = 64, 16, 200
SIZES = {"carracing": (32, 256, "zh"), "takecover": (64, 512, "zhc")}  # the paper's Z, H, features
SETTLING, TIMED = 10, 25  # training steps before the clock starts, and while it runs
FAST = {game: EnvConfig(game, max_steps=300) for game in SIZES}
OFFICIAL = {game: replace(env, fast_drawing=False) for game, env in FAST.items()}

Rate = Callable[[], float]  # one measurement, in units a second


@dataclass(frozen=True)
class Comparison:
    """Rates of ours and theirs, measured in turn."""

    name: str
    against: str
    unit: str
    ours: list[float]
    theirs: list[float]
    target: float | None = None  # of the ratio

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def __str__(self) -> str:
        rates = f"{median(self.ours):12,.1f}{median(self.theirs):12,.1f} {self.unit}/s"
        ratio = f"{median(self.ratios):7.2f} [{min(self.ratios):.2f}, {max(self.ratios):.2f}]"
        target = f"target {self.target:g}" if self.target else ""
        return f"{self.name:32}{self.against:34}{rates:34}{ratio:24}{target}"


def compare(
    name: str, against: str, unit: str, ours: Rate, theirs: Rate, target: float | None = None
) -> Comparison:
    """Measure two rates in turn, PAIRS times."""
    pairs = [(ours(), theirs()) for _ in range(PAIRS)]
    result = Comparison(name, against, unit, *map(list, zip(*pairs, strict=True)), target)
    print(result, flush=True)
    return result


def timed(units: float, work: Callable[[], Any]) -> float:
    """The rate of work that does so many units."""
    started = time.perf_counter()
    work()
    return units / (time.perf_counter() - started)


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
            results += [*training(run, Path(scratch))]
            tables = {
                "dream seconds": growth(workers, Path(scratch)),
                "memory of episodes": memory_of_episodes(Path(scratch)),
                "seconds to start": timed_start(),
            }
        print(f"\n{json.dumps(tables, indent=1)}\n{time.time() - started:.0f} s in all")
        record = {"comparisons": [asdict(result) for result in results], **tables}
        path = runs / "bench" / "bench.json"
        write_atomically(path, json.dumps({**record, "versions": tracker.versions}, indent=1))
        ratios = {_metric(result): median(result.ratios) for result in results}
        tracker.summarise(ratios, run.run_id)
        run.log_file(path)
    print(path)


def _metric(result: Comparison) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w ./-]", "", f"ratio/{result.name} - {result.against}")


# Dreams


def save_dreamer(folder: Path, game: str, precision: str) -> Agent:
    """An untrained agent of the paper's size whose dreams last to the horizon, in a folder."""
    latent, hidden, features = SIZES[game]
    config = AgentConfig(
        FAST[game],
        VisionConfig(latent=latent),
        MemoryConfig(hidden=hidden),
        ControllerConfig(features, horizon=HORIZON, precision=precision),
    )
    memory = MDNRNN(config.memory, latent, *action_space(game).shape)
    torch.nn.init.constant_(memory.end_head.bias, -1000.0)
    starts = Starts(torch.randn(100, latent), 0.1 * torch.randn(100, 2, hidden))
    agent = Agent(config, ConvVAE(config.vision), memory, torch.empty(0), starts)
    agent = replace(agent, weights=torch.randn(agent.parameters))
    agent.save(folder)
    return agent


def dream_rate(workers: Workers, folder: Path, agent: Agent, population: int = POPULATION) -> Rate:
    """Dream steps a second of a generation."""
    fitness = dream_fitness(workers, folder, lambda _: list(range(EPISODES)), 512, compiled=True)
    candidates = 0.1 * torch.randn(population, agent.parameters)
    fitness(candidates, 0)  # compiles
    steps = population * EPISODES * agent.config.controller.horizon
    return lambda: timed(steps, lambda: fitness(candidates, 0))


def multiply(folder: Path, dreams: int, steps: int, part: int) -> None:
    """The two matrix products of so many dream steps, and nothing else."""
    agent = Agent.load(folder)
    weights = join_weights(agent.memory, PRECISIONS[agent.config.controller.precision])
    inputs, hidden = (
        torch.randn(dreams, matrix.shape[1], dtype=matrix.dtype)
        for matrix in (weights.gates, weights.heads)
    )
    with torch.inference_mode():
        for _ in range(steps):
            F.linear(inputs, weights.gates)
            F.linear(hidden, weights.heads)


def products_rate(workers: Workers, folder: Path) -> Rate:
    """Dream steps a second if the two matrix products were all; loading the agent is not timed."""

    def seconds(steps: int) -> float:
        task = partial(multiply, folder, 512, steps)
        return 1 / timed(1, lambda: list(workers.map(task, range(workers.count), 600.0)))

    return lambda: workers.count * 512 * 1000 / (seconds(1010) - seconds(10))


def alone_rate(agent: Agent, steps: int) -> float:
    """Steps a second of one dream on one core: with more it would be slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return timed(steps, lambda: plain.dream_alone(agent, steps))
    finally:
        torch.set_num_threads(before)


def dreams(workers: Workers, scratch: Path) -> Iterator[Comparison]:
    for game in SIZES:
        for precision, target in (("32-true", 0.6), ("bf16-true", 0.4)):
            folder = scratch / f"{game}-{precision}"
            agent = save_dreamer(folder, game, precision)
            ours, name = dream_rate(workers, folder, agent), f"dream, {game}, {precision}"
            products = products_rate(workers, folder)
            yield compare(name, "its two matrix products alone", "step", ours, products, target)
            if precision == "32-true":
                theirs = partial(alone_rate, agent, 300)
                yield compare(name, "one dream at a time", "step", ours, theirs, 40)


def growth(workers: Workers, scratch: Path) -> dict[str, float]:
    """Seconds of a generation for some sizes: linear in population x episodes x horizon."""
    agent, folder = save_dreamer(scratch / "growth", "carracing", "32-true"), scratch / "growth"
    seconds = {}
    for population in (64, 128, 256):
        steps = population * EPISODES * HORIZON
        rate = dream_rate(workers, folder, agent, population)()
        seconds[f"{population} x {EPISODES} x {HORIZON}"] = round(steps / rate, 2)
    return seconds


# Games


def played(workers: Workers, env: EnvConfig, player: Any, episodes: int = 8) -> Rate:
    """Steps a second of episodes in a pool, which has its imports behind it."""
    list(workers.play(env, player, range(workers.count)))

    def measure() -> float:
        started = time.perf_counter()
        outcomes = list(workers.play(env, player, range(episodes)))
        return sum(outcome.steps for outcome in outcomes) / (time.perf_counter() - started)

    return measure


def collected(workers: Workers, env: EnvConfig, scratch: Path, simulator: str = "official") -> Rate:
    """Steps a second of `wm collect`: played and written to disk."""

    def measure() -> float:
        with tempfile.TemporaryDirectory(dir=scratch) as folder, quiet():
            path, player = Path(folder), RandomPlayer("brownian")
            started = time.perf_counter()
            collect(env, player, validation_seeds(8), path, workers, simulator)
            seconds = time.perf_counter() - started
            return int(EpisodeStore([path]).steps.sum()) / seconds

    measure()
    return measure


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed inside."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def games(workers: Workers, alone: Workers, scratch: Path) -> Iterator[Comparison]:
    for game in SIZES:
        sides = (collected(pool, FAST[game], scratch) for pool in (workers, alone))
        yield compare(f"collect, {game}", "in one process", "step", *sides, 1.8)
        player = AgentPlayer(scratch / f"{game}-32-true")
        sides = (played(pool, OFFICIAL[game], player) for pool in (workers, alone))
        yield compare(f"evaluate, {game}", "in one process", "step", *sides, 1.8)
    random, car = RandomPlayer("uniform"), "carracing"
    sides = (played(alone, kind[car], random, 2) for kind in (FAST, OFFICIAL))
    yield compare("carracing, our drawing", "Gymnasium's, the same pixels", "step", *sides, 2)
    theirs = partial(plain.play_async, OFFICIAL[car], workers.count, 600)
    ours = collected(workers, FAST[car], scratch)
    yield compare("collect, carracing", "AsyncVectorEnv", "step", ours, theirs)
    if importlib.util.find_spec("envpool"):
        ours = collected(workers, FAST[car], scratch, "envpool")
        yield compare("collect, carracing, EnvPool", "AsyncVectorEnv", "step", ours, theirs, 5)


# Training


class Clock(Callback):
    """Batches a second, from the end of batch SETTLING on."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == SETTLING:
            self.started = time.perf_counter()
        self.rate = (trainer.global_step - SETTLING) / (time.perf_counter() - self.started + 1e-9)

    started = 0.0


def fitted(module: L.LightningModule, data: StepsData, run: Any, clip: float | None = None) -> Rate:
    """Batches a second in Lightning's Trainer, with loading, logs, progress and MLflow."""

    def measure() -> float:
        clock, precision = Clock(), module.config.precision
        with tempfile.TemporaryDirectory() as folder, quiet():
            here = TrainerConfig("cpu")
            fit(module, data, Path(folder), here, run.loggers, precision, clip, callbacks=[clock])
        return clock.rate

    return measure


def bare(module: L.LightningModule, loss: Callable, precision: str, clip: float | None = None):
    """Batches a second of the model's step alone, on one batch that is there already."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            value = loss()
        value.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()

    def measure() -> float:
        for _ in range(3):
            step()
        return timed(TIMED, lambda: [step() for _ in range(TIMED)])

    return measure


def training(run: Any, scratch: Path) -> Iterator[Comparison]:
    """V and M of take-cover on real episodes."""
    env, folder = EnvConfig("takecover"), scratch / "episodes"
    episodes = record(as_vector(make_env(env)), RandomPlayer("brownian"), validation_seeds(12))
    write_shard(folder / "shard-0", episodes)
    store = EpisodeStore([folder])
    yield from vision_rows(store, episodes, run, scratch)
    config = MemoryConfig(hidden=512, reward_head=False, steps=SETTLING + TIMED)
    data = sequences_data(store, Latents(scratch / "latents"), config, 0, config.steps)
    model, batch = MDNRNN(config, 64, 1), data.make_batch(0)
    noise = torch.randn(batch["mean"].shape)
    sides = (
        fitted(model, data, run, config.clip),
        bare(model, lambda: model.loss(batch, noise)["loss"], config.precision, config.clip),
    )
    yield compare("M, training", "its bare step", "batch", *sides, 0.85)


def vision_rows(
    store: EpisodeStore, episodes: list[Episode], run: Any, scratch: Path
) -> Iterator[Comparison]:
    config = VisionConfig(latent=64, motion_weight=20.0, steps=SETTLING + TIMED)
    data = frames_data(store, config, 0, config.steps)
    model, (frames, previous) = ConvVAE(config), data.make_batch(0)
    noise = torch.randn(config.batch, config.latent)

    def loss() -> torch.Tensor:
        return model.loss(frames, previous, noise)["loss"]

    ours, step = fitted(model, data, run), bare(model, loss, config.precision)
    yield compare("V, training", "its bare step", "batch", ours, step, 0.9)
    yield compare(
        "V, bare step, bf16-mixed", "32-true", "batch", step, bare(model, loss, "32-true")
    )
    for episode in episodes:
        np.savez(scratch / f"{episode.seed}.npz", frames=episode.frames)
    theirs = partial(timed, 10, partial(plain.train_from_npz, model, scratch, 10))
    yield compare("V, training", "images one by one from .npz", "batch", ours, theirs)
    some = store.frames(np.arange(ENCODE_BATCH))

    def encoded() -> float:
        with quiet():
            return timed(
                store.total_frames, lambda: encode_store(model, store, scratch / "latents")
            )

    alone = partial(timed, 8 * ENCODE_BATCH, lambda: [encode_frames(model, some) for _ in range(8)])
    yield compare("V, encoding", "one batch again and again", "frame", encoded, alone, 0.9)


# Memory and start


def memory_of_episodes(scratch: Path) -> dict[str, dict[str, int]]:
    """Megabytes of a process that draws batches of frames from 100 and from 2,000 episodes."""
    sizes = {}
    for count in (100, 2000):
        folder = scratch / f"{count} episodes"
        for first in range(0, count, 100):
            _hollow_shard(folder / f"shard-{first:010d}", 100)
        with Workers(1) as fresh:
            (sizes[str(count)],) = fresh.map(_draw_batches, [folder], 600.0)
    return sizes


def _hollow_shard(folder: Path, episodes: int, steps: int = 330) -> None:
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


def _draw_batches(folder: Path) -> dict[str, int]:
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
    return round(1 / timed(1, lambda: subprocess.run(command, check=True)), 1)
