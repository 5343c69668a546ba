"""Episodes on disk: whole or not there, and read back as they were."""

import errno
import json
import os

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from wm import WMError
from wm.envs import EnvConfig, as_vector, make_env
from wm.episodes import Episode, EpisodeStore, Recorder, Shard, write_shard
from wm.rollout import UniformPolicy, rollout

LENGTHS = [[3, 1, 5], [2], [4, 12, 6]]  # of the episodes of three shards


def random_episode(seed, steps):
    generator = np.random.default_rng(seed)
    return Episode(
        seed,
        generator.integers(0, 256, (steps + 1, 64, 64, 3), np.uint8),
        generator.normal(size=(steps, 2)).astype(np.float32),
        generator.normal(size=steps).astype(np.float32),
        terminated=bool(seed % 2),
        truncated=not seed % 2,
    )


@pytest.fixture
def kept(tmp_path):
    """A folder of shards and the episodes that are in it."""
    folder, episodes = tmp_path / "collect", []
    for number, lengths in enumerate(LENGTHS):
        shard = [random_episode(10 * number + i, steps) for i, steps in enumerate(lengths)]
        write_shard(folder / f"shard-{10 * number:010d}", shard)
        episodes += shard
    return folder, episodes


def test_episodes_are_read_back_as_they_were(kept):
    folder, episodes = kept
    store = EpisodeStore([folder])
    assert len(store) == len(episodes)
    for number, episode in enumerate(episodes):
        read = store[number]
        for name in ("frames", "actions", "rewards"):
            array = getattr(read, name)
            np.testing.assert_array_equal(array, getattr(episode, name))
            assert array.dtype == getattr(episode, name).dtype
        assert (read.seed, read.terminated, read.truncated) == (
            episode.seed,
            episode.terminated,
            episode.truncated,
        )
        entry = store.index[number]
        assert entry.steps == store.steps[number] == len(episode.actions)
        assert entry.episode_return == pytest.approx(episode.rewards.sum())


def test_frames_gathered_in_any_order_are_those_of_the_whole_sequence(kept):
    folder, episodes = kept
    store, whole = EpisodeStore([folder]), np.concatenate([e.frames for e in episodes])
    assert store.total_frames == len(whole)
    numbers = np.random.default_rng(0).integers(len(whole), size=100)  # any order, and repeats
    np.testing.assert_array_equal(store.frames(numbers), whole[numbers])
    for number, episode in enumerate(episodes):
        first = store.first_frame[number]
        np.testing.assert_array_equal(whole[first : first + len(episode.frames)], episode.frames)


def test_stores_of_several_folders_keep_the_order_of_the_folders(kept, tmp_path):
    folder, episodes = kept
    write_shard(tmp_path / "more" / "shard-0000000000", [random_episode(99, 2)])
    store = EpisodeStore([folder, tmp_path / "more"])
    assert [entry.seed for entry in store.index] == [*(e.seed for e in episodes), 99]


def test_episodes_are_split_whole_and_into_disjoint_parts(tmp_path):
    episodes = [random_episode(seed, 1) for seed in range(25)]
    write_shard(tmp_path / "shard-0", episodes)
    write_shard(tmp_path / "few" / "shard-0", episodes[:2])
    train, validation = EpisodeStore([tmp_path]).split()
    assert sorted([*train, *validation]) == list(range(25))
    assert len(validation) == 2
    train, validation = EpisodeStore([tmp_path / "few"]).split()
    assert (len(train), len(validation)) == (1, 1)  # neither part is ever empty


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_shard_that_cannot_be_finished_leaves_nothing(step, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(WMError, match=r"No space left on device; it needs .* free some disk"):
        write_shard(tmp_path / "collect" / "shard-1", [random_episode(1, 3)])
    assert os.listdir(tmp_path / "collect") == []


def test_a_disk_that_fills_up_amid_the_frames_leaves_nothing(tmp_path, disk_full):
    with disk_full(20_000), pytest.raises(WMError, match="free some disk") as refusal:
        write_shard(tmp_path / "collect" / "shard-1", [random_episode(1, 3)])
    assert "None" not in str(refusal.value)
    assert os.listdir(tmp_path / "collect") == []
    write_shard(tmp_path / "collect" / "shard-1", [random_episode(1, 3)])
    assert len(EpisodeStore([tmp_path / "collect"])) == 1


@pytest.mark.parametrize("name", ["frames.npy", "actions.npy", "rewards.npy", "index.json"])
@pytest.mark.parametrize("size", [0, 100, -8])
def test_a_truncated_file_is_found_out(name, size, kept):
    path = kept[0] / "shard-0000000020" / name
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(WMError, match=r"damaged.*collect"):
        EpisodeStore([kept[0]])


def test_arrays_that_disagree_with_the_index_are_found_out(kept):
    shard = kept[0] / "shard-0000000000"
    record = json.loads((shard / "index.json").read_text())
    record["episodes"].pop()
    (shard / "index.json").write_text(json.dumps(record))
    with pytest.raises(WMError, match=r"frames\.npy holds uint8"):
        Shard(shard)


def test_an_empty_store_names_the_command_that_fills_it(tmp_path):
    with pytest.raises(WMError, match="wm collect"):
        EpisodeStore([tmp_path])


@pytest.mark.parametrize("game", ["carracing", "takecover", "tiny"])
def test_the_recorded_actions_lead_a_fresh_game_through_the_recorded_frames(game):
    config = EnvConfig(game, max_steps=40)
    recorder, fresh = Recorder(as_vector(make_env(config))), make_env(config)
    generator = np.random.default_rng(0)
    recorder.reset(seed=[5])
    ended = False
    while not ended:
        action = generator.uniform(recorder.action_space.low, 1.0).astype(np.float32)
        _, _, terminated, truncated, _ = recorder.step(action)
        action[:] = 0  # a policy may write its next action in the same place
        ended = terminated[0] or truncated[0]
    (episode,) = recorder.episodes()
    frame, _ = fresh.reset(seed=5)
    np.testing.assert_array_equal(episode.frames[0], frame)
    for step, action in enumerate(episode.actions):
        frame, reward, *_ = fresh.step(action)
        np.testing.assert_array_equal(episode.frames[step + 1], frame)
        assert episode.rewards[step] == np.float32(reward)
    recorder.close(), fresh.close()
    assert (episode.terminated, episode.truncated) == (terminated[0], truncated[0])
    assert len(episode.frames) == len(episode.actions) + 1 == len(episode.rewards) + 1


def test_games_recorded_side_by_side_are_each_cut_at_their_own_end():
    config, seeds = EnvConfig("tiny", max_steps=40), [3, 4, 5, 6]
    games = [lambda: make_env(config)] * len(seeds)
    recorder = Recorder(SyncVectorEnv(games, autoreset_mode=AutoresetMode.NEXT_STEP))
    rollout(recorder, UniformPolicy(recorder.single_action_space), seeds)
    together = recorder.episodes()
    assert len({len(episode.actions) for episode in together}) > 1
    for seed, episode in zip(seeds, together, strict=True):
        recorder = Recorder(as_vector(make_env(config)))
        rollout(recorder, UniformPolicy(recorder.single_action_space), [seed])
        (alone,) = recorder.episodes()
        assert_same(episode, alone)
        assert episode.terminated or episode.truncated


def assert_same(one, two):
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(two, name))
