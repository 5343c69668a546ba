"""What stages do in their folders, apart from the whole pipeline."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from contents import hashes

from wm.collect import collect, record
from wm.config import ConfigError
from wm.data import Latents
from wm.envs import (
    ElsewhereConfig,
    EnvConfig,
    as_vector,
    held_out_seeds,
    make_env,
    validation_seeds,
)
from wm.episodes import EpisodeStore
from wm.evaluate import EvaluateConfig, read_outcomes, write_outcomes
from wm.tracking import Silence
from wm.training import TrainerConfig
from wm.workers import RandomPlayer, Workers, play
from wm.worldmodels import work
from wm.worldmodels.agent import Agent, AgentConfig, AgentPlayer, read_module, save_tensors
from wm.worldmodels.encode import encode_store
from wm.worldmodels.evolution import mean_return
from wm.worldmodels.mdnrnn import MDNRNN, MemoryConfig
from wm.worldmodels.pictures import reconstruction_error
from wm.worldmodels.vae import ConvVAE, VisionConfig
from wm.worldmodels.work import (
    choose_round,
    dream_score,
    evaluate_agent,
    play_candidates,
    train_memory,
    train_vision,
)
from wm.worlds import ORDINARY, World


def test_encoding_a_store_again_replaces_what_an_interrupted_run_left(tmp_path, vision, workers):
    collect(EnvConfig("tiny", 20), RandomPlayer("uniform"), range(2), tmp_path, workers)
    store = EpisodeStore([tmp_path])
    encode_store(vision, store, tmp_path / "latents")
    first = np.array(Latents(tmp_path / "latents").mean)
    (tmp_path / ".latents").mkdir()
    (tmp_path / ".latents" / "mean.npy").write_text("half of it")
    encode_store(vision, store, tmp_path / "latents")
    assert first.shape == (store.total_frames, vision.config.latent)
    np.testing.assert_array_equal(Latents(tmp_path / "latents").mean, first)


def test_a_v_that_stays_as_it_is_encodes_only_what_is_new(tmp_path, workers):
    folders = {f"collect-{r}": tmp_path / f"collect-{r}" for r in range(2)}
    for r, folder in enumerate(folders.values()):
        folder.mkdir()
        collect(EnvConfig("tiny", 20), RandomPlayer("uniform"), range(r, r + 1), folder, workers)
    config, first = VisionConfig(latent=4, later_steps=0), tmp_path / "vision-0"
    first.mkdir()
    model, old = ConvVAE(config), EpisodeStore([folders["collect-0"]])
    save_tensors(first / "vision.safetensors", model.state_dict())
    encode_store(model, old, first / "latents")
    np.save(first / "latents" / "mean.npy", np.full((old.total_frames, 4), 7, np.float32))
    run = SimpleNamespace(busy=nullcontext, log_file=lambda *names: None)
    inputs = {**folders, "vision": first}
    train_vision(tmp_path, inputs, run, TrainerConfig(), vision=config, seed=0)
    latents = Latents(tmp_path / "latents").mean
    assert len(latents) == EpisodeStore(list(folders.values())).total_frames
    assert (latents[: old.total_frames] == 7).all() and (latents[old.total_frames :] != 7).all()
    assert hashes(first)["vision.safetensors"] == hashes(tmp_path)["vision.safetensors"]


@pytest.mark.parametrize("factors", [(1.0, -1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("how", ["alone", "stopped", "two ranks"])
def test_the_agent_with_the_best_mean_on_validation_seeds_is_kept(
    factors, how, saved, as_rank, silent, tmp_path, monkeypatch
):
    agent, env = Agent.load(saved("tiny")), EnvConfig("tiny", 20)
    rounds, expected, folder = {}, {}, tmp_path / "choice"
    folder.mkdir()
    for role, factor in zip(("controller-0", "controller-1"), factors, strict=True):
        rounds[role] = tmp_path / role
        replace(agent, weights=factor * agent.weights).save(rounds[role] / "agent")
        seeds = validation_seeds(8)[2:]
        expected[role] = play(env, AgentPlayer(rounds[role] / "agent"), seeds)
    here, given = TrainerConfig(workers=1), {"env": env, "before": 2, "episodes": 6}
    if how == "two ranks":
        as_rank(1, 2)
        assert choose_round(folder, rounds, Silence(), here, **given) == {}
        as_rank(0, 2)
    choose = partial(choose_round, folder, rounds, silent, here, **given)
    if how == "stopped":  # after the first round, whose episodes are not played again
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(silent, "log_file", Mock(side_effect=KeyboardInterrupt), raising=False)
            choose()
        (folder / "controller-1").mkdir()
        write_outcomes(folder / "controller-1" / "episodes.csv", expected["controller-1"])
        monkeypatch.setattr(Workers, "play", Mock(side_effect=AssertionError))
    facts = choose()
    means = {role: mean_return(outcomes) for role, outcomes in expected.items()}
    assert abs(means["controller-0"] - means["controller-1"]) > 0.1
    assert {role: facts[f"choice/{role}"] for role in rounds} == pytest.approx(means)
    best = max(means, key=means.__getitem__)
    assert hashes(folder / "agent") == hashes(rounds[best] / "agent")
    for role, outcomes in expected.items():
        assert read_outcomes(folder / role / "episodes.csv") == outcomes
    steps = sum(outcome.steps for outcomes in expected.values() for outcome in outcomes)
    assert facts["controller/played_steps"] == steps


def test_candidates_play_side_by_side_what_each_plays_alone(saved, workers):
    agent, env = saved("tiny"), EnvConfig("tiny", 20)
    weights = Agent.load(agent).weights
    both = play_candidates(workers, env, agent, torch.stack([weights, -weights]), [7, 8, 9])
    for candidate, outcomes in zip((weights, -weights), both, strict=True):
        assert outcomes == play(env, AgentPlayer(agent, candidate), [7, 8, 9])


def test_the_ranks_games_add_up_to_those_of_one_process(saved, workers, as_rank, monkeypatch):
    tables = []
    monkeypatch.setattr(work, "summed", lambda table: tables.append(table) or table)
    weights = Agent.load(saved("tiny")).weights
    both, seeds = torch.stack([weights, -weights]), [7, 8, 9]
    play_candidates(workers, EnvConfig("tiny", 20), saved("tiny"), both, seeds)
    for rank in range(4):
        as_rank(rank, 4)
        play_candidates(workers, EnvConfig("tiny", 20), saved("tiny"), both, seeds)
    one, *parts = tables
    assert torch.equal(sum(parts), one)
    played = [(part != 0).any(-1).sum() for part in parts]
    assert played == [2, 2, 1, 1]


@pytest.fixture
def silent():
    """A run that keeps nothing."""
    nothing = lambda *names: None  # noqa: E731
    return SimpleNamespace(
        busy=nullcontext, log_file=nothing, log_folder=nothing, log_metrics=nothing
    )


def test_an_m_of_no_steps_keeps_its_random_weights(tmp_path, workers, silent):
    folders = {role: tmp_path / role for role in ("collect-0", "vision")}
    for folder in folders.values():
        folder.mkdir()
    collect(EnvConfig("tiny", 20), RandomPlayer("uniform"), range(3), folders["collect-0"], workers)
    seen, config = VisionConfig(latent=4), MemoryConfig(hidden=6, mixtures=2, steps=0)
    save_tensors(folders["vision"] / "vision.safetensors", ConvVAE(seen).state_dict())
    encode_store(ConvVAE(seen), EpisodeStore([folders["collect-0"]]), folders["vision"] / "latents")
    given = {"env": EnvConfig("tiny", 20), "vision": seen, "memory": config, "seed": 5}
    facts = train_memory(tmp_path, folders, silent, TrainerConfig(), **given)
    assert facts == {}  # no loss was measured
    torch.manual_seed(5)
    expected = MDNRNN(config, 4, 1, 5).state_dict()
    made = read_module(partial(MDNRNN, config, 4, 1), tmp_path / "memory.safetensors").state_dict()
    assert all(made[name].equal(expected[name]) for name in expected)


def test_an_agent_is_scored_in_its_own_dreams(make_agent, tmp_path, silent):
    agent, evaluation = make_agent(end="expected", horizon=5), EvaluateConfig(episodes=6)
    facts = dream_score(agent, evaluation, tmp_path, silent)
    again = dream_score(agent, evaluation, tmp_path, silent)
    assert facts == again and set(facts) == {
        f"dream/{n}" for n in ("mean", "std", "ci_low", "ci_high")
    }
    table = np.loadtxt(tmp_path / "dreams.csv", delimiter=",", skiprows=1)
    assert facts["dream/mean"] == pytest.approx(table[:, 1].mean())
    assert list(table[:, 0]) == list(validation_seeds(6))
    assert ((table[:, 2] == 20) | (table[:, 3] == 1)).all()  # as long as the game, or ended


def test_dreams_that_pay_nothing_have_no_score(make_agent, tmp_path, silent):
    agent = make_agent(memory={"reward_head": False}, fitness="real")
    assert dream_score(agent, EvaluateConfig(), tmp_path, silent) == {}


def test_an_agent_is_scored_and_its_v_measured_in_the_world_that_is_asked_for(
    make_agent, tmp_path, silent
):
    agent, env = make_agent("takecover", horizon=5), EnvConfig("takecover", 40, 4)
    player = AgentPlayer(tmp_path / "agent")
    agent.save(player.folder)
    blue, errors = World(5, wall="COMPBLUE"), {}
    for world in (ORDINARY, blue):
        games = as_vector(make_env(ElsewhereConfig(**vars(env), world=world)))
        errors[world] = reconstruction_error(agent.vision, record(games, player, held_out_seeds(3)))
    assert errors[blue] > errors[ORDINARY] + 0.01
    given = {"env": env, "evaluation": EvaluateConfig(2, blue, reconstructed=3)}
    facts = evaluate_agent(
        tmp_path, {"controller": tmp_path}, silent, TrainerConfig(workers=1), **given
    )
    assert facts["eval/reconstruction_error"] == errors[blue]


def test_an_episode_of_one_action_is_scored_without_a_dream_of_it(make_agent, tmp_path, silent):
    agent, env = make_agent("tiny", horizon=5), EnvConfig("tiny", 1)
    agent.save(tmp_path / "agent")
    given = {"env": env, "evaluation": EvaluateConfig(2)}
    evaluate_agent(tmp_path, {"controller": tmp_path}, silent, TrainerConfig(workers=1), **given)
    assert (tmp_path / "episode.mp4").exists() and not (tmp_path / "filmstrip.png").exists()


def test_only_take_covers_actions_are_moves():
    AgentConfig(EnvConfig("takecover"), memory=MemoryConfig(moves=True))
    with pytest.raises(ConfigError, match=r"memory\.moves"):
        AgentConfig(EnvConfig("carracing"), memory=MemoryConfig(moves=True))


@pytest.mark.parametrize(
    ("game", "head"), [("takecover", "end_head"), ("carracing", "reward_head")]
)
def test_a_dream_without_what_tells_good_from_bad_is_refused(game, head):
    with pytest.raises(ConfigError, match=head):
        AgentConfig(EnvConfig(game), memory=MemoryConfig(**{head: False}))


def test_dreams_of_a_reward_head_that_has_learnt_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"memory\.reward_weight"):
        AgentConfig(EnvConfig("carracing"), memory=MemoryConfig(reward_weight=0.0))
