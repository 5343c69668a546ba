"""Policies, and the loop: what counts, what does not, and what a seed decides."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from wm.envs import action_space
from wm.rollout import (
    RANDOM_POLICIES,
    BrownianPolicy,
    NoisyPolicy,
    UniformPolicy,
    episode_generator,
    rollout,
)

POLICIES = pytest.mark.parametrize("kind", RANDOM_POLICIES)
SPACES = pytest.mark.parametrize("game", ["carracing", "takecover"])


def frames(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), np.uint8)


def actions_of(policy, seeds, steps, observation):
    """What a policy does [steps, N, A], given the same frame at every step."""
    policy.reset(seeds)
    return np.stack([policy(observation) for _ in range(steps)])


def autocorrelation(series):
    centred = series - series.mean(0)
    return (centred[1:] * centred[:-1]).mean() / centred.var()


class Metronome(VectorEnv):
    """Environment i ends at lengths[i]; step t pays 10^i each, and a fortune once it has ended."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, lengths, terminates):
        self.num_envs = len(lengths)
        self.lengths, self.terminates = np.array(lengths), np.array(terminates)

    def reset(self, *, seed=None, options=None):
        self.seeds, self.time = seed, 0
        return np.zeros((self.num_envs, 1)), {}

    def step(self, actions):
        self.time += 1
        ended = self.time >= self.lengths
        reward = np.where(self.time > self.lengths, 1e6, 10.0 ** np.arange(self.num_envs))
        observation = np.full((self.num_envs, 1), self.time)
        return observation, reward, ended & self.terminates, ended & ~self.terminates, {}


class Still:
    def reset(self, seeds):
        self.seeds = list(seeds)

    def __call__(self, observation):
        return np.zeros((len(observation), 1), np.float32)


def test_nothing_counts_after_an_episode_has_ended():
    envs, policy = Metronome([2, 1, 4], [True, False, True]), Still()
    result = rollout(envs, policy, [5, 6, 7])
    assert result.returns.tolist() == [2.0, 10.0, 400.0]
    assert result.returns.dtype == torch.float64
    assert result.steps.tolist() == [2, 1, 4]
    assert result.terminated.tolist() == [True, False, True]
    assert envs.time == 4  # and the loop ends with the last one
    assert envs.seeds == policy.seeds == [5, 6, 7]


def test_a_flag_that_comes_after_the_end_is_not_heeded():
    class Zombie(Metronome):
        def step(self, actions):
            observation, reward, terminated, truncated, info = super().step(actions)
            terminated[0] |= self.time > 1  # environment 0 was truncated at step 1
            return observation, reward, terminated, truncated, info

    result = rollout(Zombie([1, 3], [False, False]), Still(), [0, 1])
    assert result.terminated.tolist() == [False, False]


@POLICIES
@SPACES
def test_random_actions_fill_the_action_space_and_stay_in_it(kind, game):
    space = action_space(game)
    policy = RANDOM_POLICIES[kind](space)
    made = [actions_of(policy, [seed], 40, frames(1, seed)) for seed in range(40)]
    actions = np.concatenate(made)[:, 0]
    assert actions.dtype == np.float32
    assert all(space.contains(action) for action in actions)
    low, high = np.quantile(actions, [0.02, 0.98], axis=0)
    gentle = kind == "brownian" and game == "carracing"
    assert (low <= space.low + (0.3 if gentle else 0.1)).all()
    assert (high > 0.25).all()


@POLICIES
def test_a_seed_decides_the_actions_whatever_the_batch(kind):
    policy, pictures = RANDOM_POLICIES[kind](action_space("carracing")), frames(3)
    together = actions_of(policy, [11, 12, 13], 5, pictures)
    alone = actions_of(policy, [12], 5, pictures[1:2])
    np.testing.assert_array_equal(together[:, 1:2], alone)
    assert (together[:, 0] != together[:, 1]).any()  # and different seeds act differently


def test_the_brownian_walk_is_smooth_and_white_noise_is_not():
    space, seeds = action_space("takecover"), range(20)
    smooth = actions_of(BrownianPolicy(space), seeds, 500, None)
    white = actions_of(UniformPolicy(space), seeds, 500, None)
    assert autocorrelation(smooth) > 0.8
    assert abs(autocorrelation(white)) < 0.05


def test_the_brownian_driver_of_a_car_is_gentle_and_uses_the_gas_more_than_the_brake():
    actions = actions_of(BrownianPolicy(action_space("carracing")), range(50), 500, None)
    _, gas, brake = (actions > 0).mean((0, 1))
    assert gas > 0.95
    assert 0.12 < brake < 0.30
    assert actions[..., 1].mean() > 3 * actions[..., 2].mean()
    assert actions[..., 1].max() < 0.5


def test_noise_is_of_its_scale_within_the_space_and_from_the_episodes_seed():
    space = action_space("takecover")
    noisy = NoisyPolicy(Still(), 0.2, space)
    observation = np.zeros((3, 1))
    actions = actions_of(noisy, [1, 2, 3], 2000, observation)
    assert abs(actions.mean()) < 0.02
    many = actions_of(noisy, range(500), 200, np.zeros((500, 1)))
    deviations = many.std(axis=(0, 2))  # of each episode: all between 0 and 0.2
    assert deviations.mean() == pytest.approx(0.1, rel=0.05)
    assert deviations.min() < 0.01 and 0.19 < deviations.max() < 0.23
    np.testing.assert_array_equal(actions[:, 1:2], actions_of(noisy, [2], 2000, observation[:1]))
    wild = actions_of(NoisyPolicy(Still(), 3.0, space), [1], 100, observation[:1])
    assert np.abs(wild).max() == 1.0


def test_noise_changes_actions_and_not_the_policys_own_random_numbers():
    space, observation = action_space("takecover"), np.zeros((1, 1))
    plain = actions_of(UniformPolicy(space), [4], 50, observation)
    silent = actions_of(NoisyPolicy(UniformPolicy(space), 0.0, space), [4], 50, observation)
    loud = actions_of(NoisyPolicy(UniformPolicy(space), 0.01, space), [4], 50, observation)
    np.testing.assert_array_equal(plain, silent)
    assert 0 < np.abs(loud - plain).max() < 0.1


@pytest.mark.parametrize("other", [(2, 0), (1, 1), (1,)])
def test_random_numbers_differ_between_episodes_and_between_purposes(other):
    drawn = episode_generator(1, 0).random(4)
    np.testing.assert_array_equal(drawn, episode_generator(1, 0).random(4))
    assert (drawn != episode_generator(*other).random(4)).any()


def test_the_loop_plays_a_gymnasium_game_from_its_seed():
    def game():
        return gym.make("CartPole-v1", max_episode_steps=30)

    class Left(Still):
        def __call__(self, observation):
            return np.zeros(len(observation), int)

    def play(seeds):
        mode = AutoresetMode.DISABLED
        envs = gym.vector.SyncVectorEnv([game] * len(seeds), autoreset_mode=mode)
        return rollout(envs, Left(), seeds)

    alone = [play([seed]).steps.item() for seed in (3, 4, 5)]
    assert len(set(alone)) > 1
    assert play([5]).steps.item() == alone[2]
