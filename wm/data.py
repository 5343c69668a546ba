"""Training data: batches of frames, and batches of latent segments, by step number.

A batch depends on (seed, step) alone, so that an interrupted training resumes with the batches it
would have had.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from wm import WMError
from wm.config import one_line
from wm.episodes import EpisodeStore
from wm.files import read_array
from wm.ranks import rows
from wm.training import StepsData

VALIDATION_FRAMES = 1000
VALIDATION_SEGMENTS = 128
ALL = slice(None)


def batch_generator(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng((seed, step))


class Frames:
    """Random frames of some episodes and the frames before them, uint8 [B,64,64,3] each.

    mine: of a batch's rows, those that are read.
    """

    def __init__(
        self,
        store: EpisodeStore,
        episodes: np.ndarray,
        batch: int,
        seed: int,
        mine: slice = ALL,
    ):
        self.store, self.batch, self.seed, self.mine = store, batch, seed, mine
        self.first, self.count = store.first_frame[episodes], store.steps[episodes] + 1
        self.ends = np.cumsum(self.count)

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """Positions among these episodes' frames -> frame numbers in the store."""
        episode = np.searchsorted(self.ends, positions, side="right")
        return self.first[episode] + positions - (self.ends - self.count)[episode]

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = batch_generator(self.seed, step).integers(self.ends[-1], size=self.batch)
        return self._gather(self.numbers(positions[self.mine]))

    def evenly(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of about `count` frames spread evenly over the episodes."""
        positions = np.linspace(0, self.ends[-1] - 1, min(count, self.ends[-1])).astype(int)
        cuts = range(self.batch, len(positions), self.batch)
        return [self._gather(part) for part in np.split(self.numbers(positions), list(cuts))]

    def _gather(self, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        before = np.where(np.isin(numbers, self.first), numbers, numbers - 1)
        frames = self.store.frames(np.concatenate([numbers, before]))
        return torch.from_numpy(frames).split(len(numbers))


class Latents:
    """V's view of a store: mean and log-variance [frames,Z], memory-mapped, in its order."""

    def __init__(self, folder: Path):
        try:
            self.mean = read_array(folder / "mean.npy", np.float32, None, None)
            self.log_variance = read_array(
                folder / "log_variance.npy", np.float32, *self.mean.shape
            )
        except (OSError, ValueError) as error:
            raise WMError(
                f"{folder} is damaged ({one_line(error)}); delete it and rerun `wm vision`"
            ) from error


class Sequences:
    """Random contiguous segments of episodes: what M is trained on.

    A batch holds mean and log_variance [B,T+1,Z], action [B,T,A], reward, end and mask [B,T]. A
    segment never crosses an episode's end; shorter episodes are padded and masked.

    mine: of a batch's segments, those that are read.
    """

    def __init__(
        self,
        store: EpisodeStore,
        latents: Latents,
        episodes: np.ndarray,
        batch: int,
        length: int,
        seed: int,
        mine: slice = ALL,
    ):
        self.store, self.latents, self.episodes = store, latents, episodes
        self.batch, self.length, self.seed, self.mine = batch, length, seed, mine
        self.share = store.steps[episodes] / store.steps[episodes].sum()

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        generator = batch_generator(self.seed, step)
        chosen = generator.choice(self.episodes, size=self.batch, p=self.share)
        segments = [self._segment(episode, generator) for episode in chosen]  # nothing is read yet
        return self._batch(segments[self.mine])

    def fixed(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Batches of `count` segments, the same at every call."""
        return [self(step) for step in range(-(-count // self.batch))]

    def _segment(self, number: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
        episode, steps = self.store[number], self.store.steps[number]
        # Starts reach beyond both ends and are moved back inside: else the last step (a death!)
        # would be seen `length` times less often than one in the middle. In episodes hardly longer
        # than a segment it is still seen less than what lies inside: 5,000 of take-cover's random
        # ones, of 72 steps on average, end in 1.4 % of their steps and in 1.0 % of those in
        # segments of 64.
        start = generator.integers(-self.length + 1, steps)
        start = int(np.clip(start, 0, max(steps - self.length, 0)))
        stop = min(start + self.length, steps)
        first = self.store.first_frame[number]
        frames = slice(first + start, first + stop + 1)
        end = np.zeros(stop - start, np.float32)
        end[-1] = float(episode.terminated and stop == steps)
        return {
            "mean": self.latents.mean[frames],
            "log_variance": self.latents.log_variance[frames],
            "action": episode.actions[start:stop],
            "reward": episode.rewards[start:stop],
            "end": end,
            "mask": np.ones(stop - start, np.float32),
        }

    def _batch(self, segments: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        batch = {}
        for name, example in segments[0].items():
            rows = self.length + (name in ("mean", "log_variance"))
            padded = np.zeros((len(segments), rows, *example.shape[1:]), np.float32)
            for row, segment in zip(padded, segments, strict=True):
                row[: len(segment[name])] = segment[name]
            batch[name] = torch.from_numpy(padded)
        return batch


def frames_data(store: EpisodeStore, config: Any, seed: int, epoch_steps: int) -> StepsData:
    """V's data; config is a VisionConfig (batch, steps)."""
    train, validation = store.split()
    make_batch = Frames(store, train, config.batch, seed, rows(config.batch))
    looked_at = Frames(store, validation, config.batch, seed).evenly(VALIDATION_FRAMES)
    return StepsData(make_batch, looked_at, config.steps, epoch_steps)


def sequences_data(
    store: EpisodeStore, latents: Latents, config: Any, seed: int, epoch_steps: int
) -> StepsData:
    """M's data; config is a MemoryConfig (batch, length, steps)."""
    train, validation = store.split()
    sizes = config.batch, config.length, seed
    make_batch = Sequences(store, latents, train, *sizes, rows(config.batch))
    fixed = Sequences(store, latents, validation, *sizes).fixed(VALIDATION_SEGMENTS)
    return StepsData(make_batch, fixed, config.steps, epoch_steps)
