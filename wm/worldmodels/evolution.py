"""Evolution of C inside Lightning's Trainer: one generation is one step.

A callback asks a strategy for candidates and tells it their fitness; the module only tries them.
Strategies: CMA-ES (pycma) and the plain evolution-strategies gradient (Salimans et al. 2017).
P candidates, n weights. Fitness is a return: more is better.
"""

from collections.abc import Callable, Container
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import cma
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from scipy.stats import rankdata
from torch import Tensor, nn

from wm import WMError
from wm.ranks import of_leader, rank, summed, world_size
from wm.rollout import rollout
from wm.workers import Outcome, Workers
from wm.worldmodels.agent import Agent
from wm.worldmodels.controller import ControllerConfig

SECONDS_PER_DREAM_STEP = 1e-3  # a core that is slower by far is stuck

Fitness = Callable[[Tensor, int], Tensor]  # (candidates [P,n], generation) -> returns [P]
RealGame = Callable[[Tensor], list[Outcome]]  # weights [n] -> episodes on validation seeds


class Strategy(Protocol):
    """A population-based search; a deterministic function of its seed and the fitness told."""

    mean: np.ndarray  # [n]
    sigma: float

    def ask(self) -> np.ndarray:
        """The candidates of the next generation, [P,n]."""

    def tell(self, candidates: np.ndarray, fitness: np.ndarray) -> None:
        """Move towards candidates [P,n] of high fitness [P]."""


class CMAES:
    """Covariance-matrix adaptation (Hansen 2016), by pycma."""

    def __init__(self, config: ControllerConfig, mean: np.ndarray, seed: int):
        options = {
            "popsize": config.population,
            "randn": np.random.RandomState(seed).randn,
            "seed": np.nan,  # leaves NumPy's global generator alone
            "verbose": -9,
        }
        self.search = cma.CMAEvolutionStrategy(mean, config.sigma, options)

    @property
    def mean(self) -> np.ndarray:
        return self.search.mean

    @property
    def sigma(self) -> float:
        return float(self.search.sigma)

    def ask(self) -> np.ndarray:
        return np.stack(self.search.ask())

    def tell(self, candidates: np.ndarray, fitness: np.ndarray) -> None:
        self.search.tell(list(candidates), list(-fitness))  # pycma minimises


