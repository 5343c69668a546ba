"""What pictures show: where ways part, and how far V's pictures are from the game's."""

import numpy as np
import pytest
import torch

from wm.episodes import Episode
from wm.worldmodels import pictures
from wm.worldmodels.dream import Starts
from wm.worldmodels.pictures import AHEAD, FUTURES, parting, reconstruction_error
from wm.worldmodels.vae import to_images


@pytest.mark.parametrize("surprise", [25, 31, 40])
def test_ways_part_where_much_is_about_to_change(surprise):
    latents = np.random.default_rng(0).normal(0, 0.1, size=(41, 4))
    latents[surprise] += 5
    assert parting(latents, AHEAD) + AHEAD == surprise


@pytest.mark.parametrize("now", [0, 1, 11])
def test_futures_begin_with_what_m_remembers_and_differ(make_memory, now):
    memory, means, actions = make_memory(), torch.randn(21, 4), torch.rand(20, 1)
    dreams = pictures.dream_on(memory, means, actions, now, "tiny")
    assert dreams.shape == (FUTURES, 20 - now, 4) and (dreams.std(0) > 0).all()
    state = memory.zero_state(1)
    for step in range(now):
        _, state = memory.advance(
            means[None, step : step + 1], actions[None, step : step + 1], state
        )
    copies = Starts.of(
        means[now].expand(FUTURES, -1), tuple(s.repeat(1, FUTURES, 1) for s in state)
    )
    along = actions[now:].expand(FUTURES, -1, -1)
    expected = pictures.dream_along(memory, copies, along, "tiny", temperature=1.0)
    torch.testing.assert_close(dreams, expected)


def made_up(steps):
    generator = np.random.default_rng(steps)
    frames = generator.integers(0, 256, (steps + 1, 64, 64, 3), dtype=np.uint8)
    actions = generator.uniform(-1, 1, (steps, 1)).astype(np.float32)
    return Episode(0, frames, actions, np.zeros(steps, np.float32), True, False)


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_futures_of_short_and_long_episodes_are_drawn(vision, make_memory, tmp_path, steps):
    means = np.random.default_rng(0).normal(size=(steps + 1, 4)).astype(np.float32)
    path = tmp_path / "futures.png"
    pictures.futures(vision, make_memory(), made_up(steps), means, "tiny", path)
    assert path.stat().st_size > 5000


def test_the_error_of_reconstructions_is_the_mean_square_over_all_frames(vision):
    episodes = [made_up(3), made_up(300)]
    squares = []
    for episode in episodes:
        images = to_images(np.asarray(episode.frames))
        with torch.inference_mode():
            squares.append((vision.decode(vision.encode(images)[0]) - images).square())
    expected = torch.cat(squares).mean().item()
    assert reconstruction_error(vision, episodes) == pytest.approx(expected, rel=1e-3)
