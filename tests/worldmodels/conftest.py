"""A small V, M and agent, with random weights."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from wm.envs import EnvConfig, action_space
from wm.worldmodels.agent import Agent, AgentConfig
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.dream import Starts
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.vae import ConvVAE, VisionConfig

LATENT = 4
STARTS = 7


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)  # more cost more than they give on tensors this small


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vision():
    """V has four million weights at any latent size: one for all tests, which leave it as it is."""
    torch.manual_seed(0)
    return ConvVAE(VisionConfig(latent=LATENT)).eval()


@pytest.fixture(scope="session")
def make_memory():
    """make_memory(latent, actions, **changes to its settings)."""

    def make(latent=LATENT, actions=1, **changes):
        torch.manual_seed(1)
        config = MemoryConfig(**{"hidden": 6, "mixtures": 3, **changes})
        return MDNRNN(config, latent, actions).eval()

    return make


@pytest.fixture(scope="session")
def make_agent(vision, make_memory):
    """make_agent(game, memory settings, **controller settings)."""

    def make(game="tiny", memory=None, **controller):
        space = action_space(game)
        m = make_memory(LATENT, *space.shape, **(memory or {}))
        settings = ControllerConfig(**{"horizon": 20, **controller})
        config = AgentConfig(EnvConfig(game, max_steps=20), vision.config, m.config, settings)
        generator = torch.Generator().manual_seed(2)
        layers = 2 if m.config.cell == "lstm" else 1
        starts = Starts(
            torch.randn(STARTS, LATENT, generator=generator),
            torch.randn(STARTS, layers, m.config.hidden, generator=generator).tanh(),
        )
        agent = Agent(config, vision, m, torch.empty(0), starts)
        weights = torch.randn(agent.config.parameters, generator=generator, dtype=torch.float64)
        return replace(agent, weights=weights)

    return make


@pytest.fixture(scope="session")
def saved(make_agent, tmp_path_factory):
    """saved(game): the folder of an agent, to be read only."""

    @cache
    def save(game):
        folder = tmp_path_factory.mktemp(game)
        make_agent(game, features="zhc", horizon=10).save(folder)
        return folder

    return save
