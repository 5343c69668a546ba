"""Real life: the game seen through V and remembered by M, with the controller's features.

The dream (dream.py) answers to the same interface and gives the same features.
"""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from wm.worldmodels.mdnrnn import MDNRNN, State
from wm.worldmodels.vae import ConvVAE, to_images

FEATURES = {  # what C sees of the latent z, the hidden h and the LSTM's cell c
    "z": lambda z, state: z.clone(),  # the environment keeps its own
    "zh": lambda z, state: torch.cat([z, state[0][0]], dim=-1),
    "zhc": lambda z, state: torch.cat([z, state[1][0], state[0][0]], dim=-1),  # order: [z, c, h]
}


def feature_size(features: str, latent: int, hidden: int) -> int:
    return latent + hidden * (len(features) - 1)


def feature_space(features: str, latent: int, hidden: int) -> Box:
    return Box(-np.inf, np.inf, (feature_size(features, latent, hidden),), np.float32)


class LatentEnv(VectorWrapper):
    """A vector of real games whose observations are the features [N,F] of V and M.

    h at time t has seen the latents and actions before t, z is the mean of q(z | frame).
    """

    def __init__(self, envs: VectorEnv, vision: ConvVAE, memory: MDNRNN, features: str):
        super().__init__(envs)
        self.vision, self.memory, self.features = vision.eval(), memory.eval(), FEATURES[features]
        latent, hidden = vision.config.latent, memory.config.hidden
        self.single_observation_space = feature_space(features, latent, hidden)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    @torch.inference_mode()
    def reset(self, *, seed: Any = None, options: dict | None = None):
        frames, info = self.env.reset(seed=seed, options=options)
        self.state: State = self.memory.zero_state(self.num_envs)
        self.survival = torch.ones(self.num_envs)  # 1 or 0, as a dream's
        return self._see(frames), info

    @torch.inference_mode()
    def step(self, actions: Any):
        actions = torch.as_tensor(actions)
        self.state = self.memory.step(self.latent, actions, self.state)
        frames, reward, terminated, truncated, info = self.env.step(actions.numpy())
        self.survival = self.survival * ~torch.from_numpy(terminated)
        return self._see(frames), reward, terminated, truncated, info

    def _see(self, frames: np.ndarray) -> Tensor:
        self.latent = self.vision.encode(to_images(frames))[0]
        return self.features(self.latent, self.state)
