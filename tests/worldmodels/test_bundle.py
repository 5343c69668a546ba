"""Pretrained agents: whole but for half of the digits, and named when there is none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from wm import WMError
from wm.rollout import rollout
from wm.workers import play
from wm.worldmodels import bundle
from wm.worldmodels.agent import Agent, AgentPlayer
from wm.worldmodels.starts import Starts


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_halved_agent_is_the_same_agent_in_half_the_bytes(saved, tmp_path):
    whole = Agent.load(saved("tiny"))
    bundle.halved(whole).save(tmp_path / "half")
    half = Agent.load(tmp_path / "half")
    assert half.config == whole.config and torch.equal(half.weights, whole.weights)
    for model in ("vision", "memory"):
        ours, theirs = (getattr(agent, model).state_dict() for agent in (half, whole))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert folder_bytes(tmp_path / "half") < 0.6 * folder_bytes(saved("tiny"))


def test_the_starts_that_are_kept_span_all(make_agent):
    starts = torch.arange(1024.0)[:, None]
    agent = replace(make_agent(), starts=Starts(starts, starts[:, None]))
    kept = bundle.halved(agent).starts.latent[:, 0]
    assert len(kept) == bundle.KEPT_STARTS and kept.max() > 1000 and kept.min() < 24


def test_a_halved_agent_dreams(saved, tmp_path):
    bundle.halved(Agent.load(saved("tiny"))).save(tmp_path / "half")
    agent = Agent.load(tmp_path / "half")
    result = rollout(agent.dreams(4), agent.controller(), range(4))
    assert result.returns.isfinite().all() and (result.steps > 0).all()


@pytest.mark.parametrize("game", ["carracing", "takecover"])
def test_the_agents_that_come_with_the_project_are_small_and_play(game):
    folder = Path(bundle.pretrained(game))
    assert folder_bytes(folder) < 12e6
    env = replace(Agent.load(folder).config.env, max_steps=40)
    (outcome,) = play(env, AgentPlayer(folder), [1])
    assert outcome.steps == 40 and outcome.episode_return > 0
    about = OmegaConf.load(folder / "about.yaml")
    assert game in about.command and about["results before it was halved"]["eval/mean"] > 600


def test_a_game_without_a_pretrained_agent_is_told_which_there_are(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "PRETRAINED", tmp_path)
    with pytest.raises(WMError, match="'chess'; there are: none"):
        bundle.pretrained("chess")
    Agent.load(saved("tiny")).save(tmp_path / "tiny")
    with pytest.raises(WMError, match="'chess'; there are: tiny"):
        bundle.pretrained("chess")
    assert bundle.pretrained("tiny") == str(tmp_path / "tiny")
