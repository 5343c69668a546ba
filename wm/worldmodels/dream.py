"""The dream: M alone as a batch of environments, no game at all.

Ha & Schmidhuber 2018, section 4.2. N dreams, S starts, Z latent, H hidden. Observations, rewards
and flags are torch tensors; `SingleDream` is one dream as a plain Gymnasium environment.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from wm.envs import STEPS_PER_SECOND, action_space
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.engine import PRECISIONS, Noise, dream_step, fused_step, join_weights
from wm.worldmodels.latent import FEATURES, feature_space
from wm.worldmodels.mdnrnn import MDNRNN
from wm.worldmodels.starts import Starts
from wm.worldmodels.vae import ConvVAE, to_frames

KEPT_SHARE = 7 / 8  # of dreams that go on; below it, those that have ended are left out
FAINT = 0.01  # a dream is over when it is less likely than this to have lived so long
NOISE_STEPS = 64  # drawn at a time


class DreamEnv(VectorEnv):
    """N dreams side by side, stepped together.

    Start and noise of a dream depend on its seed alone: equal seeds give equal ones (common random
    numbers), whatever the batch. The caller resets (autoreset is disabled); what a dream shows and
    pays after its end means nothing: it is left out of the computation sooner or later.

    A dream ends as M's end head says (config.end): "threshold" where its output is above 0.5 (the
    original code); "calibrated" with the probability in what M was shown, about that of real life
    (see wm/data.py); "weighted" with its output as it was trained, ends weighted: a dream about as
    many times deadlier, meant to leave C less to exploit where M has lost sight of a danger (not
    yet shown to transfer better).
    "expected": no end is drawn; a step pays its reward times the probability of having lived so
    long, which has the mean of "calibrated" returns without the chance of when a dream ends.
    "never": it goes on to the horizon.

    It runs on the device that M is on.

    Args:
        config: features, temperature, horizon, end, noise of actions and precision of the dream.
        vision: for render() only.
        repeat: steps of the game in one of the dream; each pays 1 where M has no reward head.
        compiled: fuse the step on a CPU, which takes seconds at first and pays off for many dreams.
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
        repeat: int = 1,
        compiled: bool = False,
    ):
        self.memory, self.starts, self.config, self.vision = memory.eval(), starts, config, vision
        self.num_envs, self.device = num_envs, memory.device
        self.metadata = {**self.metadata, "render_fps": STEPS_PER_SECOND[game] / repeat}
        self.features = FEATURES[config.features]
        self.weights = join_weights(memory, PRECISIONS[config.precision], repeat)
        self.temperature = torch.tensor(config.temperature, device=self.device)
        fused = compiled and self.device.type == "cpu"
        self.advance = fused_step() if fused else dream_step
        self.single_observation_space = feature_space(
            config.features, memory.latent, memory.config.hidden
        )
        self.single_action_space = action_space(game)
        space = self.single_action_space
        self.limits = [torch.from_numpy(a).to(self.device) for a in (space.low, space.high)]  # [A]
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @torch.inference_mode()
    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict | None = None):
        """Begin N dreams from seeds; options={"start": [N]} begins at given starts instead."""
        seeds = self._seeds(seed)
        distinct, index = np.unique(seeds, return_inverse=True)
        sizes = self.memory.uniform_size, self.memory.latent, len(self.limits[0])
        self.noise = _Noise(distinct.tolist(), *sizes, self._bar, self.device)
        self.index = torch.from_numpy(index).to(self.device)
        start = self.noise.start(len(self.starts.latent))[self.index]
        start = torch.as_tensor((options or {}).get("start", start), device=self.device)
        self.latent, self.state = self.starts.pick(start)
        self.active = torch.arange(self.num_envs, device=self.device)  # the dreams computed
        self.ended = torch.zeros_like(self.active, dtype=torch.bool)  # of those
        self.alive = torch.ones_like(self.ended, dtype=torch.float32)  # the chance of having lived
        self.steps = 0
        return self.features(self.latent, self.state), {}

    @torch.inference_mode()
    def step(self, actions: Any):
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        if len(self.active) < self.num_envs:
            actions = actions[self.active]
        noise, mixtures = self.noise.at(self.steps), self.memory.config.mixtures
        if self.config.action_noise:
            actions = self._disturb(actions, noise.action[self.index])
        now = (self.latent, self.memory.told(actions), self.state)
        self.latent, self.state, observation, reward, end = self.advance(
            self.weights, mixtures, self.features, self.temperature, *now, noise, self.index
        )
        self.steps += 1
        reward, terminated = self._live_on(reward, end, noise.bar[self.index])
        over = self.steps >= self.config.horizon
        truncated = torch.full((self.num_envs,), over, device=self.device)
        everywhere = [self._among_all(values) for values in (observation, reward, terminated)]
        self._leave_out(terminated)
        return *everywhere, truncated, {}

    @torch.inference_mode()
    def render(self) -> list[np.ndarray]:
        """What V sees in the current latents: N frames [64,64,3] uint8."""
        return list(to_frames(self.vision.decode(self._among_all(self.latent))))

    @property
    def survival(self) -> Tensor:
        """The chance [N] with which each dream has lived so long: 0 or 1 where ends are drawn."""
        return self._among_all(self.alive * ~self.ended)

    def _disturb(self, actions: Tensor, noise: Tensor) -> Tensor:
        """Actions as in the collected data, where a controller's are noisy too."""
        return (actions + self.config.action_noise * noise).clamp(*self.limits)

    def _live_on(self, reward: Tensor, end: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
        """What a step pays and which dreams it ends, from M's reward and end logit [N]."""
        if self.config.end != "expected":
            return reward, end > bar
        reward = reward * self.alive
        self.alive = self.alive * (self.calibration - end).sigmoid()
        return reward, self.alive < FAINT

    @property
    def calibration(self) -> float:
        """What a weighted end logit lies above that of the probability in what M was shown."""
        return math.log(self.memory.config.end_weight)

    def _bar(self, uniform: Tensor) -> Tensor:
        """What an end logit must exceed: u < sigmoid(logit) means logit > log(u / (1 - u))."""
        if self.config.end == "never":
            return torch.full_like(uniform, torch.inf)
        if self.config.end == "threshold":
            return torch.zeros_like(uniform)
        return uniform.logit() + self.calibration * (self.config.end == "calibrated")

    def _among_all(self, values: Tensor) -> Tensor:
        """Values of the dreams that are computed at their places among all, zeros elsewhere."""
        if len(values) == self.num_envs:
            return values
        everywhere = values.new_zeros(self.num_envs, *values.shape[1:])
        return everywhere.index_copy_(0, self.active, values)

    def _leave_out(self, terminated: Tensor) -> None:
        """Compute dreams that have ended no longer, once they are enough to be worth it."""
        self.ended = self.ended | terminated
        rest = self.ended.logical_not().nonzero().squeeze(1)
        if 1 < len(rest) < KEPT_SHARE * len(self.ended):
            self.active, self.index = self.active[rest], self.index[rest]
            self.latent, self.ended, self.alive = (
                kept[rest] for kept in (self.latent, self.ended, self.alive)
            )
            self.state = tuple(layer[:, rest] for layer in self.state)

    def _seeds(self, seed: int | Sequence[int] | None) -> np.ndarray:
        if seed is None:
            return np.random.default_rng().integers(2**31, size=self.num_envs)
        if isinstance(seed, int | np.integer):
            return np.arange(seed, seed + self.num_envs)
        if len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} dreams")
        return np.asarray(seed)


