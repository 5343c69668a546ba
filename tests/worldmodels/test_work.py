"""What stages do in their folders, apart from the whole pipeline."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wm.collect import collect
from wm.config import ConfigError
from wm.data import Latents
from wm.envs import EnvConfig
from wm.episodes import EpisodeStore
from wm.files import hashes
from wm.training import TrainerConfig
from wm.workers import RandomPlayer
from wm.worldmodels.agent import AgentConfig, save_tensors
from wm.worldmodels.mdnrnn import MemoryConfig
from wm.worldmodels.vae import ConvVAE, VisionConfig
from wm.worldmodels.work import best_round, encode_store, train_vision


def test_encoding_a_store_again_replaces_what_an_interrupted_run_left(tmp_path, vision, workers):
    collect(EnvConfig("tiny", 20), RandomPlayer("uniform"), range(2), tmp_path, workers)
    store = EpisodeStore([tmp_path])
    encode_store(vision, store, tmp_path / "latents")
    first = np.array(Latents(tmp_path / "latents").mean)
    encode_store(vision, store, tmp_path / "latents")
    assert first.shape == (store.total_frames, vision.config.latent)
    np.testing.assert_array_equal(Latents(tmp_path / "latents").mean, first)


def test_a_v_that_stays_as_it_is_encodes_only_what_is_new(tmp_path, workers):
    folders = {f"collect-{r}": tmp_path / f"collect-{r}" for r in range(2)}
    for r, folder in enumerate(folders.values()):
        folder.mkdir()
        collect(EnvConfig("tiny", 20), RandomPlayer("uniform"), range(r, r + 1), folder, workers)
    config, first = VisionConfig(latent=4, later_steps=0), tmp_path / "vision-0"
    first.mkdir()
    model, old = ConvVAE(config), EpisodeStore([folders["collect-0"]])
    save_tensors(first / "vision.safetensors", model.state_dict())
    encode_store(model, old, first / "latents")
    np.save(first / "latents" / "mean.npy", np.full((old.total_frames, 4), 7, np.float32))
    run = SimpleNamespace(busy=nullcontext, log_file=lambda *names: None)
    inputs = {**folders, "vision": first}
    train_vision(tmp_path, inputs, run, TrainerConfig(), vision=config, seed=0)
    latents = Latents(tmp_path / "latents").mean
    assert len(latents) == EpisodeStore(list(folders.values())).total_frames
    assert (latents[: old.total_frames] == 7).all() and (latents[old.total_frames :] != 7).all()
    assert hashes(first)["vision.safetensors"] == hashes(tmp_path)["vision.safetensors"]


def test_the_round_with_the_highest_validation_score_is_the_best(tmp_path):
    controllers = {}
    for role, score in {"controller-0": 1.0, "controller-1": 3.0, "controller-2": 2.0}.items():
        controllers[role] = tmp_path / role
        controllers[role].mkdir()
        tensors = {"best": torch.zeros(2), "mean": torch.zeros(2), "score": torch.tensor([score])}
        save_tensors(controllers[role] / "controllers.safetensors", tensors)
    assert best_round(controllers) == "controller-1"
    assert best_round({"agent": tmp_path}) == "agent"  # alone it needs no score


def test_only_take_covers_actions_are_moves():
    AgentConfig(EnvConfig("takecover"), memory=MemoryConfig(moves=True))
    with pytest.raises(ConfigError, match=r"memory\.moves"):
        AgentConfig(EnvConfig("carracing"), memory=MemoryConfig(moves=True))


@pytest.mark.parametrize(
    ("game", "head"), [("takecover", "end_head"), ("carracing", "reward_head")]
)
def test_a_dream_without_what_tells_good_from_bad_is_refused(game, head):
    with pytest.raises(ConfigError, match=head):
        AgentConfig(EnvConfig(game), memory=MemoryConfig(**{head: False}))
