"""Settings of the process for memory that every gradient step frees and allocates again."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep large blocks that it frees, instead of returning them to the system; whether that was possible.

    By default the GNU C library returns every block of several megabytes to the system, which clears its pages before it
    allocates them again: for the intermediate results of a large minibatch that takes a sixth of the update. The cost is that the
    process holds its peak memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


@contextmanager
def spared_from_collection() -> Iterator[None]:
    """Exclude the objects that exist now from Python's garbage collection within the block.

    The collector would traverse all modules and components repeatedly, which for small steps takes a tenth of an iteration.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
