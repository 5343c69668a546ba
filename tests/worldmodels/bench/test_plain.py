"""The baselines do what they are compared for."""

import numpy as np
import pytest
import torch

from wm.envs import EnvConfig
from wm.worldmodels.bench import plain


def test_a_dream_alone_is_paid_by_its_model(make_agent):
    agent = make_agent(features="zh")
    torch.nn.init.zeros_(agent.memory.reward_head.weight)
    torch.nn.init.constant_(agent.memory.reward_head.bias, 0.5)
    assert plain.dream_alone(agent, 6) == pytest.approx(3.0)


def test_gymnasiums_own_processes_play():
    assert plain.play_async(EnvConfig("tiny", max_steps=60), processes=2, steps=20) > 0


def test_images_are_read_one_by_one_from_npz_files(tmp_path):
    frames = np.random.default_rng(0).integers(256, size=(2, 3, 64, 64, 3), dtype=np.uint8)
    for number, episode in enumerate(frames):
        np.savez(tmp_path / f"{number}.npz", frames=episode)
    images = plain.NpzImages(tmp_path)
    assert len(images) == 6
    assert (images[4].numpy() == frames[1, 1]).all()
