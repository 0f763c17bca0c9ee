"""Numbers that change linearly over the training."""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def linear(start: float, end: float | None, progress: float) -> float: ...
@overload
def linear(start: float, end: float | None, progress: float | Tensor) -> float | Tensor: ...
def linear(start: float, end: float | None, progress: float | Tensor) -> float | Tensor:
    """``start + (end - start) progress`` for the share ``progress`` of the training that is done; ``end`` ``None``: ``start``."""
    return start if end is None else start + (end - start) * progress
