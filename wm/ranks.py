"""Ranks: the processes that do one command together, on one machine or on many.

torchrun or srun starts them, and all run the same command. Rank 0 leads: it alone ends
stages, speaks and talks to MLflow; the others do their share of what is played (and write these
episodes), trained and evolved. All see the same runs folder.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

from wm import WMError
from wm.processes import end_with_parent

SECONDS_TO_END = 60  # that ranks have when they are told to

T = TypeVar("T")


def _place() -> tuple[int, int]:
    """Rank and number of ranks, as Lightning reads them from what torchrun or srun has set."""
    by_hand = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "SLURM_NTASKS" in os.environ and not by_hand:
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    return 0, 1


def rank() -> int:
    return _place()[0]


def world_size() -> int:
    return _place()[1]


def leads() -> bool:
    return rank() == 0


def gather(devices: int, nodes: int) -> None:
    """Be one of devices x nodes ranks; where nobody has started them, start them and do no more.

    Raises:
        WMError: if they are to be started on several machines, or others have been started.
    """
    wanted, there = devices * nodes, world_size()
    if there == 1 and nodes == 1 and devices > 1:
        _launch(devices)
    if there != wanted:
        raise WMError(
            f"trainer.devices={devices} and trainer.num_nodes={nodes} are {wanted} processes, and "
            f"{there} were started: start as many on every machine with torchrun or srun, as "
            "docs/cluster.md says"
        )
    if there > 1:
        end_with_parent(signal.SIGTERM)  # its launcher
    if not leads():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the process's end)


def _launch(processes: int) -> NoReturn:
    """Start this command again, once for each rank, by torchrun; end when and as they end."""
    from torch.distributed import run as torchrun  # slow to import, and seldom needed
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_END))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all on this machine
    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    try:
        torchrun.run(torchrun.parse_args([*options, "-m", "wm", *sys.argv[1:]]))
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        first, failure = failed.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            sys.exit(failure.exitcode)
        raise WMError(
            f"process {first} of {processes} was killed by signal {-failure.exitcode}, and the "
            "others were stopped; the same command goes on from here"
        ) from None
    sys.exit(0)


@contextmanager
def led(folder: Path) -> Iterator[None]:
    """Let the other ranks join the leader in a folder, as long as this lasts."""
    if world_size() > 1:
        _sign(folder).touch()
    try:
        yield
    finally:
        _sign(folder).unlink(missing_ok=True)


def is_led(folder: Path) -> bool:
    return _sign(folder).exists()


def _sign(folder: Path) -> Path:
    """A file of these ranks alone: others may work in the folder before them."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    names = ("MASTER_ADDR", "MASTER_PORT") if by_torchrun else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    return folder / "-".join([".led", *(os.environ.get(name, "") for name in names)])


def shares(folder: Path, items: Sequence[T]) -> Iterator[tuple[str, Sequence[T]]]:
    """This rank's share of some items, with a name; for the leader then those of all others.

    A share is locked while it is worked on, and a process that dies leaves its lock: so the leader
    waits for those at work, and does what others have left. What is done already is the caller's to
    see.
    """
    ranks = world_size()
    for number in range(ranks) if leads() else [rank()]:
        name = f".share-{number}-of-{ranks}"
        with FileLock(folder / f"{name}.lock"):
            yield name, items[number::ranks]


def rows(count: int) -> slice:
    """This rank's rows of a batch.

    Raises:
        WMError: if the ranks do not get equally many.
    """
    size, left = divmod(count, world_size())
    if left:
        raise WMError(
            f"a batch of {count} cannot be shared evenly by {world_size()} processes; choose "
            "another vision.batch, memory.batch or trainer.devices"
        )
    return slice(rank() * size, (rank() + 1) * size)


def summed(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, in training or evolution: where there is a process group."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def lost_rank(error: RuntimeError) -> bool:
    """Whether an exchange failed because another rank has ended: gloo has no class for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def averaged(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ranks' means of some numbers, for the record; all in one exchange."""
    if world_size() == 1:
        return values
    means = summed(torch.stack([value.detach() for value in values.values()])) / world_size()
    return dict(zip(values, means, strict=True))


def of_leader(tensor: Tensor) -> Tensor:
    """The leader's tensor: processors of two kinds may round the same computation differently."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor
