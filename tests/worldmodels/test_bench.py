"""The benchmark's own arithmetic, and that its baselines do what they are compared for."""

import numpy as np
import pytest
import torch

from wm.envs import EnvConfig
from wm.episodes import EpisodeStore
from wm.worldmodels import bench, plain
from wm.worldmodels.bench import Comparison


def test_a_comparison_takes_turns_and_reports_the_median_of_the_ratios(capsys):
    turns, ours, theirs = [], iter([10.0, 40.0, 30.0]), iter([10.0, 10.0, 10.0])

    def ask(name, rates):
        turns.append(name)
        return next(rates)

    result = bench.compare(
        "A", "B", "step", lambda: ask("A", ours), lambda: ask("B", theirs), target=2
    )
    assert turns == ["A", "B"] * 3
    assert result.ratios == [1.0, 4.0, 3.0]
    assert "3.00 [1.00, 4.00]" in capsys.readouterr().out


def test_a_rate_is_units_by_seconds(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.timed(20, lambda: None) == 5.0


def test_every_comparison_has_a_name_of_its_own_that_mlflow_takes():
    names = {
        bench._metric(Comparison(name, against, "step", [1.0], [1.0]))
        for name in ("dream, carracing", "dream, takecover")
        for against in ("Gymnasium's, the same pixels", "one dream at a time")
    }
    assert len(names) == 4
    assert not set("".join(names)) & set(",':;")


def test_a_dream_alone_is_paid_by_its_model(make_agent):
    agent = make_agent(features="zh")
    torch.nn.init.zeros_(agent.memory.reward_head.weight)
    torch.nn.init.constant_(agent.memory.reward_head.bias, 0.5)
    assert plain.dream_alone(agent, 6) == pytest.approx(3.0)


def test_gymnasiums_own_processes_play():
    assert plain.play_async(EnvConfig("tiny", max_steps=60), processes=2, steps=20) > 0


def test_images_are_read_one_by_one_from_npz_files(tmp_path):
    frames = np.random.default_rng(0).integers(256, size=(2, 3, 64, 64, 3), dtype=np.uint8)
    for number, episode in enumerate(frames):
        np.savez(tmp_path / f"{number}.npz", frames=episode)
    images = plain.NpzImages(tmp_path)
    assert len(images) == 6
    assert (images[4].numpy() == frames[1, 1]).all()


def test_a_hollow_store_has_its_frames_and_takes_no_disk(tmp_path):
    bench._hollow_shard(tmp_path / "shard-0", 5)
    store = EpisodeStore([tmp_path])
    assert (len(store), store.total_frames) == (5, 5 * 331)
    assert not store.frames(np.array([0, 1654])).any()
    blocks = (tmp_path / "shard-0" / "frames.npy").stat().st_blocks
    assert blocks * 512 < 0.1 * 5 * 331 * 64 * 64 * 3
