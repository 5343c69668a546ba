"""What pictures show: how far V's are from the game's."""

import numpy as np
import pytest
import torch

from wm.episodes import Episode
from wm.worldmodels.pictures import reconstruction_error
from wm.worldmodels.vae import to_images


def made_up(steps):
    generator = np.random.default_rng(steps)
    frames = generator.integers(0, 256, (steps + 1, 64, 64, 3), dtype=np.uint8)
    actions = generator.uniform(-1, 1, (steps, 1)).astype(np.float32)
    return Episode(0, frames, actions, np.zeros(steps, np.float32), True, False)


def test_the_error_of_reconstructions_is_the_mean_square_over_all_frames(vision):
    episodes = [made_up(3), made_up(300)]
    squares = []
    for episode in episodes:
        images = to_images(np.asarray(episode.frames))
        with torch.inference_mode():
            squares.append((vision.decode(vision.encode(images)[0]) - images).square())
    expected = torch.cat(squares).mean().item()
    assert reconstruction_error(vision, episodes) == pytest.approx(expected, rel=1e-3)
