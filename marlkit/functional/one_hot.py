"""One-hot vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``[*]`` int64 in 0 to ``count - 1`` to ``[*, count]``.

    Torch's own looks at the values first, for which a GPU has to be waited for.
    """
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).to(dtype)
