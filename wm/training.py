"""One way to train: Lightning's Trainer, short epochs, safe checkpoints, exact resume.

A run of N steps is cut into epochs of `epoch_steps`. Batches and noise depend on (seed, step) only
and checkpoints are written between epochs, so a run that was killed ends as if it had not been.
"""

import contextlib
import ctypes
import hashlib
import io
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from wm import WMError
from wm.config import ConfigError, bounded, one_line
from wm.files import sha256, write_atomically
from wm.ranks import leads, lost_rank, rank, rows, summed, world_size
from wm.stages import CHECKPOINTS

KEPT_CHECKPOINTS = 2
LONGEST_WAIT = timedelta(days=1)  # of a rank for the others
PARTS = {"state_dict", "optimizer_states", "callbacks", "loops"}  # of a checkpoint of Lightning
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
HARMLESS = (  # advice of Lightning that does not fit: batches are made whole, folders are resumed
    "does not have many workers",
    "exists and is not empty",
    "smaller than the logging interval",
    "treespec, LeafSpec",
    "recommended to use `self.log",  # ranks validate the same and log the same
)


@dataclass(frozen=True)
class TrainerConfig:
    """Where the work is done; no fingerprint covers it."""

    accelerator: str = "cpu"  # as everything was measured; gpu, or another that Lightning knows
    devices: int = bounded(1, 1)  # of each machine, with a process for each: see wm/ranks.py
    num_nodes: int = bounded(1, 1)  # machines
    workers: int = bounded(0, 0)  # processes that play and dream; 0: one for every core
    compile: bool = True  # the dream's step, where there is a C++ compiler


