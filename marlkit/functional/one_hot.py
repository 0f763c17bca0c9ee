"""One-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``[*]`` int64 in 0 to ``count - 1`` to ``[*, count]``.

    ``torch.nn.functional.one_hot`` checks the values first, which synchronises with a GPU.
    """
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).to(dtype)
