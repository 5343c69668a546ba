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

from wm import WMError


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
    """Play one episode per environment, environment i from seeds[i], until all have ended.

    Raises:
        WMError: if an action is not finite, naming player, seed and step.
    """
    observation, _ = envs.reset(seed=list(seeds))
    policy.reset(seeds)
    returns = torch.zeros(len(seeds), dtype=torch.float64)
    steps = torch.zeros(len(seeds), dtype=torch.int64)
    dead = torch.zeros(len(seeds), dtype=torch.bool)
    running = torch.ones(len(seeds), dtype=torch.bool)
    while running.any():
        actions = policy(observation)
        _check_finite(actions, running, seeds, steps)
        observation, reward, terminated, truncated, _ = envs.step(actions)
        reward, terminated, truncated = (  # dreams may be on another device
            torch.as_tensor(values).cpu() for values in (reward, terminated, truncated)
        )
        returns += reward * running
        steps += running
        dead |= terminated & running
        running &= ~(terminated | truncated)
    return Rollout(returns, steps, dead)


def _check_finite(
    actions: Any, running: torch.Tensor, seeds: Sequence[int], steps: torch.Tensor
) -> None:
    finite = torch.as_tensor(actions).isfinite()
    if finite.all():  # at every step, so no more than this is done as a rule
        return
    lost = running & ~finite.cpu().reshape(len(seeds), -1).all(1)
    if lost.any():
        number = int(lost.int().argmax())
        raise WMError(
            f"action {int(steps[number])} of player {number} of {len(seeds)} (seed "
            f"{seeds[number]}) is not finite; neither are the weights or latents behind it"
        )


def episode_generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers of one episode for one purpose, never of a worker or a rank."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class UniformPolicy:
    """A fresh uniform action at every step: the random policy of the published tables."""

    blind = True  # it never looks at a frame

    def __init__(self, space: gym.spaces.Box):
        self.space = space

    def reset(self, seeds: Sequence[int]) -> None:
        self.generators = [episode_generator(seed, 0) for seed in seeds]

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        low, high = self.space.low, self.space.high
        return np.stack([g.uniform(low, high) for g in self.generators]).astype(np.float32)


class BrownianPolicy:
    """A random walk per action, reflected at the ends of its range: smooth.

    White noise hardly moves a car. Actions are clipped to the space.
    """

    def __init__(self, space: gym.spaces.Box):
        self.space = space
        self.low, self.high, share = walk_range(space)
        self.deviation = share * (self.high - self.low)  # of a step

    def reset(self, seeds: Sequence[int]) -> None:
        self.generators = [episode_generator(seed, 0) for seed in seeds]
        self.walk = np.stack([g.uniform(self.low, self.high) for g in self.generators])

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        walk = self.walk + np.stack([g.normal(0.0, self.deviation) for g in self.generators])
        walk = np.where(walk > self.high, 2 * self.high - walk, walk)
        walk = np.where(walk < self.low, 2 * self.low - walk, walk)
        self.walk = np.clip(walk, self.low, self.high)  # a step may be longer than the range
        return np.clip(self.walk, self.space.low, self.space.high).astype(np.float32)


def walk_range(space: gym.spaces.Box) -> tuple[np.ndarray, np.ndarray, float]:
    """Low and high [A] of a random walk, and its step as a share s of that: crossed in 1 / s^2.

    It is the space itself but for CarRacing, where a slow walk over whole pedals soon leaves the
    track: there the gas is pressed all the time and the brake one fifth of it, both lightly.
    """
    if space.shape == (3,):
        return np.array([-0.8, 0.0, -1.6]), np.array([0.8, 0.4, 0.4]), 0.3
    return space.low.astype(float), space.high.astype(float), 0.14


class SwitchingPolicy:
    """A uniform action, held until another is drawn, which happens at every step with a probability
    of the episode's own, between 1/50 and 1: restless players and such that hardly stir.

    M must have seen both: where nobody ever stays, it dreams that staying is safe.
    """

    LONGEST = 50  # steps that an action is held for in the calmest episodes, on average

    def __init__(self, space: gym.spaces.Box):
        self.space = space

    def reset(self, seeds: Sequence[int]) -> None:
        self.generators = [episode_generator(seed, 0) for seed in seeds]
        self.switching = [self.LONGEST ** -g.uniform() for g in self.generators]
        self.actions = [self._draw(g) for g in self.generators]

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        for number, (g, probability) in enumerate(
            zip(self.generators, self.switching, strict=True)
        ):
            if g.uniform() < probability:
                self.actions[number] = self._draw(g)
        return np.stack(self.actions).astype(np.float32)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(self.space.low, self.space.high)


RANDOM_POLICIES = {
    "uniform": UniformPolicy,
    "brownian": BrownianPolicy,
    "switching": SwitchingPolicy,
}


class NoisyPolicy:
    """Another policy with Gaussian noise on every action.

    The noise's standard deviation is drawn for each episode, up to `scale`: there are careful and
    wild ones.
    """

    def __init__(self, policy: Policy, scale: float, space: gym.spaces.Box):
        self.policy, self.scale, self.space = policy, scale, space

    def reset(self, seeds: Sequence[int]) -> None:
        self.policy.reset(seeds)
        self.generators = [episode_generator(seed, 1) for seed in seeds]
        self.scales = [g.uniform(0.0, self.scale) for g in self.generators]

    def __call__(self, observation: Any) -> np.ndarray:
        action = np.asarray(self.policy(observation))
        noise = [
            g.normal(0.0, scale, self.space.shape)
            for g, scale in zip(self.generators, self.scales, strict=True)
        ]
        noisy = action + np.stack(noise)
        return np.clip(noisy, self.space.low, self.space.high).astype(np.float32)
