"""Games in trouble, real ones: an engine that is killed or stopped costs time and nothing else, and
whoever is killed, no engine stays behind.
"""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from saboteur import Saboteur

from wm import WMError
from wm.envs import EnvConfig
from wm.workers import RandomPlayer, play

TAKE_COVER = EnvConfig("takecover", max_steps=40)
SECONDS = 20.0  # that an episode may take


def engine(parent):
    """The process of ViZDoom below a process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        name, fields = stat.read_text().rsplit(")", 1)
        if "vizdoom" in name and int(fields.split()[1]) == parent:
            return int(stat.parent.name)
    raise AssertionError("there is no engine")


def strike(number):
    os.kill(engine(os.getpid()), number)


def fall(note):
    """Leave the number of the engine, and be killed."""
    note.write_text(str(engine(os.getpid())))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_engine_that_is_lost_is_replaced_and_its_episode_has_the_same_return(
    number, workers, tmp_path
):
    saboteur = Saboteur(partial(strike, number), tmp_path / "diary")
    started = time.monotonic()
    (outcomes,) = workers.map(partial(play, TAKE_COVER, saboteur), [[3]], SECONDS)
    assert outcomes == play(TAKE_COVER, RandomPlayer("uniform"), [3])
    assert saboteur.attempts == 2  # it did happen
    assert time.monotonic() - started < 4 * SECONDS


def test_the_engine_of_a_worker_that_is_killed_ends_with_it(workers, alive, tmp_path):
    saboteur = Saboteur(partial(fall, tmp_path / "engine"), tmp_path / "diary")
    (outcomes,) = workers.map(partial(play, TAKE_COVER, saboteur), [[3]], SECONDS)
    assert outcomes == play(TAKE_COVER, RandomPlayer("uniform"), [3])
    assert int((tmp_path / "engine").read_text()) not in alive(os.getsid(0))


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGSTOP], ids=["plays", "stopped"])
def test_where_wm_is_killed_amid_a_game_no_process_is_left(
    number, start, wait_until, alive, left, tmp_path
):
    process = start(tmp_path, "collect", "env=takecover", "collect.episodes=100")
    wait_until(lambda: list(tmp_path.glob("made/takecover/collect-*/shard-*")), process)

    def engines():
        return [n for n, name in alive(process.pid).items() if name == "vizdoom"]

    (its,) = wait_until(engines, process)
    os.kill(its, number)  # stopped, its worker waits for it for ever
    process.kill()
    process.wait()
    assert left(process.pid) == []


def test_an_engine_that_is_always_lost_is_given_up_with_its_seed(workers, tmp_path):
    saboteur = Saboteur(partial(strike, signal.SIGKILL), tmp_path / "diary", times=99)
    with pytest.raises(WMError, match=r"a game at \[3\] failed 3 times"):
        list(workers.map(partial(play, TAKE_COVER, saboteur), [[3]], SECONDS))
