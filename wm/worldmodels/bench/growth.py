"""What grows, and how: seconds of each stage's work at three sizes, each twice the one before.

Sizes are take-cover's of the paper, but for the dream, which is CarRacing's.
"""

from functools import partial
from pathlib import Path

import torch

from wm.collect import collect
from wm.envs import validation_seeds
from wm.episodes import EpisodeStore
from wm.workers import RandomPlayer, Workers
from wm.worldmodels.bench.compare import quiet, seconds
from wm.worldmodels.bench.dreams import EPISODES, HORIZON, dream_rate, save_dreamer
from wm.worldmodels.bench.games import FAST
from wm.worldmodels.bench.resources import hollow_shard
from wm.worldmodels.bench.training import bare
from wm.worldmodels.encode import encode_store
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.vae import ConvVAE, VisionConfig

STEPS = 10  # of training, for the mean of one


def growth(workers: Workers, alone: Workers, scratch: Path) -> dict[str, dict[str, float]]:
    """Seconds by size, for each stage; `alone` is one process, and has its imports behind it."""
    collecting = partial(collect_seconds, alone, scratch)
    encoding, dreaming = partial(encode_seconds, scratch), partial(dream_seconds, workers, scratch)
    stages = {
        "collect seconds": (collecting, (4, 8, 16), "episodes"),
        "V step seconds": (vision_seconds, (50, 100, 200), "frames"),
        "encode seconds": (encoding, (2000, 4000, 8000), "frames"),
        "M step seconds": (memory_seconds, (64, 128, 256), "steps long"),
        "dream seconds": (dreaming, (64, 128, 256), f"x {EPISODES} x {HORIZON}"),
    }
    return {
        name: {f"{size} {unit}": round(measure(size), 3) for size in sizes}
        for name, (measure, sizes, unit) in stages.items()
    }


def collect_seconds(alone: Workers, scratch: Path, episodes: int) -> float:
    """Of so many short episodes: played in one process and written to disk."""
    folder, seeds = scratch / f"{episodes} collected", validation_seeds(episodes)
    folder.mkdir()
    work = partial(collect, FAST["takecover"], RandomPlayer("brownian"), seeds, folder, alone)
    with quiet():
        return seconds(work)


def vision_seconds(batch: int) -> float:
    """Of a bare training step of V on so many frames."""
    config = VisionConfig(latent=64, motion_weight=20.0)
    model, noise = ConvVAE(config), torch.randn(batch, config.latent)
    frames, previous = torch.randint(256, (2, batch, 64, 64, 3), dtype=torch.uint8)

    def loss() -> torch.Tensor:
        return model.loss(frames, previous, noise)["loss"]

    return 1 / bare(model, loss, config.precision, steps=STEPS)()


def encode_seconds(scratch: Path, frames: int) -> float:
    """Of reading so many frames, encoding them and writing their latents."""
    model, folder = ConvVAE(VisionConfig(latent=64)), scratch / f"{frames} frames"
    hollow_shard(folder / "shard-0", 1, frames - 1)
    store = EpisodeStore([folder])
    with quiet():
        return seconds(lambda: encode_store(model, store, folder / "latents"))


def memory_seconds(length: int) -> float:
    """Of a bare training step of M on segments of so many steps."""
    config = MemoryConfig(hidden=512, reward_head=False)
    model, size = MDNRNN(config, 64, 1), (config.batch, length)
    mean, log_variance, noise = torch.randn(3, config.batch, length + 1, model.latent)
    batch = {
        "mean": mean,
        "log_variance": log_variance,
        "action": torch.rand(*size, 1),
        "end": torch.zeros(size),
        "mask": torch.ones(size),
    }

    def loss() -> torch.Tensor:
        return model.loss(batch, noise)["loss"]

    return 1 / bare(model, loss, config.precision, config.clip, STEPS)()


def dream_seconds(workers: Workers, scratch: Path, population: int) -> float:
    """Of a generation: linear in population x episodes x horizon."""
    folder = scratch / f"{population} dreamers"
    agent = save_dreamer(folder, "carracing")
    return population * EPISODES * HORIZON / dream_rate(workers, folder, agent, population)()
