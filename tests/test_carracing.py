"""The fast drawing of CarRacing: not a pixel, reward or flag differs from the official game's."""

import math

import gymnasium as gym
import numpy as np
import pytest

from wm.carracing import FastCarRacing


@pytest.fixture(scope="module")
def games():
    """The official game and the fast one, which all tests go on to use."""
    both = gym.make("CarRacing-v3"), FastCarRacing()
    yield both
    for game in both:
        game.close()


def assert_same(one, other):
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1:] == other[1:]


def assert_same_steps(games, actions):
    """The reward and the flag of the last step are returned."""
    official, fast = games
    for action in np.asarray(actions, np.float32):
        one = official.step(action)
        assert_same(one, fast.step(action))
    return one[1:3]


def assert_same_episode(games, seed, actions):
    assert_same(*(game.reset(seed=seed) for game in games))
    assert_same_steps(games, actions)


def brownian(seed, steps):
    """Random actions, each not far from the one before."""
    walk = np.random.default_rng(seed).normal(0, 0.3, (steps, 3)).cumsum(0)
    return (abs(walk % 4 - 2) - [1, 0, 0]) * [1, 0.5, 0.1]  # reflected at its bounds


def test_the_zoom_of_the_first_second(games):
    assert_same_episode(games, 1, np.zeros((60, 3)))


@pytest.mark.parametrize("steer", [-1.0, 0.3])
def test_spinning_on_the_grass(games, steer):
    assert_same_episode(games, 2, [(steer, 1, 0)] * 120)


@pytest.mark.parametrize("seed", [3, 2**31])
def test_a_random_drive(games, seed):
    actions = brownian(seed, 120)
    assert (abs(actions) <= 1).all() and (actions[:, 1:] >= 0).all()
    assert_same_episode(games, seed, actions)


@pytest.mark.parametrize("x, y", [(300, 0), (-320, 310), (50, -340), (600, 700)])
def test_the_edge_of_the_field_and_beyond(games, x, y):
    assert_same_episode(games, 1, np.zeros((2, 3)))
    for game in games:
        game.unwrapped.t = 1.0  # zoomed in
        car = game.unwrapped.car
        distance = (x, y) - np.array(car.hull.position)
        for body in car.drawlist:
            body.position += tuple(distance.tolist())
    reward, terminated = assert_same_steps(games, brownian(1, 20))
    assert (reward == -100) == terminated == (max(abs(x), abs(y)) > 330)


@pytest.mark.parametrize("turns", [0, 0.125, 0.25, 0.5, 0.75, 1, -0.25, 7.25])
def test_any_heading(games, turns):
    assert_same_episode(games, 4, np.zeros((2, 3)))
    pictures = []
    for game in games:
        game.unwrapped.t = 1.0
        game.unwrapped.car.hull.angle = turns * 2 * math.pi
        pictures.append(game.unwrapped._render("state_pixels"))
    np.testing.assert_array_equal(*pictures)


def test_other_colors_and_other_render_modes():
    options = {"domain_randomize": True, "render_mode": "rgb_array"}
    official, fast = games = gym.make("CarRacing-v3", **options), FastCarRacing(**options)
    assert_same_episode(games, 5, brownian(5, 10))
    np.testing.assert_array_equal(official.render(), fast.render())
    assert_same_episode(games, 6, brownian(6, 5))
