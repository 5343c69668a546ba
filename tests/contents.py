"""What folders are compared by."""

from wm.files import sha256


def hashes(folder, pattern="**/*"):
    """SHA-256 of the files of a folder, by their path within."""
    files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def shards(folder):
    """Those of a collection's episodes."""
    return hashes(folder, "shard-*/*")
