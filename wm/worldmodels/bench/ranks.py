"""What bfloat16 does to evolution: the ranks of an agent's candidates in dreams of both precisions.

Strategies use ranks alone, so what counts is Spearman's correlation of the fitness. Beside it
stands what other dreams do to the ranks: the correlation between two sets of them in float32.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from wm.files import write_atomically
from wm.workers import Workers
from wm.worldmodels.agent import Agent, find_agent
from wm.worldmodels.evolution import Fitness, dream_fitness

CANDIDATES, DREAMS = 64, 16
DEVIATION = 0.1  # of candidates around an agent; around zero it is the search's first


def bench_ranks(run: str, runs: Path) -> None:
    """Print the table for an agent, given by its run or folder, and keep it in ranks.json.

    Raises:
        WMError: if there is no such agent.
    """
    folder, path = find_agent(run, runs), runs / "bench" / "ranks.json"
    with Workers(0) as workers:
        table = ranks(Agent.load(folder), workers)
    print(json.dumps(table, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"run": run, **table}, indent=1))


def ranks(agent: Agent, workers: Workers, compiled: bool = True) -> dict[str, dict[str, float]]:
    """Spearman's correlations among candidates around the agent and among those around zero.

    nan where candidates are all equally fit, for instance where every dream lasts to the horizon.
    """
    chance = torch.Generator().manual_seed(0)
    noise = torch.randn(CANDIDATES, agent.config.parameters, generator=chance)
    groups = {
        "around the agent": agent.weights + DEVIATION * noise,
        "around zero": agent.config.controller.sigma * noise,
    }
    with tempfile.TemporaryDirectory(prefix="wm-ranks-") as scratch:
        exact, rough = (
            fitness_in(precision, agent, Path(scratch) / precision, workers, compiled)
            for precision in ("32-true", "bf16-true")
        )
        return {name: correlations(exact, rough, group) for name, group in groups.items()}


def fitness_in(
    precision: str, agent: Agent, folder: Path, workers: Workers, compiled: bool
) -> Fitness:
    """The fitness in an agent's dreams of a precision; no two generations share a dream."""
    controller = replace(agent.config.controller, precision=precision)
    replace(agent, config=replace(agent.config, controller=controller)).save(folder)

    def seeds(generation: int) -> list[int]:
        return list(range(generation * DREAMS, (generation + 1) * DREAMS))

    sizes = controller.part, controller.horizon
    return dream_fitness(workers, folder, seeds, *sizes, compiled)


def correlations(exact: Fitness, rough: Fitness, candidates: Tensor) -> dict[str, float]:
    """Between precisions on the same dreams, for two sets of them, and between the sets."""
    these, those = exact(candidates, 0), exact(candidates, 1)
    pairs = {
        f"32-true and bf16-true, {DREAMS} dreams": (these, rough(candidates, 0)),
        f"32-true and bf16-true, {DREAMS} others": (those, rough(candidates, 1)),
        f"32-true, {DREAMS} dreams and {DREAMS} others": (these, those),
    }
    return {name: round(float(spearmanr(*pair).statistic), 2) for name, pair in pairs.items()}
