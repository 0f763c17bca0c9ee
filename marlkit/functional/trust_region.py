"""Steps to the edge of a trust region: natural gradients by conjugate gradients, and a backtracking line search.

The step ``s`` maximises the linear model ``g.s`` of a gain where the quadratic model of a divergence is ``s.Hs / 2 <= delta``:
``s = sqrt(2 delta / x.Hx) x`` with ``H x = g``. ``H`` is used only through its products with vectors.

Sources: Schulman et al. 2015, "Trust region policy optimisation"; Kuba et al. 2022 (HATRPO); Hestenes and Stiefel 1952.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix as its product with a vector ``[P]``."""


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of the tensors concatenated, ``[P]``."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`flatten`: ``flat`` ``[P]`` split into the shapes of ``like``.

    Raises:
        RuntimeError: ``flat`` has another number of entries than ``like`` has together.
    """
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def hessian_product(scalar: Tensor, parameters: Sequence[Tensor], *, damping: float) -> Product:
    """``v -> (H + damping I) v`` for the Hessian ``H`` of ``scalar``, as the gradient of ``grad(scalar).v``.

    Of a divergence ``KL(old || new)`` at ``new = old`` it is Fisher's information matrix.

    Args:
        scalar: ``[]``, with a graph that can be differentiated twice; the graph is retained.
        parameters: what to differentiate by, ``P`` entries in all; where ``scalar`` does not depend on one, its part of ``H`` is
            zero.
        damping: added to the diagonal.

    Returns:
        A function from ``[P]`` to ``[P]``.
    """
    slopes = torch.autograd.grad(scalar, parameters, create_graph=True, materialize_grads=True)
    curved = [index for index, slope in enumerate(slopes) if slope.requires_grad]

    def product(vector: Tensor) -> Tensor:
        parts = unflatten(vector, parameters)
        outputs, along = [slopes[index] for index in curved], [parts[index] for index in curved]
        found = torch.autograd.grad(outputs, parameters, along, retain_graph=True, materialize_grads=True)
        return flatten(found) + damping * vector

    return product


@torch.no_grad()
def conjugate_gradient(product: Product, right: Tensor, *, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """Solve ``H x = right`` for a positive definite ``H``, from ``x = 0``; exact after one iteration per distinct eigenvalue.

    Args:
        product: ``H``.
        right: ``[P]``.
        iterations: largest number of products.
        tolerance: stop where the residual's square has fallen to this share of that of ``right``: a solution scales with its
            right-hand side.

    Returns:
        ``x`` ``[P]``; the latest iterate where a direction without positive curvature is met.
    """
    x, residual, direction = torch.zeros_like(right), right, right
    square = first = right.dot(right)
    for _ in range(iterations):
        if square <= tolerance * first:
            break
        curved = product(direction)
        curvature = direction.dot(curved)
        if not curvature > 0:
            break
        length = square / curvature
        x = x + length * direction
        residual = residual - length * curved
        last, square = square, residual.dot(residual)
        direction = residual + (square / last) * direction
    return x


@torch.no_grad()
def step_to_edge(direction: Tensor, product: Product, *, limit: float) -> Tensor:
    """``sqrt(2 limit / x.Hx) x``, ``[P]``, for a direction ``x`` ``[P]``; zero where ``x.Hx`` is not positive and finite."""
    curvature = direction.dot(product(direction)).item()
    if not 0.0 < curvature < math.inf:
        return torch.zeros_like(direction)
    return math.sqrt(2.0 * limit / curvature) * direction


class Found(NamedTuple):
    """The accepted fraction of a step, with its divergence and gain; all zero where no fraction was accepted."""

    fraction: float
    divergence: float
    gain: float


def search_back(
    trial: Callable[[float], tuple[float, float]],
    expected: float,
    *,
    limit: float,
    accept_ratio: float,
    trials: int,
    factor: float,
) -> Found:
    """Backtracking line search: the largest acceptable fraction ``factor^j``, ``j < trials``, of a step.

    A fraction is acceptable with ``divergence <= limit``, ``gain > 0`` and ``gain >= accept_ratio * fraction * expected``; NaN is
    not.

    Args:
        trial: divergence and gain at a fraction of the step.
        expected: gain of the whole step in the linear model; nothing is tried unless it is positive.
        limit: largest divergence.
        accept_ratio: share of the linear model's gain that must be reached.
        trials: number of fractions.
        factor: ratio of one fraction to the one before.
    """
    fraction = 1.0
    for _ in range(trials if expected > 0 else 0):
        divergence, gain = trial(fraction)
        if divergence <= limit and gain > 0 and gain >= accept_ratio * fraction * expected:
            return Found(fraction, divergence, gain)
        fraction *= factor
    return Found(0.0, 0.0, 0.0)
