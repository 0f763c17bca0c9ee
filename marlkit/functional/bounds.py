"""Bounds of actions, and of what is learnt, with a way back inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def executed(action: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """``min(max(a, low), high)``: a continuous action as an environment executes it.

    Args:
        action: ``[*, N, D]``, in the units of the environment.
        low: ``[N, D]``; ``None``: unbounded.
        high: likewise.

    Returns:
        ``[*, N, D]``.
    """
    return action if low is None and high is None else action.clamp(low, high)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = (low, high)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high), gradient = ctx.saved_tensors, ctx.bounds, gradients[0]
        outwards = ((x < low) & (gradient > 0)) | ((x > high) & (gradient < 0))
        return gradient.masked_fill(outwards, 0.0), None, None


def bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``min(max(x, low), high)`` whose gradient is zero only where a step of descent would lead further out.

    The gradient of a plain clamp is zero beyond its bounds, so that what has once left them stays where it is. Here it is that of
    the identity for every ``x`` that descent moves inwards: ``x > high`` with a gradient of at least zero, ``x < low`` with one
    of at most zero.

    Args:
        x: ``[*]``, in the units of the bounds.
        low: the lower bound.
        high: the upper bound.

    Returns:
        ``[*]``, in ``[low, high]``.
    """
    result: Tensor = _Bounded.apply(x, low, high)
    return result
