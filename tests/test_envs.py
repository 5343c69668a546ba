"""The real games: exact by seed, of the official rules and length, and tidy."""

import itertools
import os
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from wm.carracing import FastCarRacing
from wm.envs import (
    HELD_OUT_SEEDS,
    VALIDATION_SEEDS,
    EnvConfig,
    held_out_seeds,
    make_env,
    shrink,
    training_seeds,
    validation_seeds,
)

SHORT = {
    "carracing": EnvConfig("carracing", max_steps=15, crop=12),
    "takecover": EnvConfig("takecover", max_steps=60),  # nothing stirs in its first ten tics
    "tiny": EnvConfig("tiny", max_steps=5),
}
ALL = pytest.mark.parametrize("config", SHORT.values(), ids=SHORT)


def life(env, seed, actions=None):
    """Frames, rewards and flags of an episode; without actions the player stays put."""
    frame, _ = env.reset(seed=seed)
    frames, rewards, flags = [frame.copy()], [], (False, False)
    for action in actions or itertools.repeat(np.zeros(env.action_space.shape, np.float32)):
        frame, reward, *flags, _ = env.step(action)
        frames.append(frame.copy())
        rewards.append(reward)
        if any(flags):
            break
    return np.stack(frames), rewards, tuple(flags)


def some_actions(env, count=60):
    generator = np.random.default_rng(0)
    low, high = env.action_space.low, env.action_space.high
    return [generator.uniform(low, high).astype(np.float32) for _ in range(count)]


@ALL
def test_frames_are_64_by_64_pictures_and_actions_lie_in_the_space(config):
    env = make_env(config)
    frames, _, _ = life(env, seed=1, actions=some_actions(env))
    env.close()
    assert frames.shape[1:] == (64, 64, 3) == env.observation_space.shape
    assert frames.dtype == np.uint8 == env.observation_space.dtype
    assert len(np.unique(frames)) > 2  # a picture, not a blank
    assert not (frames[0] == frames[-1]).all()  # and it moves
    assert env.action_space.low.tolist() == (
        [-1.0, 0.0, 0.0] if config.name == "carracing" else [-1.0]
    )
    assert (env.action_space.high == 1.0).all()


@ALL
@pytest.mark.parametrize("seed", [7, HELD_OUT_SEEDS + 99])
def test_a_seed_gives_the_same_episode_in_a_fresh_and_in_a_used_game(config, seed):
    fresh, used = make_env(config), make_env(config)
    actions = some_actions(fresh)
    life(used, seed=8, actions=actions)
    life(used, seed=9, actions=actions[:3])  # left in the middle
    one, two = life(fresh, seed, actions), life(used, seed, actions)
    other = life(used, seed + 1, actions)
    fresh.close(), used.close()
    np.testing.assert_array_equal(one[0], two[0])
    assert one[1:] == two[1:]
    assert one[0].shape != other[0].shape or (one[0] != other[0]).any()


@ALL
def test_an_episode_is_truncated_exactly_at_the_official_length(config):
    env = make_env(config)
    _, rewards, flags = life(env, seed=3)
    env.close()
    assert len(rewards) == config.max_steps
    assert flags == (False, True)  # truncated, and not terminated


def test_take_cover_is_played_at_the_papers_skill_for_one_reward_a_tic():
    env = make_env(EnvConfig("takecover", max_steps=2100))
    assert env.game.get_doom_skill() == 4
    lives = [life(env, seed) for seed in (1, 2, 3)]
    env.close()
    for _, rewards, flags in lives:
        assert sum(rewards) == len(rewards)
        assert flags == (True, False)  # who stays put dies long before the end
        assert 40 < len(rewards) < 2100
    assert len({len(rewards) for _, rewards, _ in lives}) > 1


