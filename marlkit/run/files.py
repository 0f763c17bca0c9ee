"""Writing whole files: a reader, also after a kill or on a full disk, finds the old file or the new one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from marlkit.errors import writing


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, and its folder if needed, under another name first.

    Raises:
        WriteError: it cannot be written; what was there before is unchanged.
    """
    path = Path(path)
    partial = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def partial_path(path: Path) -> Path:
    """Where a file is written before it is renamed to ``path``: a name of this process alone, in the same folder."""
    return path.with_name(f".{path.name[:100]}.{socket.gethostname()[:64]}-{os.getpid()}.partial")


def refuse_unwritable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written, before the work that it is to hold.

    Raises:
        WriteError: it cannot.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
        # The file is replaced, so that its folder has to be writable too.
        partial = partial_path(path)
        partial.touch()
        partial.unlink()


def sync_folder(folder: Path) -> None:
    """Flush to the disk which files a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
