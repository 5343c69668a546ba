"""Durable files: a file with its right name is whole, and its hash says so."""

import hashlib
import os
import uuid
from pathlib import Path

from wm import WMError


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path within."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path) for path in files}


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
        raise WMError(f"cannot write {path}: {error.strerror}; free some disk and rerun") from error
    finally:
        partial.unlink(missing_ok=True)


def shipped(name: str) -> Path:
    """A folder that comes with the package: in it if installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name
