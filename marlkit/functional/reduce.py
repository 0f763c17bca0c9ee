"""Weighted reductions, which leave out entries of weight zero.

A weight of zero (a padded step, a dead agent) removes an entry entirely: its value, even if infinite or NaN, changes neither the
result nor any gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def masked_mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted mean ``sum(w * x) / max(sum(w), 1)``; without a weight the plain mean.

    Zero if all weights are zero. Entries of weight zero receive a gradient of exactly zero.

    Args:
        x: ``[*]``, any shape.
        weight: ``[*]``, bool or non-negative float, of as many dimensions as ``x`` and broadcastable to it (and summed after
            broadcasting); ``None``: all entries count.

    Returns:
        Scalar ``[]``.

    Raises:
        ValueError: ``weight`` does not broadcast to ``x``.
    """
    if weight is None:
        return x.mean()
    weight = broadcast("weight", weight, "x", x)
    counted = x.masked_fill(weight == 0, 0.0)
    weight = weight.to(x.dtype)
    return (counted * weight).sum() / weight.sum().clamp(min=1.0)


def mean_over_agents(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean over the agents of each row, for every one of them, ``[*, N, 1]``; zero where none counts.

    Args:
        x: ``[*, N, 1]``.
        weight: bool or non-negative float, broadcastable to ``x``; where it is zero, no value of ``x`` reaches the result.

    Raises:
        ValueError: ``weight`` does not broadcast to ``x``.
    """
    weight = broadcast("weight", weight, "x", x)
    counted = x.masked_fill(weight == 0, 0.0)
    weight = weight.to(x.dtype)
    total = weight.sum(-2, keepdim=True)
    mean = (counted * weight).sum(-2, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total))
    return mean.expand_as(x)


@torch.no_grad()
def standardise(
    x: Tensor, weight: Tensor, epsilon: float = 1e-5, *, mean: Callable[[Tensor, Tensor], Tensor] = masked_mean
) -> Tensor:
    """Shift and scale to zero mean and unit deviation: ``(x - mean) / (std + epsilon)``, without gradient.

    Mean and deviation are over all entries of ``x`` together, weighted. The deviation is the population's (divided by the sum of
    weights, not by one less), as in the reference implementations of MAPPO and HAPPO (``numpy.nanstd``).

    Args:
        x: any shape, for advantages ``[B, T, N, 1]``.
        weight: bool or non-negative float, of as many dimensions as ``x`` and broadcastable to it.
        epsilon: added to the deviation, so that equal entries become zero.
        mean: the weighted mean of ``x`` and ``weight``; one over several processes also covers the entries of the others.

    Returns:
        Shape of ``x``; zero where the weight is zero.

    Raises:
        ValueError: ``weight`` does not broadcast to ``x``.
    """
    weight = broadcast("weight", weight, "x", x)
    centred = x - mean(x, weight)
    deviation = mean(centred.square(), weight).sqrt()
    return (centred / (deviation + epsilon)).masked_fill(weight == 0, 0.0)


def broadcast(name: str, tensor: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``tensor`` ``[*]`` expanded to the shape of ``other`` ``[*]``, which stays as it is.

    Tensors of unequal numbers of dimensions are refused, because ``[B, 1]`` against ``[B]`` would silently become ``[B, B]``.

    Raises:
        ValueError: the shapes do not fit; names both.
    """
    fits = tensor.ndim == other.ndim and all(a in (1, b) for a, b in zip(tensor.shape, other.shape, strict=True))
    if not fits:
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} does not broadcast to {other_name} of shape {list(other.shape)}; "
            "it needs as many dimensions, each equal or 1"
        )
    return tensor.expand_as(other)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape ``[*]``, at least one; without a zero to begin with, so that one term is itself."""
    return functools.reduce(torch.add, terms)