class PlainES:
    """theta <- theta + alpha g with g = 1/(P sigma) sum_i F_i eps_i over antithetic pairs.

    F are the centred ranks of the fitness (Salimans et al. 2017, section 2); Adam by config.
    """

    def __init__(self, config: ControllerConfig, mean: np.ndarray, seed: int):
        self.population, self.sigma = config.population // 2 * 2, config.sigma
        self.generator = np.random.default_rng(seed)
        self.weights = torch.nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        optimizer = torch.optim.Adam if config.adam else torch.optim.SGD
        self.optimizer = optimizer([self.weights], config.step_size, maximize=True)

    @property
    def mean(self) -> np.ndarray:
        return self.weights.detach().numpy().copy()

    def ask(self) -> np.ndarray:
        noise = self.generator.standard_normal((self.population // 2, len(self.weights)))
        return self.mean + self.sigma * np.concatenate([noise, -noise])

    def tell(self, candidates: np.ndarray, fitness: np.ndarray) -> None:
        ranks = (rankdata(fitness) - 1) / (len(fitness) - 1) - 0.5  # ties share a rank
        noise = (candidates - self.mean) / self.sigma
        gradient = ranks @ noise / (len(fitness) * self.sigma)
        self.weights.grad = torch.from_numpy(gradient)
        self.optimizer.step()


STRATEGIES = {"cma": CMAES, "es": PlainES}


class AskAndTell(Callback):
    """Owns the strategy; its checkpoint is the fitness told so far, which is replayed on load."""

    def __init__(self, make_strategy: Callable[[], Strategy]):
        self.make_strategy = make_strategy
        self.strategy, self.told = make_strategy(), []

    def on_train_batch_start(self, trainer: L.Trainer, module: "Evolution", *args: Any) -> None:
        module.candidates = of_leader(torch.from_numpy(self.strategy.ask()))

    def on_train_batch_end(self, trainer: L.Trainer, module: "Evolution", *args: Any) -> None:
        fitness = module.fitness.numpy()
        if not np.isfinite(fitness).all():
            worst = int(np.flatnonzero(~np.isfinite(fitness))[0])
            raise WMError(
                f"the fitness of candidate {worst} in generation {len(self.told)} is "
                f"{fitness[worst]}; the last checkpoint is sound"
            )
        self.strategy.tell(module.candidates.numpy(), fitness)
        self.told.append(module.fitness)
        module.mean.copy_(of_leader(torch.from_numpy(self.strategy.mean)))
        module.log("controller/sigma", float(self.strategy.sigma))

    def state_dict(self) -> dict[str, Any]:
        return {"fitness": torch.stack(self.told)} if self.told else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strategy, self.told = self.make_strategy(), list(state.get("fitness", ()))
        for fitness in self.told:  # no pickle of the strategy: a checkpoint must not run code
            self.strategy.tell(self.strategy.ask(), fitness.numpy())


class Search(L.LightningModule):
    """Looks for C in training steps, and judges its mean in the real game after some of them.

    The best mean by validation score is kept, of those that it has come to: not the one it began
    with.

    Args:
        mean: weights [n] to begin with.
        judged: the numbers of steps after which the mean plays.
    """

    def __init__(self, mean: Tensor, real_game: RealGame, judged: Container[int]):
        super().__init__()
        self.automatic_optimization = False
        self.real_game, self.judged = real_game, judged
        self.mean = nn.Parameter(mean.clone(), requires_grad=False)
        self.register_buffer("best", mean.double().clone())
        self.register_buffer("best_score", torch.tensor(-torch.inf, dtype=torch.float64))

    def validation_step(self, batch: Any, number: int) -> None:
        if self.global_step not in self.judged:
            return
        outcomes = self.real_game(self.mean.detach())
        score = mean_return(outcomes)
        if score > self.best_score:
            self.best_score.fill_(score)
            self.best.copy_(self.mean)
        steps = float(sum(outcome.steps for outcome in outcomes))
        self.log("controller/real_score", score, prog_bar=True, batch_size=1)
        self.log("controller/real_steps", steps, batch_size=1)


class Evolution(Search):
    """Tries candidates."""

    step_unit = "generation"

    def __init__(self, mean: Tensor, fitness: Fitness, real_game: RealGame, judged: Container[int]):
        super().__init__(mean.double(), real_game, judged)
        self.try_all = fitness

    def training_step(self, batch: Any, number: int) -> None:
        self.fitness = self.try_all(self.candidates, self.global_step)
        self.log("controller/fitness_best", self.fitness.max(), prog_bar=True)
        self.log("controller/fitness_mean", self.fitness.mean(), prog_bar=True)
        self.log("controller/fitness_worst", self.fitness.min())
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return CountingOptimizer([self.mean], {})


class CountingOptimizer(torch.optim.Optimizer):
    """Changes nothing: the strategy does. Lightning counts its steps, which are generations."""

    def step(self, closure: Any = None) -> None:
        """One generation is over."""


def dream_fitness(
    workers: Workers,
    folder: Path,
    seeds: Callable[[int], list[int]],
    part: int,
    horizon: int,
    compiled: bool,
    device: str = "cpu",
) -> Fitness:
    """The mean return over dreams; every candidate of a generation dreams the same seeds.

    Candidates are dreamt in parts, each by one process on one core: that is about three times as
    fast as one batch whose every operation is shared by the cores. Ranks dream every so manieth
    part. The parts, and so the result, are the same for any number of processes.

    Args:
        folder: of the agent whose V, M and starts are dreamt with.
        part: dreams of a part, at most; there are two parts at least.
        horizon: steps of a dream, at most.
        device: where they are dreamt.
    """

    limit = 600.0 + SECONDS_PER_DREAM_STEP * part * horizon  # the first has to be compiled

    def fitness(candidates: Tensor, generation: int) -> Tensor:
        episodes = seeds(generation)
        size = max(1, min(part // len(episodes), -(-len(candidates) // 2)))
        task = partial(dream_returns, folder, episodes, compiled, device=device)
        places = torch.arange(len(candidates)).split(size)[rank() :: world_size()]
        parts = [candidates[place].numpy() for place in places]
        returns = torch.zeros(len(candidates), dtype=torch.float64)
        dreams = workers.map(task, parts, limit, lambda part: f"dreaming of {len(part)} candidates")
        for place, dreamt in zip(places, dreams, strict=True):
            returns[place] = torch.from_numpy(dreamt)
        return summed(returns)

    return fitness


def dream_returns(
    folder: Path, seeds: list[int], compiled: bool, candidates: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """The mean returns [P] of candidates [P,n] over dreams of an agent."""
    agent = _dreaming_agent(folder, device)
    envs = agent.dreams(len(candidates) * len(seeds), compiled)
    policy = agent.controller(torch.from_numpy(candidates).to(device))
    result = rollout(envs, policy, seeds * len(candidates))
    return result.returns.unflatten(0, (len(candidates), -1)).mean(1).numpy()


@lru_cache(maxsize=1)
def _dreaming_agent(folder: Path, device: str) -> Agent:
    return Agent.load(folder).to(device)


def mean_return(outcomes: list[Outcome]) -> float:
    return float(np.mean([outcome.episode_return for outcome in outcomes]))
