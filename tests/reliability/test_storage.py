"""Full disks and flipped bits: named, with what is needed, and mended by the same command."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from contents import shards

from wm import WMError
from wm.collect import collect
from wm.data import Latents
from wm.envs import EnvConfig
from wm.episodes import EpisodeStore
from wm.stages import CHECKPOINTS, DONE, Stage, run_stage
from wm.workers import RandomPlayer
from wm.worldmodels.encode import new_array

ENV, SEEDS = EnvConfig("tiny", max_steps=20), range(10)


@pytest.fixture
def collected(workers, tmp_path, tracker):
    """A collect stage that is done, and one that reads it."""

    def play(folder, inputs, run):
        collect(ENV, RandomPlayer("uniform"), SEEDS, folder, workers)

    first = Stage("collect", 1, {}, play, tmp_path / "tiny")
    second = Stage(
        "vision",
        1,
        {},
        lambda folder, inputs, run: {"frames": EpisodeStore([inputs["collect"]]).total_frames},
        tmp_path / "tiny",
        {"collect": first},
    )
    run_stage(first, tracker)
    return first, second


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("name", ["frames.npy", "actions.npy", "rewards.npy", "index.json"])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_shard_is_named_and_played_again_the_same(
    name, damage, collected, tracker, capsys
):
    first, second = collected
    before = shards(first.folder)
    path = sorted(first.folder.glob("shard-*"))[1] / name
    damage(path)
    with pytest.raises(WMError, match=r"damaged; `wm collect .*--repair`|not there; `wm collect"):
        run_stage(second, tracker, ["env=tiny"])
    run_stage(first, tracker, ["env=tiny"], repair=True)
    assert str(path.parent) in capsys.readouterr().out
    assert shards(first.folder) == before
    kept = {p: p.stat().st_mtime_ns for p in first.folder.glob("shard-*/frames.npy")}
    run_stage(first, tracker, ["env=tiny"], repair=True)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing is left to mend
    run_stage(second, tracker, ["env=tiny"])
    assert second.record["facts"]["frames"] > 0


def test_measurements_that_are_damaged_are_made_again_with_their_steps(tmp_path, tracker):
    def train(folder, inputs, run):
        steps = folder / CHECKPOINTS / "step=1.ckpt"
        if not steps.exists():  # else it has been trained, and measures nothing
            run.log_metrics({"loss": 1.0})
            steps.parent.mkdir(exist_ok=True)
            steps.write_text("weights")

    stage = Stage("vision", 1, {}, train, tmp_path)
    run_stage(stage, tracker)
    flip(stage.folder / "metrics.jsonl")
    run_stage(stage, tracker, repair=True)
    assert '"loss": 1.0' in (stage.folder / "metrics.jsonl").read_text().splitlines()[-2]


def test_a_stage_of_another_configuration_is_refused(collected, tracker):
    first, _ = collected
    manifest = (first.folder / DONE).read_text()
    (first.folder / DONE).write_text(manifest.replace(first.fingerprint, "0" * 64))
    with pytest.raises(WMError, match="another configuration; move it elsewhere"):
        run_stage(first, tracker)


def test_a_disk_without_place_for_latents_is_told_before_they_are_written(tmp_path, disk_full):
    folder = tmp_path / ".latents"
    folder.mkdir()
    with disk_full(10_000), pytest.raises(WMError, match=r"it needs 0\.4 MB and .* free"):
        new_array(folder / "mean.npy", 1000, 100)
    assert not folder.exists()


def test_latents_of_another_shape_are_refused(tmp_path):
    np.save(tmp_path / "mean.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "log_variance.npy", np.zeros((3, 3), np.float32))
    with pytest.raises(WMError, match="damaged"):
        Latents(tmp_path)


SMALL_DISK = """
set -e
mkdir -p made
mount -t tmpfs -o size=24m tmpfs made
wm() { "$PYTHON" -m wm "$@" env=tiny scale=smoke trainer.workers=1 runs=made; }
wm collect
if wm vision; then exit 90; fi
find made -name '.step*' -o -name '.shard*' -o -name '.vision.safe*' | grep . && exit 91
echo remounted
mount -o remount,size=400m made
wm vision
cp made/tiny/vision-*/vision.safetensors made/tiny/collect-*/shard-*/frames.npy .
"""


@pytest.fixture
def small_disk(own_folder):
    """The script in a name space of its own, where even users may mount."""
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount"]
    try:
        probe = "mkdir probe && mount -t tmpfs tmpfs probe"
        subprocess.run([*unshare, "sh", "-c", probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a small disk")
    return subprocess.run(
        [*unshare, "bash", "-c", SMALL_DISK],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on(small_disk, own_folder):
    assert small_disk.returncode == 0, small_disk.stdout + small_disk.stderr
    assert "No space left on device; it needs" in small_disk.stderr
    assert "free some disk and rerun" in small_disk.stderr
    assert "Traceback" not in small_disk.stderr
    assert "vision-0: finished" in small_disk.stdout.split("remounted")[1]
    assert (own_folder / "vision.safetensors").stat().st_size > 10**7
