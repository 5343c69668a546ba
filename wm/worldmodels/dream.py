"""The dream: M alone as a batch of environments, no game at all.

Ha & Schmidhuber 2018, section 4.2. N dreams, S starts, Z latent, H hidden. Observations, rewards
and flags are torch tensors; `SingleDream` is one dream as a plain Gymnasium environment.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from wm.envs import STEPS_PER_SECOND, action_space
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.latent import FEATURES, feature_space
from wm.worldmodels.mdnrnn import MDNRNN, end_probability, sample_mixture
from wm.worldmodels.starts import Starts
from wm.worldmodels.vae import ConvVAE, to_frames

SURVIVAL_REWARD = 1.0  # a step's reward where M has no reward head (take-cover counts tics)


class DreamEnv(VectorEnv):
    """N dreams side by side, stepped together.

    Start and noise of a dream depend on its seed and the horizon alone: equal seeds give equal ones
    (common random numbers), whatever the batch. The caller resets (autoreset is disabled); a dream
    that has ended goes on, unheeded.

    A dream ends as M's end head says (config.end): "threshold" where its output is above 0.5 (the
    original code); "calibrated" with the probability of real life; "weighted" with its output as it
    was trained, ends weighted: a dream about as many times deadlier than life, meant to leave C
    less to exploit where M has lost sight of a danger (not yet shown to transfer better).

    Args:
        config: features, temperature, horizon, start and end of the dream.
        vision: for render() only.
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED}
    render_mode = "rgb_array"

    def __init__(
        self,
        memory: MDNRNN,
        starts: Starts,
        config: ControllerConfig,
        game: str,
        num_envs: int,
        vision: ConvVAE | None = None,
    ):
        self.memory, self.starts, self.config, self.vision = memory.eval(), starts, config, vision
        self.num_envs = num_envs
        self.metadata = {**self.metadata, "render_fps": STEPS_PER_SECOND[game]}
        self.features = FEATURES[config.features]
        self.single_observation_space = feature_space(
            config.features, memory.latent, memory.config.hidden
        )
        self.single_action_space = action_space(game)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @torch.inference_mode()
    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict | None = None):
        """Begin N dreams from seeds; options={"start": [N]} begins at given starts instead."""
        seeds = self._seeds(seed)
        distinct, index = np.unique(seeds, return_inverse=True)
        self.noise_index = torch.from_numpy(index)
        self.noise = _Noise(distinct.tolist(), self.memory, self.config.horizon)
        start = self.noise.start(len(self.starts.latent))[self.noise_index]
        start = torch.as_tensor((options or {}).get("start", start))
        self.latent, self.state = self.starts.pick(start)
        self.steps = 0
        return self.features(self.latent, self.state), {}

    @torch.inference_mode()
    def step(self, actions: Any):
        actions = torch.as_tensor(actions, dtype=torch.float32)
        hidden, self.state = self.memory.advance(self.latent[:, None], actions[:, None], self.state)
        prediction = self.memory.predict(hidden[:, 0])
        noise = self.noise.at(self.steps, self.noise_index)
        self.latent = sample_mixture(
            prediction, self.config.temperature, noise.uniform, noise.normal
        )
        self.steps += 1
        reward = prediction.reward
        if reward is None:
            reward = torch.full((self.num_envs,), SURVIVAL_REWARD)
        terminated = self._ends(prediction.end_logit, noise.end)
        truncated = torch.full((self.num_envs,), self.steps >= self.config.horizon)
        return self.features(self.latent, self.state), reward, terminated, truncated, {}

    @torch.inference_mode()
    def render(self) -> list[np.ndarray]:
        """What V sees in the current latents: N frames [64,64,3] uint8."""
        return list(to_frames(self.vision.decode(self.latent)))

    def _ends(self, end_logit: Tensor | None, uniform: Tensor) -> Tensor:
        if end_logit is None:
            return torch.zeros(self.num_envs, dtype=torch.bool)
        if self.config.end == "threshold":
            return end_logit > 0
        calibrated = self.config.end == "calibrated"
        weight = self.memory.config.end_weight if calibrated else 1.0
        return uniform < end_probability(end_logit, weight)

    def _seeds(self, seed: int | Sequence[int] | None) -> np.ndarray:
        if seed is None:
            return np.random.default_rng().integers(2**31, size=self.num_envs)
        if isinstance(seed, int | np.integer):
            return np.arange(seed, seed + self.num_envs)
        if len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} dreams")
        return np.asarray(seed)


class _Step(NamedTuple):
    uniform: Tensor  # [N,1] or [N,Z]: picks mixture components
    normal: Tensor  # [N,Z]
    end: Tensor  # [N]


class _Noise:
    """All random numbers of some dreams, drawn ahead from one generator per seed."""

    def __init__(self, seeds: list[int], memory: MDNRNN, horizon: int):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.first = torch.stack([torch.rand(1, generator=g)[0] for g in generators])
        uniforms, latent = memory.uniform_size + 1, memory.latent
        self.uniform = torch.stack(
            [torch.rand(horizon, uniforms, generator=g) for g in generators], dim=1
        )
        self.normal = torch.stack(
            [torch.randn(horizon, latent, generator=g) for g in generators], dim=1
        )

    def start(self, count: int) -> Tensor:
        return (self.first * count).long().clamp(max=count - 1)

    def at(self, step: int, index: Tensor) -> _Step:
        uniform = self.uniform[step][index]
        return _Step(uniform[:, 1:], self.normal[step][index], uniform[:, 0])


class SingleDream(gym.Env):
    """One dream with NumPy observations, for any algorithm that speaks Gymnasium."""

    def __init__(self, envs: DreamEnv, render_mode: str | None = None):
        self.envs, self.render_mode, self.metadata = envs, render_mode, envs.metadata
        self.observation_space = envs.single_observation_space
        self.action_space = envs.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31))
        observation, info = self.envs.reset(seed=[drawn], options=options)
        return observation[0].numpy(), info

    def step(self, action: np.ndarray):
        outcome = self.envs.step(np.asarray(action)[None])
        observation, reward, terminated, truncated, info = outcome
        flags = bool(terminated[0]), bool(truncated[0])
        return observation[0].numpy(), float(reward[0]), *flags, info

    def render(self) -> np.ndarray | None:
        return self.envs.render()[0] if self.render_mode else None
