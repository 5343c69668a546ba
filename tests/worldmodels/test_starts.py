"""Where dreams begin."""

import pytest
import torch

from wm.collect import collect
from wm.data import Latents
from wm.envs import EnvConfig
from wm.episodes import EpisodeStore
from wm.workers import RandomPlayer
from wm.worldmodels.encode import encode_store
from wm.worldmodels.starts import STARTS, Starts, draw_starts


@pytest.fixture(scope="module")
def played(vision, workers, tmp_path_factory):
    """Episodes of the tiny game and their latents."""
    folder = tmp_path_factory.mktemp("played")
    collect(EnvConfig("tiny", 20), RandomPlayer("uniform"), range(12), folder, workers)
    store = EpisodeStore([folder])
    encode_store(vision, store, folder / "latents")
    return store, Latents(folder / "latents")


@torch.no_grad()
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("kind", ["any", "first"])
def test_m_has_seen_all_that_came_before_a_start_and_nothing_else(kind, cell, played, make_memory):
    (store, latents), memory = played, make_memory(cell=cell)
    there: dict[tuple, list] = {}  # the states before every frame of training, by its latent
    for episode in store.split()[0]:
        state = memory.zero_state(1)
        for t in range(store.steps[episode] if kind == "any" else 1):
            latent = torch.tensor(latents.mean[store.first_frame[episode] + t][None])
            there.setdefault(tuple(latent[0].tolist()), []).append(
                Starts.of(latent, state).state[0]
            )
            state = memory.step(latent, torch.from_numpy(store[episode].actions[t][None]), state)
    drawn = draw_starts(memory, store, latents, kind, seed=0)
    assert len(drawn.latent) == STARTS
    for latent, state in zip(*drawn, strict=True):
        before = there[tuple(latent.tolist())]
        assert any(torch.allclose(state, its, atol=1e-6) for its in before)
    assert drawn.state.any() == (kind == "any")
