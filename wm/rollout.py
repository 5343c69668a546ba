"""Policies, and the only loop that steps an environment.

The loop plays one episode in each of N environments that answer to Gymnasium's vector interface
with autoreset disabled: the real game (N = 1 in each process), the real game behind V and M, and
the dream (N = population x episodes) look the same to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv


class Policy(Protocol):
    """Maps observations of N environments to actions [N, A]."""

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin N episodes; all randomness of the policy comes from their seeds."""

    def __call__(self, observation: Any) -> Any:
        """Actions [N, A] within the action space."""


@dataclass(frozen=True)
class Rollout:
    """N episodes: undiscounted returns, lengths in steps, and which ended by themselves."""

    returns: torch.Tensor  # [N] float64
    steps: torch.Tensor  # [N] int64
    terminated: torch.Tensor  # [N] bool


@torch.inference_mode()
def rollout(envs: VectorEnv, policy: Policy, seeds: Sequence[int]) -> Rollout:
    """Play one episode per environment, environment i from seeds[i], until all have ended."""
    observation, _ = envs.reset(seed=list(seeds))
    policy.reset(seeds)
    returns = torch.zeros(len(seeds), dtype=torch.float64)
    steps = torch.zeros(len(seeds), dtype=torch.int64)
    dead = torch.zeros(len(seeds), dtype=torch.bool)
    running = torch.ones(len(seeds), dtype=torch.bool)
    while running.any():
        observation, reward, terminated, truncated, _ = envs.step(policy(observation))
        terminated, truncated = torch.as_tensor(terminated), torch.as_tensor(truncated)
        returns += torch.as_tensor(reward) * running
        steps += running
        dead |= terminated & running
        running &= ~(terminated | truncated)
    return Rollout(returns, steps, dead)


def episode_generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers of one episode for one purpose, never of a worker or a rank."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class UniformPolicy:
    """A fresh uniform action at every step: the random policy of the published tables."""

    def __init__(self, space: gym.spaces.Box):
        self.space = space

    def reset(self, seeds: Sequence[int]) -> None:
        self.generators = [episode_generator(seed, 0) for seed in seeds]

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        low, high = self.space.low, self.space.high
        return np.stack([g.uniform(low, high) for g in self.generators]).astype(np.float32)


class BrownianPolicy:
    """A random walk per action within `explored_range`, reflected at its ends: smooth.

    White noise hardly moves a car. Actions are clipped to the space.
    """

    STEP = 0.07  # of the walk, as a share of its range: crossed in about two hundred actions

    def __init__(self, space: gym.spaces.Box):
        self.space = space
        self.low, self.high = explored_range(space)

    def reset(self, seeds: Sequence[int]) -> None:
        self.generators = [episode_generator(seed, 0) for seed in seeds]
        self.walk = np.stack([g.uniform(self.low, self.high) for g in self.generators])

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        step = self.STEP * (self.high - self.low)
        walk = self.walk + np.stack([g.normal(0.0, step) for g in self.generators])
        walk = np.where(walk > self.high, 2 * self.high - walk, walk)
        self.walk = np.where(walk < self.low, 2 * self.low - walk, walk)
        return np.clip(self.walk, self.space.low, self.space.high).astype(np.float32)


def explored_range(space: gym.spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """The space itself, but for CarRacing: a walk over whole pedals brakes the car to a stop.

    There the gas is pressed three quarters of the time and the brake one fifth, lightly.
    """
    if space.shape == (3,):
        return np.array([-1.0, -0.3, -1.6]), np.array([1.0, 1.0, 0.4])
    return space.low.astype(float), space.high.astype(float)


class RandomLinearPolicy:
    """A random linear map of the 8x8 thumbnail through tanh, drawn anew for every episode."""

    def __init__(self, space: gym.spaces.Box):
        self.space = space

    def reset(self, seeds: Sequence[int]) -> None:
        shape = (8 * 8 * 3, *self.space.shape)
        generators = [episode_generator(seed, 0) for seed in seeds]
        self.weights = np.stack([g.normal(0, 0.25, shape) for g in generators])
        self.bias = np.stack([g.normal(0, 0.5, self.space.shape) for g in generators])

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        thumbnail = observation[:, ::8, ::8].reshape(len(observation), -1) / 255.0 - 0.5
        action = np.tanh(np.einsum("nf,nfa->na", thumbnail, self.weights) + self.bias)
        return np.clip(action, self.space.low, self.space.high).astype(np.float32)


RANDOM_POLICIES = {
    "uniform": UniformPolicy,
    "brownian": BrownianPolicy,
    "linear": RandomLinearPolicy,
}


class NoisyPolicy:
    """Another policy with Gaussian noise of standard deviation `scale` on every action."""

    def __init__(self, policy: Policy, scale: float, space: gym.spaces.Box):
        self.policy, self.scale, self.space = policy, scale, space

    def reset(self, seeds: Sequence[int]) -> None:
        self.policy.reset(seeds)
        self.generators = [episode_generator(seed, 1) for seed in seeds]

    def __call__(self, observation: Any) -> np.ndarray:
        action = np.asarray(self.policy(observation))
        noise = [g.normal(0.0, self.scale, self.space.shape) for g in self.generators]
        noisy = action + np.stack(noise)
        return np.clip(noisy, self.space.low, self.space.high).astype(np.float32)
