"""What pictures show: where ways part, and how far V's pictures are from the game's."""

import numpy as np
import pytest
import torch

from wm.episodes import Episode
from wm.worldmodels import pictures
from wm.worldmodels.pictures import AHEAD, FUTURES, parting, reconstruction_error
from wm.worldmodels.vae import to_images


@pytest.fixture
def memory(make_memory):
    """An M that is unsure of the next latent after an action of 1 and knows it after one of 0."""
    m = make_memory(mixtures=1)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.zero_()
        gates = m.rnn.weight_ih_l0.unflatten(0, (4, -1)), m.rnn.bias_ih_l0.unflatten(0, (4, -1))
        gates[1][[0, 3]], gates[1][1] = 9.0, -9.0  # in and out are open, nothing is kept
        gates[0][2, :, -1] = 9.0  # of the action
        m.mixture_head.bias[-4:] = -7.0
        m.mixture_head.weight[-4:, 0] = 10.0
    return m


@pytest.mark.parametrize("surprise", [25, 31, 39])
def test_ways_part_where_m_is_unsure_in_the_end(vision, memory, surprise):
    means, actions = torch.zeros(41, 4), torch.zeros(40, 1)
    actions[surprise] = 1
    now, dreams = parting(vision, memory, means, actions, "tiny")
    assert now + AHEAD - 1 == surprise
    assert dreams.shape == (FUTURES, AHEAD, 4)
    spread = dreams.std(0).mean(-1)
    assert spread[-1] > 1 and (spread[:-1] < 0.01).all()


def test_starts_within_an_episode_are_those_of_having_lived_so_far(make_memory):
    memory, means, actions = make_memory(), torch.randn(21, 4), torch.rand(20, 1)
    starts = pictures.starts_within(memory, means, actions, np.array([0, 1, 20]))
    for number, moment in enumerate((1, 20), start=1):
        alone = pictures.warm_start(memory, means[None, : moment + 1], actions[None, :moment])
        torch.testing.assert_close(starts.latent[number], alone.latent[0])
        torch.testing.assert_close(starts.state[number], alone.state[0])
    assert (starts.state[0] == 0).all() and (starts.latent[0] == means[0]).all()


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
