"""What one would write without this project: the plain versions that `wm bench` compares with.

One dream at a time, one environment per process with Gymnasium's own means, one image at a time
from .npz files. Each is the shortest code that does the job; none is slowed down on purpose.
"""

import time
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv
from torch.distributions import Categorical, Normal
from torch.utils.data import DataLoader, Dataset

from wm.envs import EnvConfig, make_env
from wm.worldmodels.agent import Agent
from wm.worldmodels.latent import FEATURES
from wm.worldmodels.vae import ConvVAE


@torch.inference_mode()
def dream_alone(agent: Agent, steps: int) -> float:
    """The return of one dream of so many steps, sampled with torch.distributions."""
    memory, policy = agent.memory, agent.controller()
    features = FEATURES[agent.config.controller.features]
    latent, state = agent.starts.pick(torch.zeros(1, dtype=torch.long))
    total = 0.0
    for _ in range(steps):
        action = policy(features(latent, state))
        prediction, state = memory(latent[:, None], action[:, None], state)
        log_pi, mean, log_sigma = (part[0, 0] for part in prediction[:3])
        component = Categorical(logits=log_pi.T).sample()[None]  # one for each latent
        chosen = (part.gather(0, component) for part in (mean, log_sigma.exp()))
        latent = Normal(*chosen).sample()
        total += float(prediction.reward)
    return total


def play_async(env: EnvConfig, processes: int, steps: int) -> float:
    """Steps a second of random actions in Gymnasium's AsyncVectorEnv, once it has started."""
    envs = AsyncVectorEnv([lambda: make_env(env)] * processes, context="spawn")
    try:
        envs.reset(seed=0)
        started = time.perf_counter()
        for _ in range(steps // processes):
            envs.step(envs.action_space.sample())
        return steps // processes * processes / (time.perf_counter() - started)
    finally:
        envs.close()


class NpzImages(Dataset):
    """Frames of one .npz file per episode, read one at a time."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.npz"))
        counts = [len(np.load(path)["frames"]) for path in self.files]
        owners = zip(self.files, counts, strict=True)
        self.places = [(path, frame) for path, count in owners for frame in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> torch.Tensor:
        path, frame = self.places[number]
        return torch.from_numpy(np.load(path)["frames"][frame])


def train_from_npz(vision: ConvVAE, folder: Path, batches: int) -> None:
    """Train V for so many batches, in float32."""
    images, size = NpzImages(folder), vision.config.batch
    chosen = torch.randint(len(images), (size * batches,))
    loader = DataLoader(images, size, sampler=chosen.tolist())
    optimizer = torch.optim.Adam(vision.parameters(), vision.config.learning_rate)
    for frames in loader:
        optimizer.zero_grad()
        noise = torch.randn(size, vision.config.latent)
        vision.loss(frames, frames, noise)["loss"].backward()
        optimizer.step()
