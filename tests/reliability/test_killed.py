"""A run that is killed in one stage after the other ends as one that nothing happened to."""

import signal

import pytest
from contents import shards

from wm.stages import CHECKPOINTS, DONE
from wm.tracking import read_metrics

WORDS = ["collect.episodes=40", "memory.steps=300", "controller.generations=4"]
SIGNS = [  # that a stage is at work
    "collect-*/shard-*",  # amid the shards
    "vision-*",  # amid the first epoch
    f"memory-*/{CHECKPOINTS}/step=250.ckpt",  # amid the second epoch
    f"controller-*/{CHECKPOINTS}/step=2.ckpt",  # amid a generation
    "evaluate-*",
]
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}


@pytest.fixture(scope="module")
def straight(finish, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    code, output = finish(folder, "run", *WORDS)
    assert code == 0, output
    return folder / "made" / "tiny"


@pytest.fixture(scope="module", params=[0, 1], ids=["SIGKILL first", "SIGTERM first"])
def killed(request, tmp_path_factory):
    """The folder of a run that is killed in every stage in turn, and by which signal in which."""
    turns = list(CODES)[request.param :] + list(CODES)[: request.param]
    return tmp_path_factory.mktemp("killed"), dict(zip(SIGNS, turns * len(SIGNS), strict=False))


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: sign.split("-")[0])
def test_a_killed_stage_is_not_done_and_leaves_no_process(sign, killed, start, wait_until, left):
    folder, numbers = killed
    made = folder / "made" / "tiny"
    process = start(folder, "run", *WORDS)
    wait_until(lambda: list(made.glob(sign)), process)
    process.send_signal(numbers[sign])
    process.communicate(timeout=120)  # until its workers, who share its output, are gone too
    assert process.returncode == CODES[numbers[sign]]
    assert not list(made.glob(f"{sign.split('-')[0]}-*/{DONE}"))
    assert left(process.pid) == []


def test_after_five_kills_the_same_command_ends_bit_equal(killed, straight, finish):
    folder, _ = killed
    made = folder / "made" / "tiny"
    code, output = finish(folder, "run", *WORDS)
    assert code == 0, output
    (expected,) = straight.glob("collect-0-*")
    assert len(shards(expected)) == 40  # four files of ten shards
    assert shards(expected) == shards(made / expected.name)
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
