"""Training: exact after an interruption, never poisoned by a NaN, safe on a full disk."""

import os
import platform
import subprocess
import sys

import lightning as L
import pytest
import torch
from torch import nn

from wm import WMError
from wm.stages import CHECKPOINTS
from wm.tracking import LocalRecord, read_metrics
from wm.training import (
    PARTS,
    SafeCheckpointIO,
    StepsData,
    TrainerConfig,
    device,
    fit,
    newest_checkpoint,
    step_noise,
)

STEPS, EPOCH = 17, 5  # the last epoch is a short one
CPU = TrainerConfig(accelerator="cpu")


class Interruption(Exception):
    pass


class LinearRegression(L.LightningModule):
    """Learns with noise of its own and an optimizer with a memory; may be stopped at a step."""

    def __init__(self, stop_at=None, stop=Interruption, loss_at=None, inputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(inputs, inputs)
        self.stop_at, self.stop, self.loss_at, self.seen = stop_at, stop, loss_at or {}, []

    def training_step(self, batch, number):
        if self.global_step == self.stop_at:
            raise self.stop
        self.seen.append(self.global_step)
        noise = step_noise(0, self.global_step, batch.shape, batch.device)
        loss = (self.line(batch + 0.1 * noise) - 2 * batch).square().mean()
        self.log("loss", loss)
        return loss * self.loss_at.get(self.global_step, 1.0)

    def validation_step(self, batch, number):
        self.log("val_loss", (self.line(batch) - 2 * batch).square().mean(), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(folder, *, steps=STEPS, **options):
    module, inputs = LinearRegression(**options), options.get("inputs", 3)

    def batch(step):
        return torch.randn(4, inputs, generator=torch.Generator().manual_seed(step))

    folder.mkdir(exist_ok=True)
    try:
        fit(module, StepsData(batch, [batch(-1)], steps, EPOCH), folder, CPU, [LocalRecord(folder)])
    finally:
        train.module = module  # for those that are stopped
    return module


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def checkpoints(folder):
    return sorted(path.name for path in (folder / CHECKPOINTS).iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A training that nothing happened to: its folder, and its module."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(folder)


@pytest.fixture
def trained(tmp_path):
    """The folder of a training like it, to be damaged."""
    train(tmp_path / "trained")
    return tmp_path / "trained"


def test_every_step_is_made_once_and_changes_the_weights(straight):
    folder, module = straight
    assert module.seen == list(range(STEPS))
    assert (weights(module) != weights(LinearRegression())).all()
    assert list(read_metrics(folder)["val_loss"]) == [4, 9, 14, 16]  # after every epoch


@pytest.mark.parametrize(
    "stop_at, resumes_from",
    [(2, 0), (EPOCH, EPOCH), (7, 5), (12, 10), (STEPS - 1, 15)],
    ids=["before a checkpoint", "at an epoch's start", "second epoch", "third", "the last step"],
)
def test_an_interrupted_training_ends_bit_equal_to_an_uninterrupted_one(
    stop_at, resumes_from, straight, tmp_path
):
    with pytest.raises(Interruption):
        train(tmp_path, stop_at=stop_at)
    resumed = train(tmp_path)
    assert resumed.seen == list(range(resumes_from, STEPS))
    assert torch.equal(weights(resumed), weights(straight[1]))
    assert read_metrics(tmp_path)["val_loss"] == read_metrics(straight[0])["val_loss"]


def test_three_interruptions_do_no_more_than_one(straight, tmp_path):
    for stop_at in (3, 8, 16):
        with pytest.raises(Interruption):
            train(tmp_path, stop_at=stop_at)
    assert torch.equal(weights(train(tmp_path)), weights(straight[1]))


def test_a_finished_training_is_not_continued(straight, trained):
    again = train(trained)
    assert again.seen == []
    assert torch.equal(weights(again), weights(straight[1]))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_by_the_user_is_passed_on_as_it_is(stop, tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)) as raised:
        train(tmp_path, stop_at=7, stop=stop)
    assert raised.type is stop  # the command line answers each with an exit code of its own
    assert checkpoints(tmp_path) == ["step=5.ckpt", "step=5.sha256"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_reaches_no_weight(value, straight, tmp_path):
    with pytest.raises(WMError, match=r"the loss is not finite at step 7.*rerun"):
        train(tmp_path, loss_at={7: value})
    assert weights(train.module).isfinite().all()
    newest = newest_checkpoint(tmp_path / CHECKPOINTS)
    assert newest.name == "step=5.ckpt"
    saved = torch.load(newest, weights_only=True)["state_dict"].values()
    assert all(tensor.isfinite().all() for tensor in saved)
    assert torch.equal(weights(train(tmp_path)), weights(straight[1]))


def test_the_two_newest_checkpoints_are_kept_with_their_hashes(straight):
    expected = [f"step={step}.{end}" for step in (15, 17) for end in ("ckpt", "sha256")]
    assert checkpoints(straight[0]) == expected


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, 1000),
        lambda path: os.truncate(path, 0),
        lambda path: path.with_suffix(".sha256").unlink(),  # killed between the two files
    ],
    ids=["one bit", "cut", "empty", "no hash"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, straight, trained):
    damage(trained / CHECKPOINTS / f"step={STEPS}.ckpt")
    with pytest.warns(UserWarning, match=f"step={STEPS}.ckpt is damaged; going back"):
        resumed = train(trained)
    assert resumed.seen == [15, 16]
    assert torch.equal(weights(resumed), weights(straight[1]))
    assert newest_checkpoint(trained / CHECKPOINTS).name == f"step={STEPS}.ckpt"  # sound again


def test_with_no_sound_checkpoint_training_begins_anew(straight, trained):
    for path in (trained / CHECKPOINTS).glob("*.ckpt"):
        flip(path)
    with pytest.warns(UserWarning, match="is damaged"):
        resumed = train(trained)
    assert resumed.seen == list(range(STEPS))
    assert torch.equal(weights(resumed), weights(straight[1]))


def test_newer_steps_are_newer_whatever_their_digits(trained):
    folder = trained / CHECKPOINTS
    for path in [*folder.iterdir()]:
        path.rename(folder / path.name.replace("step=15", "step=9"))
    assert newest_checkpoint(folder).name == f"step={STEPS}.ckpt"
    assert newest_checkpoint(folder / "nowhere") is None


def test_a_full_disk_leaves_the_older_checkpoints_sound(tmp_path, disk_full):
    large = {"inputs": 300}  # a checkpoint of a megabyte
    train(tmp_path / "room", **large)
    with pytest.raises(Interruption):
        train(tmp_path, stop_at=12, **large)
    before = checkpoints(tmp_path)
    with disk_full(300_000), pytest.raises(WMError, match=r"cannot write .*free some disk"):
        train(tmp_path, **large)
    assert checkpoints(tmp_path) == before  # no partial file either
    assert newest_checkpoint(tmp_path / CHECKPOINTS).name == "step=10.ckpt"
    assert torch.equal(
        weights(train(tmp_path, **large)), weights(train(tmp_path / "room", **large))
    )


def test_a_removed_checkpoint_takes_its_hash_along(tmp_path):
    files = SafeCheckpointIO()
    whole = {part: {} for part in PARTS} | {"state_dict": {"weights": torch.ones(3)}}
    files.save_checkpoint(whole, tmp_path / "deep" / "step=1.ckpt")
    read = files.load_checkpoint(tmp_path / "deep" / "step=1.ckpt")
    assert read["state_dict"]["weights"].sum() == 3
    files.remove_checkpoint(tmp_path / "deep" / "step=1.ckpt")
    assert os.listdir(tmp_path / "deep") == []


def test_saving_clears_what_a_killed_save_left_and_nothing_else(tmp_path):
    folder = tmp_path / "deep"
    folder.mkdir()
    for name in (".step=1.ckpt.0123abcd", ".run.json"):
        (folder / name).write_text("{}")
    SafeCheckpointIO().save_checkpoint({}, folder / "step=2.ckpt")
    assert sorted(os.listdir(folder)) == [".run.json", "step=2.ckpt", "step=2.sha256"]


def test_noise_depends_on_seed_and_step_alone():
    def draw(seed, step):
        return step_noise(seed, step, [3], torch.device("cpu")).tolist()

    torch.rand(5)
    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, step)) for seed in range(4) for step in range(50)}) == 200


