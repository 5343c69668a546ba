import numpy as np
import pytest
import torch

from wm.envs import EnvConfig, as_vector, make_env
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.dream import DreamEnv, Starts
from wm.worldmodels.latent import FEATURES, LatentEnv
from wm.worldmodels.vae import to_images

GAME = EnvConfig("tiny", max_steps=20)
CELL_AND_FEATURES = pytest.mark.parametrize(
    ("cell", "features"), [("lstm", "z"), ("lstm", "zh"), ("lstm", "zhc"), ("gru", "zh")]
)


@pytest.fixture
def live(vision):
    """live(memory, features, actions): a real game's environment and its features so far."""

    def make(memory, features, actions=()):
        envs = LatentEnv(as_vector(make_env(GAME)), vision, memory, features)
        seen = [envs.reset(seed=[5])[0]]
        seen += [envs.step(torch.tensor([[action]]))[0] for action in actions]
        return envs, torch.cat(seen)

    return make


def dream_from(life, features):
    """A dream that begins at this moment of real life."""
    start = Starts(life.latent, torch.stack([layer[0] for layer in life.state], dim=1))
    return DreamEnv(life.memory, start, ControllerConfig(features=features), "tiny", 1)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", ["observation_space", "action_space"])
@pytest.mark.parametrize("each", ["", "single_"])
def test_life_and_dream_have_the_same_spaces(make_memory, live, features, kind, each):
    life, _ = live(make_memory(), features)
    assert getattr(life, each + kind) == getattr(dream_from(life, features), each + kind)


@CELL_AND_FEATURES
def test_a_dream_begun_in_real_life_sees_what_life_sees(make_memory, live, cell, features):
    memory = make_memory(cell=cell)
    life, seen = live(memory, features, [0.5, -1.0, 0.3])
    dream = dream_from(life, features)
    dreamt, _ = dream.reset(seed=[1])
    assert dream.observation_space.contains(dreamt.numpy())
    torch.testing.assert_close(dreamt, seen[-1:])

    action = torch.tensor([[0.7]])
    dreamt, lived = dream.step(action)[0], life.step(action)[0]
    torch.testing.assert_close(dreamt[:, 4:], lived[:, 4:])  # all but the latent, which M guesses


@pytest.mark.parametrize("features", FEATURES)
def test_at_reset_z_is_the_encoders_mean_and_the_rest_zero(vision, make_memory, live, features):
    envs, _ = live(make_memory(), features, [1.0])
    frame, _ = make_env(GAME).reset(seed=8)
    mean, _ = vision.encode(to_images(frame[None]))
    observation, _ = envs.reset(seed=[8])
    assert observation.shape == (1, *envs.single_observation_space.shape)
    torch.testing.assert_close(observation[:, :4], mean)
    assert not observation[:, 4:].any()


def test_features_are_the_latent_then_the_cell_then_the_hidden_of_all_steps_before(
    make_memory, live
):
    memory, actions = make_memory(), [0.5, -1.0, 0.3]
    _, latent = live(memory, "z", actions)
    _, seen = live(memory, "zhc", actions)
    inputs = latent[None, :-1], torch.tensor(actions)[None, :, None]
    hidden, (_, cell) = memory.advance(*inputs, None)
    torch.testing.assert_close(seen[-1], torch.cat([latent[-1], cell[0, 0], hidden[0, -1]]))
    _, seen = live(memory, "zh", actions)
    torch.testing.assert_close(seen[-1], torch.cat([latent[-1], hidden[0, -1]]))


def test_the_game_behind_the_features_is_unchanged(vision, make_memory, live):
    envs, _ = live(make_memory(), "zh")
    game, rewards, over = make_env(GAME), 0.0, False
    game.reset(seed=5)
    while not over:
        observation, reward, terminated, truncated, _ = envs.step(torch.tensor([[0.3]]))
        frame, *expected, _ = game.step(np.array([0.3], np.float32))
        assert [reward[0], terminated[0], truncated[0]] == expected
        torch.testing.assert_close(observation[:, :4], vision.encode(to_images(frame[None]))[0])
        rewards, over = rewards + reward[0], terminated[0] or truncated[0]
    assert rewards > 0
