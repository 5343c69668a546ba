from functools import partial

import numpy as np
import pytest
import torch

from wm import WMError
from wm.training import StepsData, TrainerConfig, fit
from wm.workers import Outcome, Workers
from wm.worldmodels import evolution
from wm.worldmodels.controller import ControllerConfig
from wm.worldmodels.evolution import STRATEGIES, AskAndTell, Evolution, dream_fitness

WEIGHTS, POPULATION = 5, 8
BOTH = pytest.mark.parametrize("name", STRATEGIES)


def make_strategy(name, seed=0, **changes):
    settings = {"population": POPULATION, "sigma": 0.3, "step_size": 0.1, **changes}
    return STRATEGIES[name](ControllerConfig(**settings), np.zeros(WEIGHTS), seed)


def hill(candidates, generation=0):
    """Its top is at 1, 1, ..."""
    return -(candidates - 1).square().sum(-1)


def tell(strategy, generations):
    for _ in range(generations):
        candidates = strategy.ask()
        strategy.tell(candidates, hill(torch.from_numpy(candidates)).numpy())


def real_game(weights):
    return [Outcome(0, hill(weights).item(), 10, True)]


def evolve(folder, name="cma", fitness=hill, real_game=real_game, generations=7):
    """Lightning's Trainer with a checkpoint and a validation every two generations."""
    module = Evolution(torch.zeros(WEIGHTS), fitness, real_game, {2, 4, 6})
    callback = AskAndTell(partial(make_strategy, name))
    data = StepsData(int, [0], generations, epoch_steps=2)
    fit(module, data, folder, TrainerConfig("cpu"), [], callbacks=[callback])
    return module, callback


@pytest.mark.parametrize(
    ("name", "changes"), [("cma", {}), ("es", {}), ("es", {"adam": False, "step_size": 0.3})]
)
def test_a_strategy_climbs(name, changes):
    strategy = make_strategy(name, **changes)
    before = hill(torch.from_numpy(strategy.mean))
    tell(strategy, 60)
    assert hill(torch.from_numpy(strategy.mean)) > 0.1 * before  # both are negative


@BOTH
def test_a_strategy_is_a_function_of_its_seed_and_leaves_numpys_alone(name):
    np.random.seed(3)  # noqa: NPY002
    strategies = [make_strategy(name, seed) for seed in (7, 7, 8)]
    for strategy in strategies:
        tell(strategy, 3)
    one, same, other = (strategy.ask() for strategy in strategies)
    assert one.shape == (POPULATION, WEIGHTS)
    assert (one == same).all()
    assert (one != other).all()
    drawn = np.random.rand()  # noqa: NPY002
    assert drawn == np.random.RandomState(3).rand()


def test_plain_evolution_strategies_try_pairs_on_both_sides_of_the_mean():
    strategy = make_strategy("es")
    tell(strategy, 3)
    candidates = strategy.ask()
    np.testing.assert_allclose(candidates.mean(0), strategy.mean)
    assert len(np.unique(candidates, axis=0)) == POPULATION


def test_plain_evolution_strategies_stay_where_all_candidates_are_equally_fit():
    strategy = make_strategy("es", adam=False)
    strategy.tell(strategy.ask(), np.ones(POPULATION))
    np.testing.assert_allclose(strategy.mean, 0.0, atol=1e-12)


@BOTH
def test_replaying_the_fitness_restores_a_strategy_bit_for_bit(tmp_path, name):
    _, lived = evolve(tmp_path, name, generations=5)
    restored = AskAndTell(partial(make_strategy, name))
    restored.load_state_dict(lived.state_dict())
    assert (restored.strategy.mean == lived.strategy.mean).all()
    assert (restored.strategy.ask() == lived.strategy.ask()).all()
    assert torch.equal(restored.state_dict()["fitness"], lived.state_dict()["fitness"])


