"""Every collected frame as a latent: V encodes it once, for M, starts of dreams and pictures."""

import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wm.data import Latents
from wm.episodes import EpisodeStore
from wm.files import cannot_write
from wm.worldmodels.vae import ConvVAE, encode_frames

ENCODE_BATCH = 500


def encode_store(
    vision: ConvVAE, store: EpisodeStore, folder: Path, known: Latents | None = None
) -> None:
    """Mean and log-variance of every frame of a store, in its order, as two .npy files.

    known: those of the first frames, if this V has seen them before.
    """
    partial_folder = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    shape = (store.total_frames, vision.config.latent)
    names = ("mean", "log_variance")
    arrays = [new_array(partial_folder / f"{name}.npy", *shape) for name in names]
    first = 0
    if known is not None:
        first = len(known.mean)
        for array, name in zip(arrays, names, strict=True):
            array[:first] = getattr(known, name)
    starts = range(first, store.total_frames, ENCODE_BATCH)
    for first in tqdm(starts, "encode", unit="batch"):
        numbers = np.arange(first, min(first + ENCODE_BATCH, store.total_frames))
        encoded = encode_frames(vision, store.frames(numbers))
        for array, part in zip(arrays, encoded, strict=True):
            array[numbers] = part
    for array in arrays:
        array.flush()
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut before it was done
    os.replace(partial_folder, folder)


def new_array(path: Path, rows: int, columns: int) -> np.ndarray:
    """A .npy file to be filled, with its whole place on the disk: to write to a map of a file for
    which there is no place kills the process.
    """
    try:
        array = np.lib.format.open_memmap(path, "w+", np.float32, (rows, columns))
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        shutil.rmtree(path.parent)
        raise cannot_write(path.parent, 4 * rows * columns, error) from error
    return array
