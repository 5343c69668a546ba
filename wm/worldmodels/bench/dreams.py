"""How fast a generation dreams, beside the bound of its matrix products and beside one dream."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from wm.envs import EnvConfig, action_space
from wm.workers import Workers
from wm.worldmodels.agent import Agent, AgentConfig
from wm.worldmodels.bench import plain
from wm.worldmodels.bench.compare import Comparison, Rate, compare, seconds, timed
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.engine import PRECISIONS, join_weights
from wm.worldmodels.evolution import dream_fitness
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.starts import Starts
from wm.worldmodels.vae import ConvVAE, VisionConfig

POPULATION, EPISODES, HORIZON = 64, 16, 100
SIZES = {"carracing": (32, 256, "zh"), "takecover": (64, 512, "zhc")}  # the paper's Z, H, features


def save_dreamer(folder: Path, game: str, precision: str = "32-true") -> Agent:
    """An untrained agent of the paper's size whose dreams last to the horizon, in a folder."""
    latent, hidden, features = SIZES[game]
    config = AgentConfig(
        EnvConfig(game),
        VisionConfig(latent=latent),
        MemoryConfig(hidden=hidden),
        ControllerConfig(features, horizon=HORIZON, precision=precision),
    )
    memory = MDNRNN(config.memory, latent, *action_space(game).shape)
    torch.nn.init.constant_(memory.end_head.bias, -1000.0)
    starts = Starts(torch.randn(100, latent), 0.1 * torch.randn(100, 2, hidden))
    agent = Agent(config, ConvVAE(config.vision), memory, torch.empty(0), starts)
    agent = replace(agent, weights=torch.randn(agent.config.parameters))
    agent.save(folder)
    return agent


def dream_rate(workers: Workers, folder: Path, agent: Agent, population: int = POPULATION) -> Rate:
    """Dream steps a second of a generation."""
    config, seeds = agent.config.controller, list(range(EPISODES))
    sizes = config.part, config.horizon
    fitness = dream_fitness(workers, folder, lambda _: seeds, *sizes, compiled=True)
    candidates = 0.1 * torch.randn(population, agent.config.parameters)
    fitness(candidates, 0)  # compiles
    steps = population * EPISODES * config.horizon
    return lambda: timed(steps, lambda: fitness(candidates, 0))


def multiply(folder: Path, steps: int, core: int) -> None:
    """The two matrix products of so many steps of a part's dreams, and nothing else."""
    agent = Agent.load(folder)
    config = agent.config.controller
    weights = join_weights(agent.memory, PRECISIONS[config.precision])
    inputs, hidden = (
        torch.randn(config.part, matrix.shape[1], dtype=matrix.dtype)
        for matrix in (weights.gates, weights.heads)
    )
    with torch.inference_mode():
        for _ in range(steps):
            F.linear(inputs, weights.gates)
            F.linear(hidden, weights.heads)


def products_rate(workers: Workers, folder: Path, agent: Agent) -> Rate:
    """Dream steps a second if the two matrix products were all; loading the agent is not timed."""

    def multiplied(steps: int) -> float:
        task = partial(multiply, folder, steps)
        return seconds(lambda: list(workers.map(task, range(side_by_side), 600.0)))

    part = agent.config.controller.part
    side_by_side = min(workers.count, POPULATION * EPISODES // part)  # as the dreams are
    dreams = side_by_side * part
    return lambda: dreams * 1000 / (multiplied(1010) - multiplied(10))


def alone_rate(agent: Agent, steps: int) -> float:
    """Steps a second of one dream on one core: with more it would be slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return timed(steps, lambda: plain.dream_alone(agent, steps))
    finally:
        torch.set_num_threads(before)


def dreams(workers: Workers, scratch: Path) -> Iterator[Comparison]:
    for game in SIZES:
        for precision, target in (("32-true", 0.6), ("bf16-true", 0.4)):
            folder = scratch / f"{game}-{precision}"
            agent = save_dreamer(folder, game, precision)
            ours, name = dream_rate(workers, folder, agent), f"dream, {game}, {precision}"
            products = products_rate(workers, folder, agent)
            yield compare(name, "its two matrix products alone", "step", ours, products, target)
            if precision == "32-true":
                theirs = partial(alone_rate, agent, 300)
                yield compare(name, "one dream at a time", "step", ours, theirs, 40)
