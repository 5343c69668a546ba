"""Where dreams begin: latents of real frames, with M's state warmed up to them.

S starts, Z latent, H hidden, L layers of state (h and c of an LSTM, h of a GRU).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wm.data import Latents
from wm.episodes import EpisodeStore
from wm.worldmodels.mdnrnn import MDNRNN, State

STARTS = 1024
CHUNK = 64  # warmed up together


class Starts(NamedTuple):
    """Places where dreams may begin."""

    latent: Tensor  # [S,Z]
    state: Tensor  # [S,L,H]

    @classmethod
    def of(cls, latent: Tensor, state: State) -> "Starts":
        """From latents [S,Z] and M's state, layers [1,S,H]."""
        return cls(latent, torch.stack([layer[0] for layer in state], dim=1))

    def pick(self, index: Tensor) -> tuple[Tensor, State]:
        """Latents [N,Z] and the state of M for start numbers [N]."""
        layers = self.state[index].unbind(1)
        return self.latent[index], tuple(layer[None].contiguous() for layer in layers)


@torch.inference_mode()
def draw_starts(
    memory: MDNRNN,
    store: EpisodeStore,
    latents: Latents,
    kind: Literal["any", "first"],
    seed: int,
) -> Starts:
    """Random steps of training episodes, or first frames; M has seen all that came before.

    Either way an episode is drawn in proportion to its length.
    """
    generator = np.random.default_rng(seed)
    train, _ = store.split()
    share = store.steps[train] / store.steps[train].sum()
    episodes = generator.choice(train, STARTS, p=share)
    steps = generator.integers(0, store.steps[episodes]) * (kind == "any")
    places = sorted(zip(steps.tolist(), episodes.tolist(), strict=True))  # little padding
    chunks = [places[i : i + CHUNK] for i in range(0, STARTS, CHUNK)]
    parts = [_warm_up(memory, store, latents, chunk) for chunk in chunks]
    return Starts(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _warm_up(
    memory: MDNRNN, store: EpisodeStore, latents: Latents, places: list[tuple[int, int]]
) -> Starts:
    """Starts at (step, episode) places."""
    means = [
        torch.tensor(latents.mean[store.first_frame[e] : store.first_frame[e] + step + 1])
        for step, e in places
    ]
    actions = [torch.from_numpy(store[e].actions[: step + 1]) for step, e in places]
    lengths = torch.tensor([step for step, _ in places])  # the frame of the start is not among them
    state = memory.warm_up(
        pad_sequence(means, batch_first=True), pad_sequence(actions, batch_first=True), lengths
    )
    current = torch.stack([mean[-1] for mean in means])
    return Starts.of(current, state)
