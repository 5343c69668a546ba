import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from wm import WMError  # (and the dreams are registered)
from wm.rollout import UniformPolicy, rollout
from wm.worldmodels.dream import FAINT, NOISE_STEPS, DreamEnv
from wm.worldmodels.engine import dream_step

GAMES = pytest.mark.parametrize(
    ("game", "name"), [("takecover", "TakeCover"), ("carracing", "CarRacing")]
)


def dream(envs, seeds, actions):
    """Features [T+1,N,F], rewards [T,N] and ends [T,N] of dreams under actions [T,A]."""
    steps = [(envs.reset(seed=seeds)[0], None, None)]
    for action in actions:
        steps.append(envs.step(action.expand(len(seeds), -1))[:3])
    features, rewards, ends = zip(*steps, strict=True)
    return torch.stack(features), torch.stack(rewards[1:]), torch.stack(ends[1:])


@pytest.fixture
def end_logit(make_agent):
    """end_logit(value): an agent whose M always gives this logit to an end."""

    def make(value, memory=None, **changes):
        agent = make_agent(memory={"end_weight": 10.0, **(memory or {})}, **changes)
        torch.nn.init.zeros_(agent.memory.end_head.weight)
        torch.nn.init.constant_(agent.memory.end_head.bias, value)
        return agent

    return make


