"""How fast V and M train and V encodes, beside their bare steps and beside a plain data loader."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from wm.collect import record
from wm.data import Latents, frames_data, sequences_data
from wm.envs import EnvConfig, as_vector, make_env, validation_seeds
from wm.episodes import Episode, EpisodeStore, write_shard
from wm.training import StepsData, TrainerConfig, fit
from wm.workers import RandomPlayer
from wm.worldmodels.bench import plain
from wm.worldmodels.bench.compare import Comparison, Rate, compare, quiet, timed
from wm.worldmodels.encode import ENCODE_BATCH, encode_store
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.vae import ConvVAE, VisionConfig, encode_frames

SETTLING, TIMED = 5, 15  # training steps before the clock starts, and while it runs
Loggers = list[Any]


class Clock(Callback):
    """Batches a second, from the end of batch SETTLING on."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == SETTLING:
            self.started = time.perf_counter()
        self.rate = (trainer.global_step - SETTLING) / (time.perf_counter() - self.started + 1e-9)

    started = 0.0


def fitted(
    module: L.LightningModule, data: StepsData, loggers: Loggers, clip: float | None = None
) -> Rate:
    """Batches a second in Lightning's Trainer, with loading, logs, progress and MLflow."""

    def measure() -> float:
        clock, precision = Clock(), module.config.precision
        with tempfile.TemporaryDirectory() as folder, quiet():
            here = TrainerConfig("cpu")
            fit(module, data, Path(folder), here, loggers, precision, clip, callbacks=[clock])
        return clock.rate

    return measure


def bare(
    module: L.LightningModule,
    loss: Callable[[], torch.Tensor],
    precision: str,
    clip: float | None = None,
    steps: int = TIMED,
) -> Rate:
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
        return timed(steps, lambda: [step() for _ in range(steps)])

    return measure


def training(loggers: Loggers, scratch: Path) -> Iterator[Comparison]:
    """V and M of take-cover on real episodes."""
    env, folder = EnvConfig("takecover"), scratch / "episodes"
    episodes = record(as_vector(make_env(env)), RandomPlayer("brownian"), validation_seeds(12))
    write_shard(folder / "shard-0", episodes)
    store = EpisodeStore([folder])
    yield from vision_rows(store, episodes, loggers, scratch)
    config = MemoryConfig(hidden=512, reward_head=False, steps=SETTLING + TIMED)
    data = sequences_data(store, Latents(scratch / "latents"), config, 0, config.steps)
    model, batch = MDNRNN(config, 64, 1), data.make_batch(0)
    noise = torch.randn(batch["mean"].shape)
    sides = (
        fitted(model, data, loggers, config.clip),
        bare(model, lambda: model.loss(batch, noise)["loss"], config.precision, config.clip),
    )
    yield compare("M, training", "its bare step", "batch", *sides, 0.85)


def vision_rows(
    store: EpisodeStore, episodes: list[Episode], loggers: Loggers, scratch: Path
) -> Iterator[Comparison]:
    config = VisionConfig(latent=64, motion_weight=20.0, steps=SETTLING + TIMED)
    data = frames_data(store, config, 0, config.steps)
    model, (frames, previous) = ConvVAE(config), data.make_batch(0)
    noise = torch.randn(config.batch, config.latent)

    def loss() -> torch.Tensor:
        return model.loss(frames, previous, noise)["loss"]

    ours, step = fitted(model, data, loggers), bare(model, loss, config.precision)
    yield compare("V, training", "its bare step", "batch", ours, step, 0.9)
    exact = bare(model, loss, "32-true")
    yield compare("V, bare step, bf16-mixed", "32-true", "batch", step, exact)
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