class _Noise:
    """The random numbers of some dreams: a generator for each seed, drawn from some steps ahead.

    Args:
        uniforms, normals, actions: how many numbers a step takes.
        bar: makes a bar for the end of a uniform number.
        device: where they are needed; they are drawn on the CPU, the same for every device.
    """

    def __init__(
        self,
        seeds: list[int],
        uniforms: int,
        normals: int,
        actions: int,
        bar: Callable[[Tensor], Tensor],
        device: torch.device,
    ):
        self.device = device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniforms, self.normals, self.actions, self.bar = uniforms, normals, actions, bar
        self.first = torch.cat([torch.rand(1, generator=g) for g in self.generators]).to(device)

    def start(self, count: int) -> Tensor:
        return (self.first * count).long().clamp(max=count - 1)

    def at(self, step: int) -> Noise:
        """Of steps in order, beginning with 0."""
        if step % NOISE_STEPS == 0:
            bar = self.bar(self._draw(torch.rand, 1)[..., 0])
            uniform = self._draw(torch.rand, self.uniforms)
            normal, action = (self._draw(torch.randn, n) for n in (self.normals, self.actions))
            self.steps = Noise(uniform, normal, bar, action)
        return Noise(*(numbers[step % NOISE_STEPS] for numbers in self.steps))

    def _draw(self, draw: Callable[..., Tensor], size: int) -> Tensor:
        drawn = [draw(NOISE_STEPS, size, generator=g) for g in self.generators]
        return torch.stack(drawn, dim=1).to(self.device)


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
