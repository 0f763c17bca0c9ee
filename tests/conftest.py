"""Settings of all tests."""

from __future__ import annotations

import os
import signal
import tempfile

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
