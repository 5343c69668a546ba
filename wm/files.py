"""Durable files: a file with its right name is whole, and its hash says so.

What is read may come from a stranger or a failing disk: readers here check before they believe.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np

from wm import WMError

LARGEST_TEXT = 2**25  # bytes of a manifest or a configuration: far more than any of ours


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a manifest names.

    Raises:
        WMError: if it leads out of the folder, by dots, from the root or through a link.
    """
    path = folder / name
    with suppress(OSError, ValueError, RuntimeError):  # a name too long, a link to itself
        path.exists()
        if path.resolve().is_relative_to(folder.resolve()):
            return path
    raise WMError(f"{folder} names the file '{name[:200]}', which leads out of it; do not use it")


def read_text(path: Path) -> str:
    """The text of a small file.

    Raises:
        OSError, ValueError: if there is none, or it is too large or no text.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file, but a folder or a device")
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"it is larger than {LARGEST_TEXT >> 20} MB")
    return path.read_text()


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError, ValueError: if it cannot be read or is none.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_kinds(record: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Refuse a record whose fields are of other kinds.

    Raises:
        KeyError, TypeError: naming the first that is missing or another.
    """
    for name, kind in kinds.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} is {record[name]!r:.50}")


def read_array(path: Path, dtype: type, *shape: int | None) -> np.ndarray:
    """A .npy file, memory-mapped, so that its header cannot ask for more memory than it is long.

    Args:
        shape: of the array; None where any length will do.

    Raises:
        OSError, ValueError: if it cannot be read or is something else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the parser's of the header, of many classes
        raise ValueError(f"{path.name} has no header: {type(error).__name__}") from None
    holds = getattr(array, "dtype", None), getattr(array, "shape", ())
    agree = len(holds[1]) == len(shape) and all(
        n in (None, m) for n, m in zip(shape, holds[1], strict=True)
    )
    if not isinstance(array, np.ndarray) or holds[0] != dtype or not agree:
        raise ValueError(f"{path.name} holds {holds[0]} {holds[1]}, not {dtype.__name__} {shape}")
    return array


def cannot_write(path: Path, need: int, error: Exception) -> WMError:
    """What to say when `need` bytes did not go to a path; a full disk is named with its space."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, OSError) and error.errno not in (None, ENOSPC, EDQUOT, EFBIG):
        return WMError(f"cannot write {path}: {reason}")
    free = shutil.disk_usage(folder).free
    return WMError(
        f"cannot write {path}: {reason}; it needs {size(need)} and {folder} has {size(free)} "
        "free; free some disk and rerun: the same command goes on from here"
    )


def size(count: float) -> str:
    """Bytes, as people read them."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the target, sync, then rename: readers see the old file or the new one.

    Raises:
        WMError: if the disk is full or not writable; the old file stands.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # before the space is measured
        raise cannot_write(path, len(data), error) from error
    finally:
        partial.unlink(missing_ok=True)


def shipped(name: str) -> Path:
    """A folder that comes with the package: in it if installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name