@BOTH
def test_a_generation_is_a_step_and_the_module_holds_the_mean(tmp_path, name):
    generations = []

    def fitness(candidates, generation):
        assert candidates.shape == (POPULATION, WEIGHTS)
        generations.append(generation)
        return hill(candidates)

    module, callback = evolve(tmp_path, name, fitness)
    assert generations == list(range(7))
    assert module.trainer.global_step == 7
    assert (module.mean.numpy() == callback.strategy.mean).all()
    assert hill(module.mean) > hill(torch.zeros(WEIGHTS))


@BOTH
@pytest.mark.parametrize("broken", [1, 5])
def test_an_interrupted_evolution_ends_as_an_uninterrupted_one(tmp_path, name, broken):
    def fitness(candidates, generation, breaks):
        if breaks and generation == broken:
            raise RuntimeError("power cut")
        return hill(candidates) * (1 + generation)

    whole, _ = evolve(tmp_path / "whole", name, partial(fitness, breaks=False))
    with pytest.raises(RuntimeError, match="power cut"):
        evolve(tmp_path / "cut", name, partial(fitness, breaks=True))
    resumed, _ = evolve(tmp_path / "cut", name, partial(fitness, breaks=False))
    assert resumed.trainer.global_step == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_fitness_that_is_not_finite_stops_naming_candidate_and_generation(tmp_path, value):
    def fitness(candidates, generation):
        scores = hill(candidates)
        if generation == 2:
            scores[3] = value
        return scores

    with pytest.raises(WMError, match="candidate 3 in generation 2"):
        evolve(tmp_path, fitness=fitness)


def test_the_best_mean_by_validation_is_kept(tmp_path):
    scores, tried = iter([1.0, 5.0, 2.0]), []

    def judge(weights):
        tried.append(weights.clone())
        return [Outcome(0, next(scores), 10, True)]

    module, _ = evolve(tmp_path, real_game=judge, generations=7)  # the last is not judged
    assert module.best_score == 5.0
    assert torch.equal(module.best, tried[1])
    assert len(tried) == 3 and not torch.equal(module.mean, tried[2])


@pytest.fixture
def dreamt(make_agent, workers, tmp_path):
    """dreamt(pool, part, compiled): the fitness of a small agent's dreams, of 2 seeds each."""

    def make(pool=workers, part=512, compiled=False):
        agent = make_agent()
        agent.save(tmp_path)
        seeds = lambda generation: [generation, generation + 100]  # noqa: E731
        return dream_fitness(pool, tmp_path, seeds, part, 100, compiled), agent.weights

    return make


def test_candidates_meet_the_same_dreams_and_differ_by_their_weights_alone(dreamt):
    fitness, twin = dreamt()
    other = -twin
    together = fitness(torch.stack([twin, other, twin]), 0)
    torch.testing.assert_close(together[0], together[2], rtol=1e-5, atol=1e-6)
    assert together[0] != together[1]
    alone = fitness(other[None], 0)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-5, atol=1e-6)
    assert fitness(other[None], 1) != alone  # another generation, other dreams


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_fitness_is_bit_for_bit_the_same_on_one_and_two_processes(compiled, dreamt, workers):
    with Workers(1) as alone:
        fitness = [dreamt(pool, 6, compiled)[0] for pool in (alone, workers)]
        candidates = torch.randn(7, len(dreamt()[1]), dtype=torch.float64)
        one, two = (try_all(candidates, 0) for try_all in fitness)
    assert torch.equal(one, two)
    assert len(one.unique()) == 7


def test_the_ranks_fitness_adds_up_to_that_of_one_process(dreamt, as_rank, monkeypatch):
    monkeypatch.setattr(evolution, "summed", lambda tensor: tensor)
    fitness, weights = dreamt(part=4)
    candidates = torch.randn(7, len(weights), dtype=torch.float64)
    whole, parts = fitness(candidates, 0), []
    for rank in range(3):
        as_rank(rank, 3)
        parts.append(fitness(candidates, 0))
    assert torch.equal(sum(parts), whole)
    assert all((part == 0).any() for part in parts)
