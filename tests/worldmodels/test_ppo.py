"""PPO: advantages by their definition, the gradient by that of the policy, a small game, resume,
and practice in the real game.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from wm import WMError
from wm.envs import EnvConfig
from wm.training import StepsData, TrainerConfig, fit
from wm.workers import Outcome, Workers
from wm.worldmodels import ppo
from wm.worldmodels.agent import AgentPlayer
from wm.worldmodels.controller import ControllerConfig, initial_weights
from wm.worldmodels.ppo import (
    PPO,
    TRACE,
    VALUE,
    Experience,
    practise_in_dreams,
    practise_in_the_game,
)
from wm.worldmodels.work import generation_seeds

seeds_of = partial(generation_seeds, 16, 0, 0)
SETTINGS = {"optimizer": "ppo", "hidden": 3, "horizon": 8}


def real_game(weights):
    return [Outcome(0, -weights.square().sum().item(), 10, True)]


@pytest.fixture
def learner(make_agent):
    """learner(**settings): PPO of a small agent in sixteen of its dreams."""

    def make(**settings):
        agent = make_agent(**{**SETTINGS, **settings})
        return PPO(agent, partial(practise_in_dreams, agent, False), seeds_of, real_game, ())

    return make


def dream(module, seed=0):
    deviation = module.spread.detach().exp()
    generator = torch.Generator().manual_seed(seed)
    return module.practise(module.mean.detach(), deviation, seeds_of(0), generator)


@pytest.mark.parametrize("end", ["expected", "calibrated", "never"])
def test_what_is_dreamt_after_an_end_counts_for_nothing(learner, end):
    module = learner(end=end)
    torch.nn.init.constant_(module.agent.memory.end_head.bias, 2.0)  # ends come soon
    dreamt = dream(module)
    chance = dreamt.alive
    assert (chance[0] == 1).all() and (chance[1:] <= chance[:-1]).all()
    assert ((chance == 0) | (chance == 1)).all() == (end != "expected")
    assert (chance[-1] == 1).all() == (end == "never")
    assert (dreamt.reward[chance[:-1] == 0] == 0).all()


@pytest.mark.parametrize("discount", [0.98, 0.5])
def test_advantages_are_discounted_sums_of_the_critics_surprises(discount, learner):
    module, T, N = learner(discount=discount), 5, 3
    features = torch.randn(T + 1, N, module.agent.config.features)
    alive = torch.tensor(
        [[1.0, 1, 1], [1, 0.9, 1], [1, 0.5, 1], [1, 0.4, 0], [1, 0.1, 0], [1, 0, 0]]
    )
    dreamt = Experience(features, torch.zeros(T, N, 1), torch.rand(T, N) * alive[:-1], alive)
    advantage, target = module.advantages(dreamt)
    value = torch.stack([VALUE * module.critic(x) for x in features]) * alive
    for n in range(N):
        surprises = [
            dreamt.reward[t, n] + discount * value[t + 1, n] - value[t, n] for t in range(T)
        ]
        for t in range(T):
            expected = sum((discount * TRACE) ** (k - t) * surprises[k] for k in range(t, T))
            torch.testing.assert_close(target[t, n], expected + value[t, n])
    raw = target - value[:-1]
    torch.testing.assert_close(advantage, raw / raw.square().mean().sqrt())


def test_before_the_first_step_the_gradient_is_that_of_the_policy(learner):
    module = learner()
    dreamt = dream(module)
    seen = dreamt.features[:-1].flatten(0, 1)
    raw = dreamt.raw.flatten(0, 1)
    advantage = torch.randn(len(raw))
    old = module.log_probability(seen, raw).detach()
    nothing = torch.zeros(len(raw))
    loss = module.loss(seen, raw, old, nothing, advantage, nothing)
    direct = -(module.log_probability(seen, raw) * advantage).mean()
    for mine, expected in zip(
        torch.autograd.grad(loss, [module.mean, module.spread]),
        torch.autograd.grad(direct, [module.mean, module.spread]),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "ratio, advantage, learns",
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)],
)
def test_what_has_changed_enough_is_only_changed_back(ratio, advantage, learns, learner):
    module = learner()
    dreamt = dream(module)
    seen, raw = dreamt.features[:-1].flatten(0, 1), dreamt.raw.flatten(0, 1)
    old = (module.log_probability(seen, raw) - math.log(ratio)).detach()
    nothing = torch.zeros(len(raw))
    loss = module.loss(seen, raw, old, nothing, nothing + advantage, nothing)
    assert loss.item() == pytest.approx(
        -(ratio if learns else 1 + math.copysign(0.2, advantage)) * advantage, abs=1e-4
    )
    gradient, _ = torch.autograd.grad(loss, [module.mean, module.spread])
    assert gradient.any() == learns


def test_the_critic_tells_its_unit_times_the_chance_of_having_lived_so_long(learner):
    module = learner()
    torch.nn.init.zeros_(module.critic[2].weight)
    torch.nn.init.constant_(module.critic[2].bias, 2.0)
    seen, raw = torch.randn(3, module.agent.config.features), torch.zeros(3, 1)
    old, nothing = module.log_probability(seen, raw).detach(), torch.zeros(3)
    alive = torch.tensor([1.0, 0.5, 0.0])
    for target, error in (([2.0, 1.0, 0.0], 0.0), ([1.0, 0.0, 0.0], 2 / 3)):
        loss = module.loss(seen, raw, old, alive, nothing, VALUE * torch.tensor(target))
        assert loss.item() == pytest.approx(error)


def train(module, folder, iterations=6):
    fit(module, StepsData(int, [0], iterations, 2), folder, TrainerConfig("cpu"), [])
    return module


def test_c_learns_what_pays_in_a_dream(learner, tmp_path, monkeypatch):
    """M pays for its first hidden unit, which an action above 0 raises."""
    monkeypatch.setattr(ppo, "RATE", 1e-2)
    module = learner(end="never")
    M = module.agent.memory
    with torch.no_grad():
        for parameter in M.parameters():
            parameter.zero_()
        actions = M.latent  # the column of the action among M's inputs
        M.rnn.weight_ih_l0[2 * M.config.hidden, actions] = 3.0  # new = tanh(3 a)
        M.reward_head.weight[0, 0] = 1.0
    before = dream(module).reward.sum(0).mean()
    train(module, tmp_path, iterations=20)
    after = dream(module).reward.sum(0).mean()
    assert after > before + 0.8  # at most 2.5 can be had


def test_an_interrupted_training_ends_as_an_uninterrupted_one(learner, tmp_path):
    whole = train(learner(), tmp_path / "whole")
    broken = learner()
    usual = broken.practise

    def practise(*how):
        if broken.global_step == 3:
            raise RuntimeError("power cut")
        return usual(*how)

    broken.practise = practise
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, tmp_path / "cut")
    resumed = train(learner(), tmp_path / "cut")
    assert resumed.trainer.global_step == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not torch.equal(whole.mean, learner().mean)


def test_a_critic_begins_the_same_whatever_was_drawn_before(make_agent):
    agent, made = make_agent(**SETTINGS), []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        made.append(PPO(agent, None, seeds_of, real_game, ()))
    one, other = made
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_loss_that_is_not_finite_reaches_no_weight(learner, tmp_path):
    module = learner()
    before = module.mean.clone()
    torch.nn.init.constant_(module.critic[2].bias, torch.nan)
    with pytest.raises(WMError, match="the loss is not finite"):
        train(module, tmp_path)
    assert torch.equal(module.mean, before)


def test_ranks_that_do_not_lead_wait_for_what_the_leader_learns(learner, monkeypatch):
    module = learner()
    monkeypatch.setattr(ppo, "leads", lambda: False)
    monkeypatch.setattr(ppo, "of_leader", lambda tensor: tensor + 1)
    monkeypatch.setattr(module, "optimizers", lambda: SimpleNamespace(step=lambda: None))
    before = [parameter.clone() for parameter in module.parameters()]
    module.training_step(0, 0)
    for mine, was in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(mine, was + 1)


def test_only_a_hidden_layer_begins_elsewhere_than_at_zero():
    linear, deep = ControllerConfig(optimizer="ppo"), ControllerConfig(optimizer="ppo", hidden=5)
    assert (initial_weights(linear, 40, 2, 0) == 0).all()
    weights, same, other = (initial_weights(deep, 40, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(weights, same) and not torch.equal(weights, other)
    first = weights[: 5 * 40]
    assert 0 < first.abs().max() <= 40**-0.5 and (weights[5 * 40 :] == 0).all()


@pytest.fixture(scope="module")
def player(make_agent, tmp_path_factory):
    """An agent of the real (tiny) game, and its folder."""
    agent = make_agent(optimizer="ppo", hidden=3, fitness="real")
    # Some games end before they are cut, and some do not.
    agent = replace(agent, config=replace(agent.config, env=EnvConfig("tiny", max_steps=10)))
    folder = tmp_path_factory.mktemp("player")
    agent.save(folder)
    return agent, folder


def played(player, workers, deviation, seed=0, seeds=range(5)):
    agent, folder = player
    noise, generator = torch.full((1,), deviation), torch.Generator().manual_seed(seed)
    how = agent.weights.float(), noise, seeds, generator
    return practise_in_the_game(workers, agent.config.env, folder, *how)


def test_practice_in_the_real_game_is_what_c_sees_does_and_gets_there(player, workers):
    agent, folder = player
    brought = played(player, workers, deviation=0.0)
    N, T = 5, len(brought.raw)
    assert brought.features.shape == (T + 1, N, agent.config.features)
    outcomes = list(workers.play(agent.config.env, AgentPlayer(folder), range(N)))
    assert {outcome.terminated for outcome in outcomes} == {True, False}
    assert len({outcome.steps for outcome in outcomes}) > 1  # some were padded
    for n, outcome in enumerate(outcomes):
        assert brought.alive[:-1, n].sum() == outcome.steps
        assert brought.reward[:, n].sum() == pytest.approx(outcome.episode_return)
        assert (brought.alive[outcome.steps :, n] == (not outcome.terminated)).all()
        steps = slice(0, outcome.steps)
        expected = agent.controller().raw(brought.features[steps, n])
        torch.testing.assert_close(brought.raw[steps, n], expected)


def test_its_noise_is_of_the_deviation_and_of_the_seed_alone(player, workers):
    agent, _ = player
    one, other = (played(player, workers, 0.3, seed, range(12)) for seed in (0, 1))
    assert not torch.equal(one.raw[0], other.raw[0])
    mean = agent.controller().raw(one.features[:-1].flatten(0, 1)).view_as(one.raw)
    noise = (one.raw - mean)[one.alive[:-1] > 0]
    assert noise.std() == pytest.approx(0.3, rel=0.3) and abs(noise.mean()) < 0.15


def test_one_process_practises_what_two_do(player, workers):
    with Workers(1) as alone:
        one, two = (played(player, pool, 0.3) for pool in (alone, workers))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_held_actions_count_as_steps_of_the_game(player, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "DEVIATION", 1e-6)  # games as they are without noise
    agent, folder = player
    env = EnvConfig("tiny", 10, repeat=2)
    agent = replace(agent, config=replace(agent.config, env=env))
    practise = partial(practise_in_the_game, workers, env, folder)
    module, logged = PPO(agent, practise, lambda iteration: range(5), real_game, ()), {}
    usual = module.log
    monkeypatch.setattr(
        module, "log", lambda k, v, **how: (logged.update({k: v}), usual(k, v, **how))
    )
    train(module, tmp_path, iterations=1)
    outcomes = workers.play(env, AgentPlayer(folder), range(5))
    assert logged["controller/fitness_steps"] == sum(outcome.steps for outcome in outcomes)


def test_padding_far_from_all_that_c_does_teaches_nothing(learner):
    module = learner()
    dreamt = dream(module)
    seen, raw = dreamt.features[:-1].flatten(0, 1), dreamt.raw.flatten(0, 1)
    old = module.log_probability(seen, raw).detach() - 200.0  # exp(200) is no float
    nothing = torch.zeros(len(raw))
    loss = module.loss(seen, raw, old, nothing, nothing, nothing)
    gradients = torch.autograd.grad(loss, [module.mean, module.spread])
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)


def test_a_step_after_the_end_of_a_game_counts_for_nothing(player, workers):
    module = PPO(player[0], None, seeds_of, real_game, ())
    brought = played(player, workers, 0.3)
    advantage, target = module.advantages(brought)
    over = brought.alive[:-1] == 0
    assert over.any() and (advantage[over] == 0).all() and (target[over] == 0).all()
    whole = brought.alive[:-1].sum(0).argmin()  # the shortest game, alone and not padded
    steps = int(brought.alive[:-1, whole].sum())
    alone = [part[:, whole : whole + 1] for part in brought]
    cut = Experience(
        alone[0][: steps + 1], *(part[:steps] for part in alone[1:3]), alone[3][: steps + 1]
    )
    torch.testing.assert_close(module.advantages(cut)[1][:, 0], target[:steps, whole])
