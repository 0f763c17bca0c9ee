"""Settings of all tests."""

from __future__ import annotations

import os
import tempfile

import torch

# The tensors of the tests are tiny: the synchronisation of threads would only cost time.
torch.set_num_threads(1)
# What tests trust is not remembered for the person who runs them.
_configuration = tempfile.TemporaryDirectory()
os.environ["XDG_CONFIG_HOME"] = _configuration.name
