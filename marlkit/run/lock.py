"""One process at a time trains in a run folder."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from marlkit.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run within the block, and remove the partial files of processes that were killed.

    The lock is the system's (``flock``) on the file ``.lock``, which names the holder: it ends with the process, however that
    ends. A file system without such locks, as some that are shared by network, gets a file that exists while the lock is held;
    what a killed process left there is overridden on the same machine, and named on another.

    Raises:
        RunError: another process trains in this folder, or no file can be written there.
    """
    path = folder / LOCK
    if path.exists() and not path.is_file():
        raise RunError(f"{path}: is no file, so that the run cannot be locked against other processes. Remove it.")
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder}: nothing can be written there ({error.strerror}). Make it writable, or use a copy.") from error
    with file:
        locked = _take(file, path)
        try:
            file.seek(0)
            file.truncate()
            file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "began": _began(os.getpid())}))
            file.flush()
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror}).") from error
        for partial in (*folder.glob(".*.partial"), *folder.glob("*/.*.partial")):
            partial.unlink(missing_ok=True)
        try:
            yield
        finally:
            # Emptied, not removed: another process may have opened it by now.
            with suppress(OSError):
                file.truncate(0)
            if locked:
                fcntl.flock(file, fcntl.LOCK_UN)


def _take(file: IO[str], path: Path) -> bool:
    """Take the lock; whether it is the system's."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise _held(path, _holder(file)) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise RunError(f"{path}: cannot be locked ({error.strerror}).") from error
    holder = _holder(file)
    if holder and not _is_gone(holder):
        raise _held(path, holder)
    return False


def _holder(file: IO[str]) -> dict[str, Any]:
    """Who holds the lock; empty where nobody does, or where that cannot be read."""
    file.seek(0)
    try:
        held = json.loads(file.read())
        return {"process": int(held["process"]), "host": str(held["host"]), "began": str(held["began"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _held(path: Path, holder: dict[str, Any]) -> RunError:
    run, process, host = path.parent, holder.get("process", "unknown"), holder.get("host", "")
    here = host in ("", socket.gethostname())
    if process == os.getpid() and here:
        return RunError(f"{run}: is being trained by this very process. Let that end first.")
    where = "" if here else f" on {host}"
    end = f"end it there (`kill {process}`: it saves first)" if isinstance(process, int) else "end it"
    if here or fcntl is None:
        return RunError(f"{run}: is being trained by process {process}{where}. Let it finish or {end}, then resume again.")
    return RunError(
        f"{run}: is being trained by process {process}{where}. Let it finish or {end}, then resume again. If it does not run any "
        f"more, remove {path}."
    )


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder on this machine has ended; one on another machine cannot be asked."""
    if holder["host"] != socket.gethostname():
        return False
    return _began(holder["process"]) != holder["began"] if Path("/proc/self").exists() else not _exists(holder["process"])


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _began(process: int) -> str:
    """When a process began, since its number may be given out again; empty where the system does not tell."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
