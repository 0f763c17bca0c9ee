"""Memory that a process keeps, counted in the pages that the system allocated."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from marlkit.run.process import spared_from_collection

PAGES_OF_TEN_BLOCKS = """
import resource, torch
from marlkit.run.process import keep_freed_memory
kept = {call}
block = 2**24
torch.ones(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(block)
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (4 * block))
"""


def blocks_handed_out(call: str) -> tuple[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", PAGES_OF_TEN_BLOCKS.format(call=call)], capture_output=True, text=True, check=True
    )
    kept, blocks = done.stdout.split()
    return kept, float(blocks)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the GNU C library")
def test_freed_blocks_are_used_again() -> None:
    kept, blocks = blocks_handed_out("keep_freed_memory()")
    if kept == "False":
        pytest.skip("of the GNU C library")
    assert blocks < 3
    # Why it is needed: by default the system allocates new pages for each of the ten.
    _, by_default = blocks_handed_out("None")
    assert by_default > blocks


class Knot:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_existing_objects_are_excluded_until_the_end_also_after_an_error() -> None:
    knot = Knot()
    reference = weakref.ref(knot)

    def interrupted(knots: list[Knot]) -> None:
        with spared_from_collection():
            knots.clear()
            gc.collect()
            assert reference() is not None
            raise KeyboardInterrupt

    knots = [knot]
    del knot
    with pytest.raises(KeyboardInterrupt):
        interrupted(knots)
    gc.collect()
    assert reference() is None
