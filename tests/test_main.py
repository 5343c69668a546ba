"""The command line: usage, the resolved configuration, and errors of one line."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from wm.__main__ import COMMANDS, main
from wm.config import from_yaml, load
from wm.worldmodels.pipeline import Config


@pytest.fixture
def wm(monkeypatch, capsys):
    """Runs `wm ...` in this process: its exit code, standard output and standard error."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["wm", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    before = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, before)


def test_an_unknown_command_exits_2_with_the_usage(own_folder):
    command = [sys.executable, "-m", "wm", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=own_folder)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: wm COMMAND")
    assert done.stderr == "wm: there is no command 'nonsense'\n"


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["run", "env=tiny", "--help"]])
def test_the_usage_names_every_command(words, wm):
    code, out, err = wm(*words)
    assert (code, err) == (0, "")
    for name in COMMANDS:
        assert f"\n  {name} " in out


def test_trouble_with_the_disk_is_one_line_and_no_other_fault_is_hidden(wm, monkeypatch):
    def fails(number):
        def work(words):
            raise OSError(number, os.strerror(number), "runs/x.png")

        monkeypatch.setitem(COMMANDS, "sync", work)
        return wm("sync")

    code, _, err = fails(errno.ENOSPC)
    assert code == 2 and len(err.splitlines()) == 1
    assert "No space left" in err and "runs/x.png" in err and "the same command goes on" in err
    with pytest.raises(FileNotFoundError):
        fails(errno.ENOENT)


def test_config_prints_what_would_be_run_as_yaml(wm, tmp_path):
    words = ["env=carracing", "scale=paper", "controller.temperature=1.3", "seed=4"]
    code, out, _ = wm("config", *words)
    assert code == 0
    (tmp_path / "printed.yaml").write_text(out)
    assert from_yaml(Config, tmp_path / "printed.yaml") == load(Config, words)


@pytest.mark.parametrize("command", ["config", "run", "vision", "evaluate"])
@pytest.mark.parametrize(
    "word, says",
    [
        ("controller.temprature=1", "controller.temperature"),
        ("env=takecovr", "takecover"),
        ("seed=-1", "0"),
        ("seed", "key=value"),
        ("collect.simulator=envpool", "env=carracing"),
        ("env.repeat=0", "1"),
        ("memory.steps=0", "controller.fitness=real"),
        ("controller.optimizer=cma", "controller.hidden=0"),
        ("run", "key=value"),
    ],
)
def test_a_word_that_cannot_be_meant_exits_2_with_one_line(command, word, says, wm, own_folder):
    code, out, err = wm(command, word)
    assert code == 2
    assert err.startswith("wm: ") and says in err and len(err.splitlines()) == 1
    assert out == ""
    assert list(own_folder.iterdir()) == []  # and nothing was begun


@pytest.mark.parametrize(
    "command, maker",
    [
        ("vision", "collect"),
        ("memory", "collect"),
        ("choice", "controller"),
        ("evaluate", "choice"),
    ],
)
def test_a_stage_without_its_input_says_which_command_makes_it(command, maker, wm, runs):
    words = ["env=tiny", "scale=smoke", "seed=9", f"runs={runs}", "trainer.workers=1", "rounds=2"]
    code, _, err = wm(command, *words)
    assert code == 2
    assert len(err.splitlines()) == 1 and err.startswith("wm: ")  # and nothing was played
    assert f"`wm {maker} {' '.join(words)}` makes it, and `wm run {' '.join(words)}` all" in err


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_a_run_that_is_not_there_is_named(command, wm, runs):
    code, _, err = wm(command, "run=0123abc", "env=tiny", f"runs={runs}")
    assert code == 2
    assert err.startswith("wm: ") and "0123abc" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["evaluate", "bench", "parity"])
def test_an_agent_without_a_name_is_no_other(command, wm):
    code, _, err = wm(command, "run=")  # of a shell's variable that is not set
    assert (code, err) == (2, "wm: run= names no agent\n")


@pytest.mark.parametrize("word", ["env.repeat=2", "controller.temperature=1.3", "env=carracing"])
def test_an_agent_keeps_its_own_settings(word, wm, runs):
    code, out, err = wm("evaluate", "pretrained=takecover", word, f"runs={runs}")
    assert (code, out) == (2, "")
    assert err.startswith(f"wm: {word} would change nothing") and len(err.splitlines()) == 1


def test_what_is_not_there_to_work_on_is_refused_before_games_are_played(wm, own_folder):
    (own_folder / "taken").touch()
    for word in ("trainer.accelerator=gqu", "runs=taken"):
        code, _, err = wm("run", "env=tiny", "scale=smoke", word)
        assert code == 2
        assert err.startswith(f"wm: {word}") and len(err.splitlines()) == 1
    code, _, err = wm("run", "env=tiny", "scale=smoke", "vision.batch=100", "trainer.devices=3")
    assert (code, err) == (2, "wm: 3 devices cannot share vision.batch=100 evenly\n")
    assert [path.name for path in own_folder.iterdir()] == ["taken"]


def test_parity_is_refused_for_other_games(wm):
    code, _, err = wm("parity", "env=takecover")
    assert code == 2
    assert err.startswith("wm: ") and "env=carracing" in err and len(err.splitlines()) == 1
