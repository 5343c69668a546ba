"""The comparison of simulators: the same track and the same drive in both."""

import numpy as np
import pytest

from wm.collect import record
from wm.envpool import EnvPoolGames
from wm.envs import EnvConfig, as_vector, make_env
from wm.episodes import Episode
from wm.parity import Pair, compare, pair, table
from wm.workers import RandomPlayer

RACE = EnvConfig("carracing", max_steps=100, crop=12)
PLAYER = RandomPlayer("brownian")


def episode(frame, rewards):
    frames = np.full((len(rewards) + 1, 64, 64, 3), frame, np.uint8)
    rewards = np.array(rewards, np.float32)
    return Episode(1, frames, np.zeros((len(rewards), 3)), rewards, True, False)


def test_differences_are_absolute_and_taken_while_both_last():
    one, two = episode(200, [1.0, 2.0]), episode(10, [3.0, 2.0, 50.0])
    two.frames[0] = 210
    assert pair(one, two) == Pair(3.0, 55.0, 1.0, 10.0, pytest.approx((10 + 190 + 190) / 3))
    assert pair(two, one) == Pair(55.0, 3.0, 1.0, 10.0, pytest.approx((10 + 190 + 190) / 3))


def test_the_same_actions_on_the_same_track_earn_the_same_in_both():
    pytest.importorskip("envpool")
    for both in compare(RACE, PLAYER, [1, 2**31 - 1]):
        assert both.reward < 1e-4
        assert both.official == pytest.approx(both.envpool, abs=1e-2)
        assert 0 < both.frames < 5


def test_the_official_tracks_of_the_same_seeds_are_others():
    """Once they are not, parity needs no tracks of its own."""
    pytest.importorskip("envpool")
    (official,) = record(as_vector(make_env(RACE)), PLAYER, [1])
    (envpool,) = record(EnvPoolGames(RACE, 1), PLAYER, [1])
    assert pair(official, envpool).reward > 1e-3


def test_the_table_has_every_player_in_both(workers):
    pytest.importorskip("envpool")
    players = {"first": PLAYER, "second": RandomPlayer("uniform")}
    lines = "\n".join(table(EnvConfig("carracing", max_steps=20), players, range(6), workers))
    for name in players:
        assert f"{name}: return" in lines
    assert lines.count("  official") == lines.count("  EnvPool  ") == 2
