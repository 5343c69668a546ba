"""Collecting: only what is missing is played, and it is what would have been played before."""

import shutil

import numpy as np
import pytest
from contents import hashes, shards

from wm import WMError
from wm.collect import (
    SHARD_EPISODES,
    TYPICAL_STEPS,
    CollectConfig,
    Patience,
    collect,
    record,
)
from wm.envs import EnvConfig, as_vector, make_env
from wm.episodes import EpisodeStore
from wm.workers import RandomPlayer, play

TINY = EnvConfig("tiny", max_steps=40)
SEEDS = range(30, 40)  # two full shards and half of one
PLAYER = RandomPlayer("brownian")


def test_collecting_again_plays_only_what_is_missing_and_the_same(workers, tmp_path, capsys):
    collect(TINY, PLAYER, SEEDS, tmp_path, workers)
    before = hashes(tmp_path)
    first, second = sorted(tmp_path.glob("shard-*"))[:2]
    kept = {path: path.stat().st_mtime_ns for path in [first, *first.iterdir()]}
    shutil.rmtree(second)
    capsys.readouterr()
    collect(TINY, PLAYER, SEEDS, tmp_path, workers)
    assert "10/10" in capsys.readouterr().err  # the bar counts what was there
    assert hashes(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    store = EpisodeStore([tmp_path])
    assert [entry.seed for entry in store.index] == list(SEEDS)
    outcomes = play(TINY, PLAYER, SEEDS)  # what is kept is what a player plays
    assert [e.steps for e in store.index] == [o.steps for o in outcomes]
    assert [e.episode_return for e in store.index] == [o.episode_return for o in outcomes]


def test_more_episodes_add_to_those_that_are_there(workers, tmp_path):
    collect(TINY, PLAYER, SEEDS[:SHARD_EPISODES], tmp_path, workers)
    before = hashes(tmp_path)
    collect(TINY, PLAYER, SEEDS[: 2 * SHARD_EPISODES], tmp_path, workers)
    assert before.items() < hashes(tmp_path).items()


def test_recording_again_gives_the_same_whatever_was_played_before():
    (alone,) = record(as_vector(make_env(TINY)), PLAYER, [7])
    after_others = record(as_vector(make_env(TINY)), PLAYER, [5, 6, 7])[-1]
    assert (alone.frames == after_others.frames).all()
    assert (alone.actions == after_others.actions).all()
    assert alone.seed == 7


def test_an_episode_is_cut_when_patience_ends(workers, tmp_path):
    for actions in (0, 3):
        (tmp_path / str(actions)).mkdir()
        config = CollectConfig(patience=actions)
        collect(TINY, PLAYER, SEEDS, tmp_path / str(actions), workers, config)
    whole, cut = (EpisodeStore([tmp_path / name]) for name in ("0", "3"))
    assert (cut.steps == 3).all() and (whole.steps > 3).all()  # a ball falls for eight steps
    for number in range(len(SEEDS)):
        np.testing.assert_array_equal(cut[number].frames, whole[number].frames[:4])
        assert cut[number].truncated and not cut[number].terminated


def test_reward_renews_patience():
    fast = Patience(as_vector(make_env(TINY)), 9)
    (episode,) = record(fast, PLAYER, [next(s for s in range(99) if longest(s) > 20)])
    assert len(episode.rewards) > 9


def longest(seed):
    (episode,) = record(as_vector(make_env(TINY)), PLAYER, [seed])
    return len(episode.rewards)


def test_a_disk_too_small_is_refused_before_anything_is_played(workers, tmp_path, monkeypatch):
    monkeypatch.setitem(TYPICAL_STEPS, "tiny", 10**15)
    endless = EnvConfig("tiny", max_steps=10**15)
    with pytest.raises(WMError, match=r"need about .* GB .* free; lower collect\.episodes"):
        collect(endless, PLAYER, SEEDS, tmp_path, workers)
    assert list(tmp_path.glob("shard-*")) == []


def test_what_is_there_needs_no_disk(workers, tmp_path, capsys, monkeypatch):
    seeds = SEEDS[: 2 * SHARD_EPISODES]
    collect(TINY, PLAYER, seeds, tmp_path, workers)
    monkeypatch.setitem(TYPICAL_STEPS, "tiny", 10**15)
    endless = EnvConfig("tiny", max_steps=10**15)
    capsys.readouterr()
    collect(endless, PLAYER, seeds, tmp_path, workers)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("lost", [False, True])
def test_the_ranks_shards_are_those_of_one_process_and_the_leader_plays_a_lost_ones(
    lost, workers, tmp_path, as_rank
):
    collect(TINY, PLAYER, SEEDS, tmp_path / "one", workers)
    if not lost:
        as_rank(1, 2)
        collect(TINY, PLAYER, SEEDS, tmp_path / "two", workers)
        assert [path.name for path in (tmp_path / "two").glob("shard-*")] == ["shard-0000000034"]
    as_rank(0, 2)
    collect(TINY, PLAYER, SEEDS, tmp_path / "two", workers)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
