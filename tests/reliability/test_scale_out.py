"""Two ranks end like one process, also if one is lost amid the work or the others go on alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from contents import shards
from safetensors.torch import load_file

from wm.stages import CHECKPOINTS, DONE
from wm.tracking import read_metrics

SMOKE = ["env=tiny", "scale=smoke", "trainer.workers=1", "runs=made", "collect.episodes=8"]
WORDS = [*SMOKE, "vision.precision=32-true", "memory.precision=32-true", "memory.steps=300"]
WORDS += ["controller.generations=4"]
MINE = {key: os.environ[key] for key in os.environ if key != "MLFLOW_TRACKING_URI"}


def start(folder, *command, **environment):
    """A Python module as a process, from `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**MINE, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process):
    """Its exit code and its output."""
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def alive(folder, seconds=20):
    """The processes that run from a folder, and still do after some seconds."""
    deadline = time.time() + seconds
    while (found := running(folder)) and time.time() < deadline:
        time.sleep(0.2)
    return found


def running(folder):
    """The ranks, or None, of a folder's processes, by process."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder and (process / "cmdline").read_bytes():
                words = (process / "environ").read_bytes().split(b"\0")
                rank = next((int(w[5:]) for w in words if w.startswith(b"RANK=")), None)
                found[int(process.name)] = rank
        except OSError:
            continue  # it ended while we looked
    return found


def leader_of(folder, rank):
    """The process of a rank: the first, which has started all others of that rank."""
    return min(process for process, its in running(folder).items() if its == rank)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The pipeline in one process."""
    folder = tmp_path_factory.mktemp("straight")
    code, output = ended(start(folder, "wm", "run", *WORDS))
    assert code == 0, output
    return folder / "made" / "tiny"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory, free_port):
    """The pipeline on two `machines` with a rank each."""
    folder = tmp_path_factory.mktemp("hosts")
    meeting = [f"--rdzv-endpoint=127.0.0.1:{free_port}", "--rdzv-backend=c10d", "--rdzv-id=7"]
    torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting]
    command = [*torchrun, "-m", "wm", "run", *WORDS, "trainer.num_nodes=2"]
    processes = [start(folder, *command) for _ in range(2)]
    with ThreadPoolExecutor() as readers:  # of both at once: a full pipe would hold up its writer
        for code, output in readers.map(ended, processes):
            assert code == 0, output
    return folder / "made" / "tiny"


def one(root, pattern):
    (path,) = root.glob(pattern)
    return path


def test_two_hosts_collect_and_score_the_same_and_train_the_same_up_to_rounding(hosts, straight):
    assert shards(one(hosts, "collect-*")) == shards(one(straight, "collect-*"))
    scores = "baseline-*/episodes.csv"
    assert one(hosts, scores).read_bytes() == one(straight, scores).read_bytes()
    for name in ("vision-*/vision.safetensors", "memory-*/memory.safetensors"):
        together, alone = load_file(one(hosts, name)), load_file(one(straight, name))
        for key in alone:
            torch.testing.assert_close(together[key], alone[key], rtol=1e-3, atol=1e-4)
    assert (one(hosts, "report-*") / DONE).is_file()


@pytest.mark.parametrize(
    ("stage", "sign", "ranks", "whom", "number", "later"),
    [
        ("memory", "step=250.ckpt", 2, 1, signal.SIGTERM, 2),
        ("controller", "step=2.ckpt", 2, 1, signal.SIGKILL, 2),
        ("controller", "step=2.ckpt", 2, None, signal.SIGKILL, 1),
        ("controller", "step=2.ckpt", 1, None, signal.SIGTERM, 2),
    ],
)
def test_a_stage_stopped_on_some_ranks_goes_on_with_others_to_the_same_result(
    hosts, wait_until, tmp_path, stage, sign, ranks, whom, number, later
):
    shutil.copytree(hosts.parent, tmp_path / "made")
    made = tmp_path / "made" / "tiny"
    folder = one(made, f"{stage}-*")
    shutil.rmtree(folder)

    process = start(tmp_path, "wm", stage, *WORDS, f"trainer.devices={ranks}")
    wait_until((folder / CHECKPOINTS / sign).exists, process)
    os.kill(process.pid if whom is None else leader_of(tmp_path, whom), number)
    code, output = ended(process)
    if number == signal.SIGTERM:
        assert code == 128 + number, output
    elif whom is None:
        assert code == -number
    else:
        assert code == 2, output
        assert "the same command goes on" in output
    assert alive(tmp_path) == {}
    assert not (folder / DONE).exists()

    code, output = ended(start(tmp_path, "wm", stage, *WORDS, f"trainer.devices={later}"))
    assert code == 0, output
    straight = hosts / folder.name
    for path in straight.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert history(folder) == history(straight)


def history(folder):
    """What was measured, but for times and what a step shows of the run's own pace."""
    metrics = read_metrics(folder)
    return {n: v for n, v in metrics.items() if n.startswith(("controller/", "memory/val"))}


def test_a_lost_rank_of_collect_stalls_nobody(hosts, wait_until, tmp_path):
    ranks = [
        start(
            tmp_path,
            *("wm", "collect", *WORDS, "trainer.num_nodes=2"),
            **{"SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_JOB_NAME": "wm"},
        )
        for rank in (0, 1)
    ]
    folder = tmp_path / "made" / "tiny" / one(hosts, "collect-*").name
    wait_until((folder / ".share-1-of-2.lock").exists, ranks[1])
    ranks[1].kill()
    code, output = ended(ranks[0])
    assert code == 0, output
    assert ended(ranks[1])[0] == -signal.SIGKILL
    assert shards(folder) == shards(one(hosts, "collect-*"))