def require_accelerator(name: str) -> None:
    """Refuse before the games are played what Lightning would refuse after.

    Raises:
        ConfigError: if there is no such accelerator here.
    """
    if name == "cpu":
        return
    hush()
    try:
        L.Trainer(accelerator=name, logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise ConfigError(f"trainer.accelerator={name}: {one_line(error)}; cpu is there") from None


class Steps(Dataset):
    """Batch number -> batch, made by a function of (seed, step) alone."""

    def __init__(self, make_batch: Any, steps: range):
        self.make_batch, self.steps = make_batch, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Any:
        return self.make_batch(self.steps[number])


class StepsData(L.LightningDataModule):
    """Training batches by step number, and a fixed list of validation batches.

    Args:
        make_batch: step -> batch.
        validation: batches looked at between epochs.
    """

    def __init__(self, make_batch: Any, validation: list[Any], steps: int, epoch_steps: int):
        super().__init__()
        self.make_batch, self.validation = make_batch, validation
        self.steps, self.epoch_steps = steps, epoch_steps

    def train_dataloader(self) -> DataLoader:
        first = self.trainer.current_epoch * self.epoch_steps
        steps = range(first, min(first + self.epoch_steps, self.steps))
        return DataLoader(Steps(self.make_batch, steps), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, batch_size=None)


def fit(
    module: L.LightningModule,
    data: StepsData,
    folder: Path,
    config: TrainerConfig,
    loggers: list[Any],
    precision: str = "32-true",
    clip: float | None = None,
    log_every: int = 10,
    callbacks: list[Callback] | None = None,
) -> None:
    """Train to data.steps, from the newest valid checkpoint in the folder if there is one.

    Raises:
        WMError: when a loss, gradient or weight is not finite; the last checkpoint is. Or when
            another rank is gone.
    """
    keep_freed_memory()
    epochs = -(-data.steps // data.epoch_steps)
    checkpoint = ModelCheckpoint(
        folder / CHECKPOINTS,
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=KEPT_CHECKPOINTS,
        save_on_train_epoch_end=True,
        enable_version_counter=False,  # a damaged checkpoint is written anew, under its own name
    )
    hush()
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(module),
        precision=precision,
        max_epochs=epochs,
        gradient_clip_val=clip,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=min(log_every, data.epoch_steps),
        logger=loggers,
        callbacks=[
            *(callbacks or []),
            FiniteNumbers(),
            EndTogether(),
            Progress(data.steps),
            checkpoint,
        ],
        plugins=[SafeCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with plain_endings():
        trainer.fit(module, data, ckpt_path=newest_checkpoint(folder / CHECKPOINTS))
    if trainer.interrupted or trainer.global_step < data.steps:
        raise KeyboardInterrupt


def hush() -> None:
    """Without Lightning's lines on what it found and recommends."""
    for chatter in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(chatter).setLevel(logging.WARNING)


@contextlib.contextmanager
def plain_endings() -> Iterator[None]:
    """Without warnings that mean nothing here; Ctrl-C and lost ranks end it as what they are."""
    with warnings.catch_warnings():
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", message=f".*{harmless}.*")
        try:
            yield
        except SystemExit as end:  # Lightning turns Ctrl-C into exit(1)
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        except RuntimeError as error:
            if not lost_rank(error):
                raise
            raise WMError(
                f"another rank is gone ({one_line(error)}); the same command goes on from the last "
                "checkpoint"
            ) from None


def device(config: TrainerConfig) -> str:
    """Where this rank's frames are encoded and its dreams dreamt.

    On its CUDA device if that is asked for; else on the CPU, as everything that was measured.
    """
    if config.accelerator in ("gpu", "cuda") and torch.cuda.is_available():
        return f"cuda:{rank() % config.devices}"
    return "cpu"


def _strategy(module: L.LightningModule) -> Any:
    """How ranks are joined: gradients are averaged, and nothing is where there are none.

    One process group serves all trainings of a command, on CPUs and on GPUs. Ranks wait for long:
    while C practises in the game the leader works alone; one that has ended is seen at once.
    """
    if world_size() == 1:
        return "auto"
    learns = module.automatic_optimization and any(p.requires_grad for p in module.parameters())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    kind = DDPStrategy if learns else NoGradients
    return kind(process_group_backend=backend, timeout=LONGEST_WAIT)


class NoGradients(DDPStrategy):
    """For modules without gradients, which DDP refuses to wrap, or with steps of their own."""

    def configure_ddp(self) -> None:
        """The module stays as it is."""


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors, where it is the C library.

    By default it returns them to the system after every step, which zeroes their pages for the
    next one: a tenth of the time of V's step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole, with their hash beside them; a full disk spoils no older one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None):
        path, data = Path(path), io.BytesIO()
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (path.suffix, _hash_file(path).suffix):
            for partial in path.parent.glob(f".*{suffix}.*"):  # of a process killed amid this
                partial.unlink()
        torch.save(checkpoint, data)
        write_atomically(path, data.getvalue())
        write_atomically(_hash_file(path), hashlib.sha256(data.getvalue()).hexdigest())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True):
        """Tensors and plain values only, whatever the caller says: reading must run no code.

        Raises:
            WMError: if it is no checkpoint.
        """
        try:
            checkpoint = torch.load(path, map_location, weights_only=True)
            if missing := PARTS - set(checkpoint):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
        except Exception as error:  # of many classes
            reason = str(error).split("\n")[0][:200]
            raise WMError(f"{path} is no checkpoint ({reason}); delete it and rerun") from None
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        _hash_file(Path(path)).unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose hash agrees; damaged ones are passed over with a warning."""
    paths = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[-1]))
    for path in reversed(paths):
        digest = _hash_file(path)
        if digest.exists() and digest.read_bytes() == sha256(path).encode():
            return path
        warnings.warn(f"{path} is damaged; going back to the one before", stacklevel=2)
    return None


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


class FiniteNumbers(Callback):
    """Stops before a number that is not finite reaches the weights, or weights a checkpoint."""

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor):
        self._check(loss, "the loss", trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                self._check(parameter.grad, f"the gradient of {name}", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name, parameter in module.named_parameters():
            self._check(parameter, f"the weight {name}", trainer)

    def _check(self, tensor: Tensor, name: str, trainer: L.Trainer) -> None:
        if not tensor.isfinite().all():
            raise WMError(
                f"{name} is not finite at step {trainer.global_step}; the last checkpoint is "
                "sound: rerun; if this goes on, with a lower learning rate"
            )


class Busy(Callback):
    """Counts training batches as the stage's busy time; validation, logs and loading are not."""

    def __init__(self, run: Any):
        self.run = run

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock = self.run.busy()
        self.clock.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.__exit__(None, None, None)


class EndTogether(Callback):
    """A signal to one rank ends all of them after the same step.

    One that ended at once would leave the others waiting for it in the next exchange. Lightning's
    own handler exchanges amid whatever the others exchange, so this one is set after it.
    """

    def __init__(self):
        self.told, self.handlers = 0, {}

    def on_train_start(self, *args: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT) if world_size() > 1 else ():
            self.handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.told = number

    def on_train_batch_end(self, *args: Any) -> None:
        if summed(torch.tensor(self.told)):
            self._end()

    def on_fit_end(self, *args: Any) -> None:
        if self.told:  # after the last step
            self._end()

    def _end(self) -> None:
        sys.exit(128 + (self.told or signal.SIGTERM))

    def teardown(self, *args: Any, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Progress(Callback):
    """One bar over all steps, with the time that remains."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.bar = tqdm(
            total=self.steps,
            initial=trainer.global_step,
            desc=type(module).__name__,
            unit=getattr(module, "step_unit", "step"),
            disable=not leads(),
        )

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any):
        self.bar.update(trainer.global_step - self.bar.n)
        if self.bar.n % trainer.log_every_n_steps == 0:
            shown = {name: f"{value:.4g}" for name, value in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(shown, refresh=False)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def step_noise(seed: int, step: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise for this rank's rows of a batch, `shape`, in one training step.

    It is drawn for the whole batch and on the CPU: the same after a resume, on any number of ranks
    and on any device.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    whole = torch.randn(shape[0] * world_size(), *shape[1:], generator=generator)
    return whole[rows(len(whole))].to(device)
