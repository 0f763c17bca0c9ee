"""Numbers that change linearly over the training."""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def linear(start: float, end: float | None, progress: float) -> float: ...
@overload
def linear(start: float, end: float | None, progress: float | Tensor) -> float | Tensor: ...
def linear(start: float, end: float | None, progress: float | Tensor) -> float | Tensor:
    """``start + (end - start) progress``; ``start`` where ``end`` is ``None``.

    Args:
        start: value at the start of the training.
        end: value at its end.
        progress: share of the training that is done, in [0, 1]; a number or a scalar tensor ``[]``.

    Returns:
        A number, or a scalar tensor ``[]`` where ``progress`` is one and ``end`` is not ``None``.
    """
    return start if end is None else start + (end - start) * progress