def test_take_cover_moves_only_beyond_a_third_of_the_axis():
    env = make_env(EnvConfig("takecover", max_steps=2100))
    moves = (0.0, 0.3, -0.3, 0.4, -0.4)
    pictures = [life(env, 1, [np.float32([move])] * 20)[0][-1] for move in moves]
    env.close()
    stays, little_right, little_left, right, left = pictures
    assert (stays == little_right).all() and (stays == little_left).all()
    assert (stays != right).any() and (stays != left).any() and (left != right).any()


@ALL
def test_no_game_leaves_a_file_in_the_current_folder(config, own_folder):
    env = make_env(config)
    life(env, seed=1, actions=some_actions(env, 3))
    env.close()
    assert os.listdir(own_folder) == []


@pytest.mark.parametrize(
    "name, max_steps", [("tiny", 60), ("takecover", 50), ("takecover", 2100), ("carracing", 50)]
)
def test_a_held_action_is_the_same_action_played_some_times(name, max_steps):
    config = EnvConfig(name, max_steps=max_steps, crop=12)
    held, plain = make_env(replace(config, repeat=4)), make_env(config)
    assert (held.reset(seed=7)[0] == plain.reset(seed=7)[0]).all()
    over, steps, chance = False, 0, np.random.default_rng(0)
    while not over:
        action = chance.uniform(held.action_space.low, 1).astype(np.float32)
        frame, reward, *flags, _ = held.step(action)
        total = 0.0
        for _ in range(4):
            expected, paid, *ends, _ = plain.step(action)
            total += paid
            if any(ends):
                break
        shown = name != "takecover" or not any(ends)  # a finished game of ViZDoom has no picture
        assert not shown or (frame == expected).all()
        assert reward == pytest.approx(total) and flags == ends
        over, steps = any(flags), steps + 1
    assert 1 < steps <= -(-max_steps // 4)
    held.close()
    plain.close()


def test_shrinking_cuts_rows_from_the_bottom_and_averages_the_rest():
    picture = np.zeros((96, 96, 3), np.uint8)
    picture[:84, :, 1] = 100  # a green world
    picture[84:] = (255, 0, 0)  # above a red dashboard
    cropped = shrink(picture, 12)
    assert cropped.shape == (64, 64, 3)
    assert (cropped == (0, 100, 0)).all()
    assert (shrink(picture, 0) == (255, 0, 0)).all(-1).any()


def test_the_crop_of_car_racing_is_its_dashboard():
    game = gym.make("CarRacing-v3")
    game.reset(seed=1)
    for _ in range(60):  # the camera comes down during the first second
        picture, *_ = game.step(np.zeros(3, np.float32))
    game.close()
    assert (picture[84:, 70:] == 0).all()  # black right of the gauges
    assert (picture[:84].max(-1) > 0).any(-1).all()  # no row above is


@pytest.mark.parametrize("fast", [False, True])
def test_car_racing_shows_the_games_own_picture_without_the_crop(fast):
    game = gym.make("CarRacing-v3")
    env = make_env(replace(SHORT["carracing"], fast_drawing=fast))
    assert isinstance(env.unwrapped, FastCarRacing) is fast
    picture, _ = game.reset(seed=1)
    frame, _ = env.reset(seed=1)
    game.close(), env.close()
    np.testing.assert_array_equal(frame, shrink(picture, 12))


def test_training_validation_and_held_out_seeds_are_disjoint():
    most, rounds, roots = 100_000, range(10), range(2000)  # rounds and roots that are allowed
    training = [training_seeds(root, r, most) for root in roots for r in rounds]
    ranges = sorted([*training, validation_seeds(most), held_out_seeds(most)], key=lambda r: r[0])
    for earlier, later in itertools.pairwise(ranges):
        assert earlier[-1] < later[0]
    assert ranges[0][0] >= 0 and ranges[-1][-1] < 2**32  # what the games take for a seed
    assert training[-1][-1] < VALIDATION_SEEDS
    assert len(training_seeds(3, 1, 10)) == 10
