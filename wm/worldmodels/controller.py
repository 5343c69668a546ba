"""C: a linear policy of about a thousand weights, or one with a hidden layer, for a whole
population at once.

Ha & Schmidhuber 2018, section A.3. P candidates, E episodes each, F features, A actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from wm.config import ConfigError, added, bounded


@dataclass(frozen=True)
class ControllerConfig:
    features: Literal["z", "zh", "zhc"] = "zh"
    bias: bool = True
    hidden: int = bounded(0, 0)  # units of a tanh layer before the output; 0: linear
    gas_limit: float = bounded(1.0, 0.0, 1.0)  # the most gas C can give in CarRacing
    drag: float = bounded(0.0, 0.0, 1.0)  # the least it brakes there, which bounds the speed

    fitness: Literal["dream", "real"] = "dream"  # where candidates are tried, or C practises
    temperature: float = bounded(1.0, 1e-6)  # of the dream
    horizon: int = bounded(1000, 1)  # actions after which a dream is cut
    start: Literal["any", "first"] = "any"  # dreams begin anywhere in real episodes, or at starts
    end: Literal["weighted", "calibrated", "expected", "threshold", "never"] = (
        "weighted"  # what ends a dream: see dream.DreamEnv
    )
    action_noise: float = bounded(0.0, 0.0)  # standard deviation on C's actions in the dream
    precision: Literal["32-true", "bf16-true"] = "32-true"  # of the dream's matrix products
    part: int = bounded(512, 1)  # dreams stepped together, one candidate's at least, on a core

    optimizer: Literal["cma", "es", "ppo"] = "cma"  # ppo: by gradients; see ppo.py
    population: int = bounded(64, 4)
    episodes: int = bounded(16, 1)  # of each candidate; ppo has population x episodes
    generations: int = bounded(100, 1)  # in each round
    sigma: float = bounded(0.1, 1e-6)  # initial (cma) or fixed (es) deviation of candidates
    discount: float = added(0.98, 0.0, 0.9999)  # ppo: of a step; 0.98: fifty ahead count
    step_size: float = bounded(0.03, 0.0)  # es: learning rate
    adam: bool = True  # es: Adam, else plain gradient ascent
    validate_every: int = bounded(10, 1)  # generations between scores in the real game
    validation_episodes: int = bounded(8, 1)
    keep: Literal["best", "mean"] = "best"  # by validation score, also between rounds; or the last

    def __post_init__(self) -> None:
        if self.optimizer == "es" and self.population % 2:
            raise ConfigError(
                f"controller.optimizer=es tries pairs: a population of {self.population} is odd"
            )


@dataclass(frozen=True)
class TuningConfig:
    """What is different when C goes on in the real game, where every episode is played."""

    generations: int = bounded(0, 0)  # 0: C does not
    population: int = bounded(16, 4)
    episodes: int = bounded(4, 1)
    validate_every: int = bounded(5, 1)


def parameter_count(config: ControllerConfig, features: int, actions: int) -> int:
    """Weights of one candidate: 867 in the paper's CarRacing, 1,088 in take-cover."""
    return sum(
        rows * (columns + config.bias) for rows, columns in _layers(config, features, actions)
    )


def _layers(config: ControllerConfig, features: int, actions: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of each layer."""
    if config.hidden:
        return [(config.hidden, features), (actions, config.hidden)]
    return [(actions, features)]


def initial_weights(config: ControllerConfig, features: int, actions: int, seed: int) -> Tensor:
    """Where the search begins, float64 [n]: at zero, but a hidden layer of zeros has no gradient.

    There it is uniform within 1 / sqrt(inputs), as torch.nn.Linear's.
    """
    weights = torch.zeros(parameter_count(config, features, actions), dtype=torch.float64)
    if config.optimizer == "ppo" and config.hidden:
        first = config.hidden * features
        generator = torch.Generator().manual_seed(seed)
        weights[:first].uniform_(-1, 1, generator=generator).div_(features**0.5)
    return weights


def squash(raw: Tensor, game: str, gas_limit: float = 1.0, drag: float = 0.0) -> Tensor:
    """Raw outputs [...,A] to the game's action space, as in the paper but for the two bounds.

    CarRacing: tanh steering, sigmoid gas, tanh brake clipped at 0. Other games: tanh.
    """
    if game != "carracing":
        return raw.tanh()
    steering, gas, brake = raw.unbind(-1)
    return torch.stack(
        [steering.tanh(), gas_limit * gas.sigmoid(), brake.tanh().clamp(min=drag)], dim=-1
    )


class Controller:
    """The policy of P candidates; observation i belongs to candidate i // (N / P).

    Args:
        weights: [P,n] with n = parameter_count(...): for each layer its matrix, then its bias.
    """

    def __init__(
        self, config: ControllerConfig, game: str, features: int, actions: int, weights: Tensor
    ):
        self.squash = partial(squash, game=game, gas_limit=config.gas_limit, drag=config.drag)
        self.layers = []
        expected = parameter_count(config, features, actions)
        if weights.shape[-1] != expected:
            raise ValueError(f"the controller has {expected} weights, not {weights.shape[-1]}")
        for rows, columns in _layers(config, features, actions):
            matrix, weights = weights[:, : rows * columns], weights[:, rows * columns :]
            bias = weights[:, :rows] if config.bias else weights.new_zeros(len(weights), rows)
            weights = weights[:, rows * config.bias :]
            matrix = matrix.unflatten(1, (rows, columns)).transpose(1, 2).contiguous()
            self.layers.append((matrix, bias[:, None]))  # [P,in,out], [P,1,out]

    def reset(self, seeds: Sequence[int]) -> None:
        """Nothing to reset: the policy is deterministic and its memory is M."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features [N,F] -> actions [N,A]."""
        return self.squash(self.raw(features))

    def raw(self, features: Tensor) -> Tensor:
        """Features [N,F] -> outputs [N,A], before they are squashed to actions."""
        population = len(self.layers[0][0])
        x = features.unflatten(0, (population, -1))
        for number, (matrix, bias) in enumerate(self.layers):
            x = torch.baddbmm(bias, x.tanh() if number else x, matrix)
        return x.flatten(0, 1)
