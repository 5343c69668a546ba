"""Processes that play: any number gives the same, and a dead or stuck one changes nothing."""

import os
import signal
import time
from functools import partial

import pytest
from saboteur import Saboteur

from wm import WMError
from wm.envs import EnvConfig
from wm.rollout import UniformPolicy
from wm.workers import ATTEMPTS, RandomPlayer, Workers, play

TINY = EnvConfig("tiny", max_steps=60)
SEEDS = range(20, 26)


def die():
    os._exit(1)


def own_process(item):
    return os.getpid()


def err():
    raise WMError("no such weights")


@pytest.fixture(scope="module")
def one_worker():
    with Workers(1) as pool:
        yield pool


@pytest.mark.parametrize(
    "config", [TINY, EnvConfig("takecover", max_steps=100)], ids=lambda config: config.name
)
def test_the_same_outcomes_on_no_one_and_two_processes(config, one_worker, workers):
    player = RandomPlayer("uniform")
    here = play(config, player, SEEDS)
    assert list(one_worker.play(config, player, SEEDS)) == here
    assert list(workers.play(config, player, SEEDS)) == here
    assert [outcome.seed for outcome in here] == list(SEEDS)
    assert all(outcome.steps >= 1 for outcome in here)
    assert len({outcome.steps for outcome in here}) > 1 or config.name == "takecover"


@pytest.mark.parametrize("harm", [die, partial(time.sleep, 3600)], ids=["dies", "hangs"])
def test_a_process_that_dies_or_hangs_is_replaced_and_nothing_changes(harm, workers, tmp_path):
    player = Saboteur(harm, tmp_path / "diary")
    chunks = [[1, 2], [3], [4, 5]]
    played = list(workers.map(partial(play, TINY, player), chunks, timeout=3.0))
    assert played == [play(TINY, RandomPlayer("uniform"), chunk) for chunk in chunks]
    assert player.attempts > len(chunks)  # it did happen


@pytest.mark.parametrize("pause", [0.0, 1.0])  # before and after the pool has noticed
def test_a_process_that_dies_with_nothing_to_do_is_replaced(pause):
    with Workers(1) as pool:
        (process,) = pool.map(own_process, [0], timeout=60.0)
        os.kill(process, signal.SIGKILL)
        time.sleep(pause)
        first, second = pool.map(own_process, [0, 1], timeout=60.0)
        assert first == second != process


def test_a_game_that_is_stopped_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Workers(1) as pool:
        endless = (EnvConfig("takecover"), RandomPlayer("uniform"), range(10_000))
        future = pool.pool.schedule(play, args=endless)
        while not list(tmp_path.glob("vizdoom-*/*")):
            assert not future.done()
            time.sleep(0.1)
        time.sleep(1.0)  # amid a game
    assert list(tmp_path.glob("vizdoom-*")) == []


def test_a_game_that_always_dies_is_given_up_and_named(workers, tmp_path):
    player = Saboteur(die, tmp_path / "diary", times=10**6)
    with pytest.raises(WMError, match=rf"a game at \[41, 42\] failed {ATTEMPTS} times"):
        list(workers.map(partial(play, TINY, player), [[41, 42]], timeout=3.0))
    assert player.attempts == ATTEMPTS


def test_an_error_of_the_players_own_is_passed_on_and_not_retried(workers, tmp_path):
    player = Saboteur(err, tmp_path / "diary", times=10**6)
    with pytest.raises(WMError, match="no such weights"):
        list(workers.map(partial(play, TINY, player), [[1]], timeout=3.0))
    assert player.attempts == 1


def test_a_player_who_never_looks_has_the_same_return_from_a_game_that_draws_nothing(monkeypatch):
    env = EnvConfig("carracing", max_steps=20, fast_drawing=False)
    unseen = play(env, RandomPlayer("uniform"), [1, 2])
    monkeypatch.setattr(UniformPolicy, "blind", False)
    assert play(env, RandomPlayer("uniform"), [1, 2]) == unseen
