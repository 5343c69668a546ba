"""CarRacing in EnvPool: exact by seed, of the official shape and length, and refused where it must.

What plays is skipped where EnvPool is not installed.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
from contents import hashes

from wm.collect import CollectConfig, collect, record
from wm.config import ConfigError, load
from wm.envpool import EnvPoolGames
from wm.envs import EnvConfig, make_env
from wm.episodes import EpisodeStore
from wm.workers import RandomPlayer
from wm.worldmodels.pipeline import Config

RACE = EnvConfig("carracing", max_steps=30, crop=12)
PLAYER = RandomPlayer("brownian")
WORDS = ["env=carracing", "collect.simulator=envpool"]


@pytest.fixture
def installed():
    pytest.importorskip("envpool")


def test_another_game_is_refused():
    with pytest.raises(ConfigError, match="env=carracing"):
        load(Config, ["env=tiny", WORDS[1]])
    with pytest.raises(ConfigError, match="env=carracing"):
        EnvPoolGames(EnvConfig("tiny"), 2)


def test_without_envpool_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ConfigError, match=r"pip install 'wm\[fast\]'"):
        load(Config, WORDS)
    with pytest.raises(ConfigError, match=r"pip install 'wm\[fast\]'"):
        EnvPoolGames(RACE, 2)


def test_frames_and_actions_are_those_of_the_official_game(installed):
    games, official = EnvPoolGames(RACE, 3), make_env(RACE)
    frames, _ = games.reset(seed=[1, 2, 3])
    assert games.single_observation_space == official.observation_space
    assert games.single_action_space == official.action_space
    assert games.observation_space.contains(frames)
    assert len({frame.tobytes() for frame in frames}) == 3


def test_a_seed_gives_the_same_episode_whatever_else_is_played_beside_it(installed):
    (alone,) = record(EnvPoolGames(RACE, 1), PLAYER, [6])
    together = record(EnvPoolGames(RACE, 2), PLAYER, [4, 5, 6, 7])
    assert [episode.seed for episode in together] == [4, 5, 6, 7]
    for name, value in vars(alone).items():
        np.testing.assert_array_equal(value, getattr(together[2], name))
    assert (alone.frames != together[1].frames).any()
    assert len(alone.actions) == RACE.max_steps
    assert (alone.terminated, alone.truncated) == (False, True)


def test_a_held_action_is_the_same_action_played_some_times(installed):
    plain, held = EnvPoolGames(RACE, 2), EnvPoolGames(replace(RACE, repeat=4), 2)
    assert (plain.reset(seed=[1, 2])[0] == held.reset(seed=[1, 2])[0]).all()
    actions, over = np.tile(np.float32([0.3, 0.2, 0.0]), (2, 1)), False
    while not over:
        total = 0.0
        frames, reward, *flags, _ = held.step(actions)
        for _ in range(4):
            expected, paid, *ends, _ = plain.step(actions)
            total, over = total + paid, np.logical_or(*ends).all()
            if over:
                break
        assert (frames == expected).all() and np.allclose(reward, total)
        np.testing.assert_array_equal(flags, ends)


def test_shards_are_the_same_from_one_run_to_the_next(installed, workers, tmp_path):
    config = CollectConfig(simulator="envpool")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        collect(RACE, PLAYER, range(6), tmp_path / name, workers, config)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert [entry.seed for entry in EpisodeStore([tmp_path / "one"]).index] == [*range(6)]
