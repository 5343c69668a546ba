from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wm.data import Frames, Latents, Sequences, frames_data, sequences_data
from wm.episodes import Episode, EpisodeStore, write_shard

STEPS = [12, 3, 7, 20, 4, 9, 1, 12, 5, 6, 8, 30]  # of each episode; every third one is truncated
ALL = range(len(STEPS))
LENGTH = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Episodes in two shards; frames and latents say their (episode, step), actions likewise."""
    folder = tmp_path_factory.mktemp("episodes")
    episodes = []
    for number, steps in enumerate(STEPS):
        frames = np.zeros((steps + 1, 64, 64, 3), np.uint8)
        frames[..., 0], frames[..., 1] = number, np.arange(steps + 1)[:, None, None]
        actions = np.stack([np.full(steps, number), np.arange(steps)], 1).astype(np.float32)
        died = number % 3 != 2
        rewards = np.arange(steps, dtype=np.float32)
        episodes.append(Episode(number, frames, actions, rewards, died, not died))
    write_shard(folder / "shard-0000000000", episodes[:7])
    write_shard(folder / "shard-0000000007", episodes[7:])
    mean = np.concatenate([episode.frames[:, 0, 0, :2] for episode in episodes]).astype(np.float32)
    np.save(folder / "mean.npy", mean)
    np.save(folder / "log_variance.npy", -mean)
    return folder


@pytest.fixture(scope="module")
def store(folder):
    return EpisodeStore([folder])


@pytest.fixture(scope="module")
def sequences(folder, store):
    def make(episodes=ALL, batch=16, seed=0, **options):
        settings = (batch, LENGTH, seed)
        return Sequences(store, Latents(folder), np.array(episodes), *settings, **options)

    return make


@pytest.fixture(scope="module")
def frames(store):
    def make(episodes=ALL, batch=16, seed=0, **options):
        return Frames(store, np.array(episodes), batch, seed, **options)

    return make


def rows(batches):
    """The segments of some batches, padding cut off; and the (episode, step) each begins at."""
    for batch in batches:
        for i, mask in enumerate(batch["mask"]):
            n = int(mask.sum())
            cut = {
                name: value[i, : n + name.startswith(("mean", "log"))]
                for name, value in batch.items()
            }
            yield n, *cut["mean"][0].int().tolist(), cut


def places(batch):
    """The (episode, step) of the frames in a batch; those before them are checked."""
    (frames, before) = (picture[:, 0, 0, :2].int() for picture in batch)
    expected = torch.stack([frames[:, 0], (frames[:, 1] - 1).clamp(min=0)], 1)
    assert torch.equal(before, expected)  # the first frame of an episode stands for its own past
    return [tuple(place) for place in frames.tolist()]


def seen(batch):
    """The episodes of a batch of frames or of segments."""
    if isinstance(batch, dict):
        return set(batch["mean"][:, 0, 0].int().tolist())
    return {episode for episode, _ in places(batch)}


def test_segments_are_contiguous_and_never_cross_an_episodes_end(sequences):
    make = sequences()
    for n, episode, start, segment in rows(map(make, range(20))):
        assert n == min(LENGTH, STEPS[episode])
        times = torch.arange(start, start + n + 1.0)
        expected = torch.stack([torch.full((n + 1,), float(episode)), times], 1)
        assert torch.equal(segment["mean"], expected)
        assert torch.equal(segment["log_variance"], -expected)
        assert torch.equal(segment["action"], expected[:-1])
        assert torch.equal(segment["reward"], times[:-1])


def test_an_end_is_the_last_step_of_a_terminated_episode_and_nothing_else(sequences):
    make, found = sequences(), Counter()
    for n, episode, start, segment in rows(map(make, range(20))):
        last = start + n == STEPS[episode]
        died = episode % 3 != 2
        expected = torch.zeros(n)
        expected[-1] = float(last and died)
        assert torch.equal(segment["end"], expected)
        found[last, died] += 1
    assert len(found) == 4


def test_padding_is_zero_and_masked(sequences):
    batch = sequences([1, 6], batch=4)(0)  # episodes of 3 steps and of 1
    assert batch["mean"].shape == (4, LENGTH + 1, 2)
    assert batch["action"].shape == (4, LENGTH, 2)
    for name in ("action", "reward", "end"):
        assert not batch[name][batch["mask"] == 0].any()
    for row, mask in zip(batch["mean"], batch["mask"], strict=True):
        assert mask.sum() == STEPS[int(row[0, 0])]
        assert not row[int(mask.sum()) + 1 :].any()


def test_first_and_last_steps_are_seen_as_often_as_middle_ones(sequences):
    steps = STEPS[11]
    make, counts = sequences([11], batch=200), np.zeros(steps)
    for n, _, start, _ in rows(map(make, range(10))):
        counts[start : start + n] += 1
    middle = counts[2 * LENGTH : -2 * LENGTH].mean()
    assert (counts[[0, -1]] > 0.8 * middle).all()
    assert (counts > 0).all()


@pytest.mark.parametrize("kind", ["frames", "sequences"])
def test_a_batch_depends_on_seed_and_step_alone(kind, request):
    def same(one, other):
        if isinstance(one, dict):
            return all(torch.equal(one[name], other[name]) for name in one)
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    make = request.getfixturevalue(kind)
    used = make()
    batches = [used(step) for step in range(5)]
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert same(make()(3), batches[3])
    assert not same(batches[2], batches[3])
    assert not same(make(seed=1)(3), batches[3])


def test_numbers_cover_the_chosen_episodes_frames_and_no_others(store, frames):
    chosen = [1, 6, 7, 11]
    data = frames(chosen)
    total = sum(STEPS[episode] + 1 for episode in chosen)
    pictures = store.frames(data.numbers(np.arange(total)))
    expected = [(episode, step) for episode in chosen for step in range(STEPS[episode] + 1)]
    assert [tuple(picture[0, 0, :2]) for picture in pictures] == expected
    drawn = {place for step in range(60) for place in places(data(step))}
    assert drawn == set(expected)  # drawing reaches every one


@pytest.mark.parametrize(("count", "batches"), [(10, 1), (1000, 4)])
def test_even_frames_are_distinct_and_span_the_episodes(frames, count, batches):
    total = sum(STEPS[episode] + 1 for episode in (0, 3, 5, 9))
    even = [places(batch) for batch in frames([0, 3, 5, 9], batch=16).evenly(count)]
    assert len(even) == batches
    assert all(len(batch) <= 16 for batch in even)
    shown = [place for batch in even for place in batch]
    assert len(set(shown)) == len(shown) == min(count, total)
    assert (shown[0], shown[-1]) == ((0, 0), (9, STEPS[9]))


def test_fixed_segments_are_the_same_at_every_call(sequences):
    one, other = sequences().fixed(40), sequences().fixed(40)
    assert sum(len(batch["mask"]) for batch in one) >= 40
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)


@pytest.mark.parametrize("kind", ["frames", "sequences"])
def test_training_and_validation_share_no_episode(kind, folder, store):
    config = SimpleNamespace(batch=50, length=LENGTH, steps=10)
    if kind == "frames":
        data = frames_data(store, config, 0, 5)
    else:
        data = sequences_data(store, Latents(folder), config, 0, 5)
    training = set.union(*(seen(data.make_batch(step)) for step in range(10)))
    validation = set.union(*map(seen, data.validation))
    assert training | validation == set(ALL)
    assert not training & validation


@pytest.mark.parametrize("kind", ["frames", "sequences"])
def test_the_ranks_batches_together_are_that_of_one_process(kind, folder, store, as_rank):
    def first_batch():
        if kind == "frames":
            return frames_data(store, config, 0, 10).make_batch(3)
        return tuple(sequences_data(store, Latents(folder), config, 0, 10).make_batch(3).values())

    config, parts = SimpleNamespace(batch=6, length=LENGTH, steps=10), []
    whole = first_batch()
    for rank in range(3):
        as_rank(rank, 3)
        parts.append(first_batch())
    for expected, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(pieces), expected)
        assert {len(piece) for piece in pieces} == {2}