@pytest.mark.parametrize(
    ("accelerator", "there", "where"),
    [("gpu", True, "cuda:1"), ("gpu", False, "cpu"), ("auto", True, "cpu"), ("cpu", True, "cpu")],
)
def test_ranks_dream_on_their_own_gpu_only_if_that_is_asked_for(
    monkeypatch, as_rank, accelerator, there, where
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    as_rank(3, 4)  # the second on the second machine
    assert device(TrainerConfig(accelerator=accelerator, devices=2, num_nodes=2)) == where


def test_the_ranks_noise_is_that_of_one_process(as_rank):
    whole = step_noise(1, 2, (6, 4), torch.device("cpu"))
    parts = []
    for rank in range(3):
        as_rank(rank, 3)
        parts.append(step_noise(1, 2, (2, 4), torch.device("cpu")))
    assert torch.equal(torch.cat(parts), whole)


FAULTS = """
import resource, torch
from wm.training import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for turn in range(10):
        tensors = [torch.ones(2**22) for _ in range(8)]  # of 16 MB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

lost = faults()
keep_freed_memory()
faults()
print(lost, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again_without_asking_the_system():
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    output = subprocess.check_output([sys.executable, "-c", FAULTS], env=environment)
    lost, kept = map(int, output.split())
    assert kept < lost / 10
