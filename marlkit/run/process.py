"""Memory that is freed and wanted again at once, as in every step of gradient descent."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep large blocks that it frees, instead of giving them back to the system; whether that was possible.

    By default the GNU C library returns every block of some megabytes to the system, which has to clear its pages before it hands
    them out again: for the intermediate results of a large minibatch that takes a sixth of the update. In return the process
    holds what it once needed until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


@contextmanager
def spared_from_collection() -> Iterator[None]:
    """Meanwhile Python's garbage collector leaves alone what is there now.

    It would walk over all modules and components again and again, which for small steps takes a tenth of an iteration.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
