"""A run that is killed in one stage after the other ends as one that nothing happened to."""

import os
import signal

import pytest

from wm.files import hashes
from wm.stages import CHECKPOINTS, DONE
from wm.tracking import read_metrics

WORDS = ["collect.episodes=40", "memory.steps=300", "controller.generations=4"]
KILLS = [  # a sign that a stage is at work, and what it gets
    ("collect-*/shard-*", signal.SIGKILL),  # amid the shards
    ("vision-*", signal.SIGTERM),  # amid the first epoch
    (f"memory-*/{CHECKPOINTS}/step=250.ckpt", signal.SIGKILL),  # amid the second epoch
    (f"controller-*/{CHECKPOINTS}/step=2.ckpt", signal.SIGTERM),  # amid a generation
    ("evaluate-*", signal.SIGKILL),
]
CODES = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}


@pytest.fixture(scope="module")
def straight(finish, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    code, output = finish(folder, "run", *WORDS)
    assert code == 0, output
    return folder / "made" / "tiny"


@pytest.fixture(scope="module")
def killed(start, wait_until, left, tmp_path_factory):
    """The folder of a run that was killed in every stage; what was seen after each kill."""
    folder, seen = tmp_path_factory.mktemp("killed"), []
    made = folder / "made" / "tiny"
    for sign, number in KILLS:
        process = start(folder, "run", *WORDS)
        wait_until(lambda sign=sign: list(made.glob(sign)), process)
        os.kill(process.pid, number)
        process.communicate(timeout=120)  # until its workers, who share its output, are gone too
        name = sign.split("-")[0]
        done = [path.parent.name for path in made.glob(f"{name}-*/{DONE}")]
        seen.append((process.returncode, done, left(process.pid)))
    return made, seen


def test_a_killed_stage_is_not_done_and_leaves_no_process(killed):
    for (sign, number), (code, done, alone) in zip(KILLS, killed[1], strict=True):
        assert code == CODES[number], sign
        assert done == [], sign
        assert alone == [], sign


def test_after_five_kills_the_same_command_ends_bit_equal(killed, straight, finish):
    made, _ = killed
    code, output = finish(made.parents[1], "run", *WORDS)
    assert code == 0, output
    (expected,) = straight.glob("collect-0-*")
    shards = {name: h for name, h in hashes(expected).items() if name.startswith("shard")}
    assert len(shards) == 40  # four files of ten shards
    assert shards.items() <= hashes(made / expected.name).items()
    for name in (
        *("vision-0-*/vision.safetensors", "vision-0-*/latents/mean.npy"),
        *("memory-0-*/memory.safetensors", "controller-0-*/controllers.safetensors"),
        *("controller-0-*/agent/starts.safetensors", "evaluate-*/episodes.csv"),
    ):
        (path,) = straight.glob(name)
        assert (made / path.relative_to(straight)).read_bytes() == path.read_bytes(), name
    (controller,) = straight.glob("controller-0-*")
    assert fitness(made / controller.name) == fitness(controller)


def fitness(folder):
    """Sigma and fitness of all generations, and the scores between them."""
    metrics = read_metrics(folder)
    assert len(metrics["controller/sigma"]) == 4
    return {name: values for name, values in metrics.items() if name.startswith("controller/")}