@pytest.mark.parametrize("mixture", ["joint", "factored"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_seed_gives_the_same_dream_whatever_the_batch(make_agent, mixture, cell):
    agent = make_agent(memory={"mixture": mixture, "cell": cell})
    actions = torch.rand(8, 1) * 2 - 1
    alone = dream(agent.dreams(1), [3], actions)
    among = dream(agent.dreams(5), [9, 3, 0, 3, 7], actions)
    for one, five in zip(alone, among, strict=True):
        torch.testing.assert_close(five[:, 1], one[:, 0])
        torch.testing.assert_close(five[:, 3], one[:, 0])


def test_different_seeds_give_different_starts_and_noise(make_agent):
    envs = make_agent().dreams(40)
    features, _, _ = dream(envs, list(range(40)), torch.zeros(1, 1))
    assert len(features[0].unique(dim=0)) == 7  # every start is begun at
    envs.reset(seed=list(range(40)), options={"start": [0] * 40})
    after, *_ = envs.step(torch.zeros(40, 1))
    assert len(after.unique(dim=0)) == 40


def test_every_step_draws_noise_of_its_own(make_agent):
    agent = make_agent(features="z")
    torch.nn.init.zeros_(agent.memory.mixture_head.weight)  # M expects the same at every step
    steps = 2 * NOISE_STEPS + 3
    latents, _, _ = dream(agent.dreams(1), [0], torch.zeros(steps, 1))
    assert len(latents[1:, 0].unique(dim=0)) == steps


def test_actions_steer_the_dream(make_agent):
    agent = make_agent()
    left, right = (dream(agent.dreams(1), [3], torch.full((3, 1), a))[0] for a in (-1.0, 1.0))
    torch.testing.assert_close(left[0], right[0])
    assert not torch.allclose(left[-1], right[-1])


def test_noise_on_actions_is_of_its_deviation_and_stays_in_the_space(make_agent):
    agent = make_agent("carracing", action_noise=0.2)
    envs = agent.dreams(3000)
    seen = []
    envs.advance = lambda *now: seen.append(now[5]) or dream_step(*now)
    envs.reset(seed=0)
    envs.step(torch.tensor([[0.5, 0.9, 0.0]]).expand(3000, -1))
    (actions,) = seen
    deviation = actions.std(0)
    assert deviation[0].item() == pytest.approx(0.2, rel=0.1)
    low, high = (
        torch.from_numpy(limit)
        for limit in (envs.single_action_space.low, envs.single_action_space.high)
    )
    assert (actions >= low).all()
    assert (actions <= high).all()
    assert 0.2 < (actions[:, 1] == 1.0).float().mean() < 0.4  # P(0.9 + 0.2 noise > 1) = 0.31


def test_given_starts_are_begun_at(make_agent):
    agent = make_agent(features="zhc")
    observation, _ = agent.dreams(2).reset(seed=[0, 1], options={"start": [4, 2]})
    hidden, cell = agent.starts.state[[4, 2]].unbind(1)
    torch.testing.assert_close(
        observation, torch.cat([agent.starts.latent[[4, 2]], cell, hidden], 1)
    )


def test_the_horizon_truncates(end_logit):
    envs = end_logit(-1000.0, horizon=3).dreams(2)
    envs.reset(seed=[0, 1])
    flags = [envs.step(torch.zeros(2, 1))[2:4] for _ in range(3)]
    assert [truncated.tolist() for _, truncated in flags] == [[False] * 2, [False] * 2, [True] * 2]
    assert not any(terminated.any() for terminated, _ in flags)


def test_without_a_reward_head_a_dreamt_step_pays_the_steps_for_which_an_action_is_held(make_agent):
    agent = make_agent("takecover", memory={"reward_head": False})
    env = replace(agent.config.env, repeat=4)
    envs = replace(agent, config=replace(agent.config, env=env)).dreams(3)
    envs.reset(seed=[0, 1, 2])
    assert envs.step(torch.zeros(3, 1))[1].tolist() == [4.0] * 3
    assert (
        4 * envs.metadata["render_fps"] == make_agent("takecover").dreams(1).metadata["render_fps"]
    )


def test_temperature_spreads_the_latents(make_agent):
    def spread(temperature):
        envs = make_agent(temperature=temperature, features="z").dreams(200)
        envs.reset(seed=list(range(200)), options={"start": [0] * 200})
        return envs.step(torch.zeros(200, 1))[0].std(0).mean()

    assert 10 * spread(0.001) < spread(1.0) < spread(4.0)


def test_a_dream_that_never_ends_goes_on_however_certain_the_end(end_logit):
    envs = end_logit(1000.0, end="never", horizon=9).dreams(4)
    result = rollout(envs, UniformPolicy(envs.single_action_space), [0, 1, 2, 3])
    assert result.steps.tolist() == [9] * 4
    assert not result.terminated.any()
    assert envs.latent.any(dim=1).all()


def test_expected_ends_pay_the_probability_of_having_lived_so_long(end_logit):
    survival = {"game": "takecover", "memory": {"reward_head": False}}
    agent = end_logit(math.log(10 * 0.3 / 0.7), end="expected", **survival)
    _, rewards, ended = dream(agent.dreams(3), [0, 1, 2], torch.zeros(14, 1))
    lived = 0.7 ** torch.arange(14.0)
    torch.testing.assert_close(rewards, lived[:, None].expand(-1, 3))
    assert ended.any(1).tolist() == [0.7 ** (step + 1) < FAINT for step in range(14)]


def test_expected_ends_give_the_mean_return_of_drawn_ones_with_less_spread(make_agent):
    agent = make_agent("takecover", memory={"reward_head": False}, horizon=100)
    torch.nn.init.normal_(agent.memory.end_head.weight)  # the probability changes from step to step
    agent.memory.end_head.bias.data.fill_(-1.0)
    seeds = list(range(3000))
    drawn, expected = (
        rollout(agent.dreams(len(seeds), end=end), agent.controller(), seeds).returns
        for end in ("calibrated", "expected")
    )
    error = drawn.std() / len(seeds) ** 0.5
    assert expected.mean().item() == pytest.approx(drawn.mean().item(), abs=4 * error.item())
    assert expected.std() < 0.5 * drawn.std()


@pytest.mark.parametrize("end", ["weighted", "calibrated", "threshold"])
@pytest.mark.parametrize(("logit", "ends"), [(1000.0, True), (-1000.0, False)])
def test_a_certain_end_head_ends_at_once_or_never(end_logit, end, logit, ends):
    _, _, ended = dream(end_logit(logit, end=end).dreams(3), [0, 1, 2], torch.zeros(5, 1))
    assert (ended == ends).all()


@pytest.mark.parametrize(
    ("end", "share"),
    [("weighted", 10 * 0.3 / (10 * 0.3 + 0.7)), ("calibrated", 0.3), ("threshold", 1)],
)
def test_an_unsure_end_head_is_sampled_or_thresholded(end_logit, end, share):
    logit = math.log(10 * 0.3 / 0.7)  # a probability of 0.3, its odds multiplied by the weight 10
    envs = end_logit(logit, end=end, horizon=2).dreams(2000)
    _, _, ended = dream(envs, list(range(2000)), torch.zeros(1, 1))
    assert ended.float().mean().item() == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(("end", "bias"), [("weighted", -2.0), ("expected", 0.0)])
def test_leaving_ended_dreams_out_changes_no_other(make_agent, monkeypatch, end, bias):
    agent = make_agent(horizon=100, end=end)
    torch.nn.init.normal_(agent.memory.end_head.weight)
    torch.nn.init.constant_(agent.memory.end_head.bias, bias)
    candidates = agent.controller(torch.randn(4, len(agent.weights)))
    seeds = list(range(30)) * 4
    envs = agent.dreams(len(seeds))
    some = rollout(envs, candidates, seeds)
    assert len(envs.active) < 20
    monkeypatch.setattr("wm.worldmodels.dream.KEPT_SHARE", 0.0)
    everyone = rollout(agent.dreams(len(seeds)), candidates, seeds)
    torch.testing.assert_close(some.returns, everyone.returns)
    assert torch.equal(some.steps, everyone.steps)
    assert len(everyone.steps.unique()) > 10


def test_without_heads_a_step_pays_one_and_nothing_ends(make_agent):
    agent = make_agent(memory={"reward_head": False, "end_head": False}, fitness="real")
    _, rewards, ended = dream(agent.dreams(2), [0, 1], torch.zeros(5, 1))
    assert (rewards == 1.0).all()
    assert not ended.any()


def test_dreams_are_rendered_by_v(make_agent):
    agent = make_agent()
    envs = agent.dreams(2)
    envs.reset(seed=[0, 1])
    frames = np.stack(envs.render())
    assert frames.shape == (2, 64, 64, 3)
    assert frames.dtype == np.uint8
    assert (frames[0] != frames[1]).any()


def test_a_wrong_number_of_seeds_is_refused(make_agent):
    with pytest.raises(ValueError, match="3 seeds for 2 dreams"):
        make_agent().dreams(2).reset(seed=[0, 1, 2])


@pytest.mark.filterwarnings("ignore:.*Box observation space m(in|ax)imum value is -?inf")
@GAMES
def test_one_dream_is_a_sound_gymnasium_environment(saved, game, name):
    env = gym.make(f"wm/{name}Dream-v0", run=saved(game), render_mode="rgb_array")
    check_env(env.unwrapped)
    assert env.spec.id == f"wm/{name}Dream-v0"


@GAMES
def test_many_dreams_are_made_by_name(saved, game, name):
    shown = {"render_mode": "rgb_array", "horizon": 4}
    envs = gym.make_vec(f"wm/{name}Dream-v0", num_envs=3, run=saved(game), **shown)
    one = gym.make(f"wm/{name}Dream-v0", run=str(saved(game)))
    assert envs.single_observation_space == one.observation_space
    assert envs.single_action_space == one.action_space
    observation, _ = envs.reset(seed=1)
    for _ in range(4):
        observation, *_, truncated, _ = envs.step(envs.action_space.sample())
    assert envs.observation_space.contains(observation.numpy())
    assert truncated.all()


def test_dreams_that_teach_nothing_are_not_handed_out(make_agent, tmp_path):
    make_agent("carracing", {"reward_head": False}, fitness="real").save(tmp_path)
    with pytest.raises(WMError, match="no trained reward head: its dreams pay the same"):
        gym.make("wm/CarRacingDream-v0", run=tmp_path)


def test_an_algorithm_of_others_learns_in_a_dream(saved):
    ppo = pytest.importorskip("stable_baselines3").PPO
    env = gym.make("wm/TakeCoverDream-v0", run=saved("takecover"))
    learner = ppo("MlpPolicy", env, n_steps=16, batch_size=8, n_epochs=1, seed=0, device="cpu")
    before = [parameter.clone() for parameter in learner.policy.parameters()]
    learner.learn(32)
    after = list(learner.policy.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("end", ["expected", "calibrated"])
def test_a_dream_and_its_controller_are_where_the_agent_is(make_agent, monkeypatch, end):
    """On the meta device, whose tensors cannot be mixed with a CPU's, nor counted."""
    agent = make_agent(action_noise=0.1, end=end).to("meta")
    monkeypatch.setattr(DreamEnv, "_leave_out", lambda envs, terminated: None)
    envs, policy = agent.dreams(3), agent.controller()
    observation, _ = envs.reset(seed=[0, 1, 1])
    for _ in range(2):
        observation, *rest, _ = envs.step(policy(observation))
        assert observation.is_meta and all(flags.is_meta for flags in rest)
