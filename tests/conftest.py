"""Settings of all tests."""

from __future__ import annotations

import torch

# The tensors of the tests are tiny: the synchronisation of threads would only cost time.
torch.set_num_threads(1)
