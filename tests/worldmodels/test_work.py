"""What stages do in their folders, apart from the whole pipeline."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from wm.collect import CollectConfig, collect
from wm.config import ConfigError
from wm.data import Latents
from wm.envs import EnvConfig
from wm.episodes import EpisodeStore
from wm.training import TrainerConfig
from wm.workers import RandomPlayer
from wm.worldmodels.agent import AgentConfig
from wm.worldmodels.mdnrnn import MemoryConfig
from wm.worldmodels.work import collect_episodes, encode_store


def test_encoding_a_store_again_replaces_what_an_interrupted_run_left(tmp_path, vision, workers):
    collect(EnvConfig("tiny", 20), RandomPlayer("uniform"), range(2), tmp_path, workers)
    store = EpisodeStore([tmp_path])
    encode_store(vision, store, tmp_path / "latents")
    first = np.array(Latents(tmp_path / "latents").mean)
    encode_store(vision, store, tmp_path / "latents")
    assert first.shape == (store.total_frames, vision.config.latent)
    np.testing.assert_array_equal(Latents(tmp_path / "latents").mean, first)


@pytest.mark.parametrize(("asked", "longest"), [(0, 20), (5, 5), (30, 20)])
def test_collected_episodes_are_cut_where_asked_and_never_longer_than_the_game(
    tmp_path, asked, longest
):
    collect_episodes(
        tmp_path,
        {},
        SimpleNamespace(busy=nullcontext),
        TrainerConfig(workers=1),
        env=EnvConfig("tiny", 20),
        collection=CollectConfig(40, "uniform", max_steps=asked),
        seed=0,
        round=0,
    )
    store = EpisodeStore([tmp_path])
    cut = [store[number].truncated for number in range(40)]
    assert store.steps.max() == longest
    assert (store.steps[cut] == longest).all() and any(cut)


@pytest.mark.parametrize(
    ("game", "head"), [("takecover", "end_head"), ("carracing", "reward_head")]
)
def test_a_dream_without_what_tells_good_from_bad_is_refused(game, head):
    with pytest.raises(ConfigError, match=head):
        AgentConfig(EnvConfig(game), memory=MemoryConfig(**{head: False}))
