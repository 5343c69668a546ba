import itertools

import pytest
import torch
from torch import nn

from wm.config import ConfigError
from wm.envs import action_space
from wm.worldmodels.controller import Controller, ControllerConfig, parameter_count, squash
from wm.worldmodels.latent import feature_size

LAYERS = pytest.mark.parametrize("hidden", [0, 3])
BIASES = pytest.mark.parametrize("bias", [True, False])


@pytest.mark.parametrize(
    ("settings", "latent", "hidden", "actions", "count"),
    [
        (ControllerConfig(features="zh"), 32, 256, 3, 867),
        (ControllerConfig(features="zhc", bias=False), 64, 512, 1, 1088),
        (ControllerConfig(features="z", hidden=40), 32, 256, 3, 33 * 40 + 41 * 3),
    ],
)
def test_parameter_count(settings, latent, hidden, actions, count):
    features = feature_size(settings.features, latent, hidden)
    assert parameter_count(settings, features, actions) == count


@LAYERS
@BIASES
@pytest.mark.parametrize("game", ["carracing", "takecover"])
def test_a_population_equals_its_candidates_alone(game, hidden, bias):
    config, actions = ControllerConfig(hidden=hidden, bias=bias), action_space(game).shape[0]
    weights = torch.randn(4, parameter_count(config, 5, actions))
    features = torch.randn(4 * 2, 5)  # two observations for each
    together = Controller(config, game, 5, actions, weights)(features)
    alone = [
        Controller(config, game, 5, actions, candidate[None])(own)
        for candidate, own in zip(weights, features.split(2), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@LAYERS
@BIASES
def test_weights_are_each_layers_matrix_then_its_bias(hidden, bias):
    sizes = [5, hidden, 1] if hidden else [5, 1]
    linears = [nn.Linear(n, m, bias) for n, m in itertools.pairwise(sizes)]
    network = nn.Sequential(*(part for linear in linears for part in (linear, nn.Tanh())))
    weights = nn.utils.parameters_to_vector(network.parameters())[None]
    controller = Controller(ControllerConfig(hidden=hidden, bias=bias), "tiny", 5, 1, weights)
    features = torch.randn(6, 5)
    torch.testing.assert_close(controller(features), network(features))


@pytest.mark.parametrize(("game", "gas_limit"), [("carracing", 0.4), ("takecover", 1.0)])
def test_actions_stay_in_the_games_space_for_any_raw_output(game, gas_limit):
    space, extremes = action_space(game), [-torch.inf, -1e30, -1.0, 0.0, 1.0, 1e30, torch.inf]
    raw = torch.tensor(list(itertools.product(extremes, repeat=space.shape[0])))
    actions = squash(raw, game, gas_limit, drag=0.05)
    assert all(space.contains(action.numpy()) for action in actions)
    torch.testing.assert_close(actions[:, 0].unique(), raw[:, 0].tanh().unique())  # full range
    if game == "carracing":
        assert actions[:, 1].max().item() == pytest.approx(gas_limit)
        assert actions[:, 2].max() == 1.0
        assert actions[:, 2].min().item() == pytest.approx(0.05)


def test_plain_evolution_strategies_try_pairs():
    with pytest.raises(ConfigError, match="a population of 5 is odd"):
        ControllerConfig(optimizer="es", population=5)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(ValueError, match="has 6 weights, not 7"):
        Controller(ControllerConfig(), "tiny", 5, 1, torch.zeros(1, 7))
