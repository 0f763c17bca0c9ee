"""Settings of all tests."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter

import pytest
import torch

# The tensors of the tests are tiny: the synchronisation of threads would only cost time.
torch.set_num_threads(1)
# What tests trust is not remembered for the person who runs them.
_configuration = tempfile.TemporaryDirectory()
os.environ["XDG_CONFIG_HOME"] = _configuration.name
# Where tests run in the background, a shell has Ctrl-C ignored, and whatever they start would ignore it too.
for _signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, signal.default_int_handler if _signum == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many: no process is left alone with a long file at the end."""
    size = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -size[item.path], str(item.path)))
