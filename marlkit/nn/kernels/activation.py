"""The hyperbolic tangent, several times faster than torch's on a CPU, and derivatives that need only a function's value.

In a network with layers of 256 units torch's tanh costs half as much as the matrix products around it (2.5 to 4.5 ns an element,
against 5 ns for a product, on an AVX-512 core). Its sigmoid is vectorised better (0.4 ns), and ``tanh(x) = 2 sigmoid(2 x) - 1``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _written_over(x)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradients[0], y)


def tanh_(x: Tensor) -> Tensor:
    """``tanh(x)``, ``[*]`` to ``[*]``, to within 3e-7; overwrites ``x``, the result of a layer; differentiable twice.

    Other devices and precisions use ``torch.tanh_``.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _Tanh.apply(x) if torch.is_grad_enabled() and x.requires_grad else _written_over(x)
    return torch.tanh_(x)


def _written_over(x: Tensor) -> Tensor:
    y = x.mul_(2).sigmoid_()
    return torch.add(y.new_tensor(-1.0), y, alpha=2, out=y)


@dataclass(frozen=True)
class InPlace:
    """``f(x) = scale * core(before * x) + shift`` with a cheap ``core``; the linear layers around it absorb the rest.

    Attributes:
        core: overwrites its argument.
        derivative: ``derivative(g, core(x), out)`` writes ``g core'(x)`` to ``out``, which may be one of its other arguments.
        before: factor of the argument.
        scale: factor of the value.
        shift: added to the value.
    """

    core: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor, Tensor], Tensor]
    before: float = 1.0
    scale: float = 1.0
    shift: float = 0.0


def folded(weight: Tensor, bias: Tensor, *, outer: float, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """``outer * (W (scale h + shift) + b)`` as an affine map of ``h``, so that its evaluation needs no factors.

    Args:
        weight: ``W``, ``[*, H, F]``.
        bias: ``b``, ``[*, H]``.
        outer: ``before`` of the activation that follows.
        scale: of the activation whose core is ``h``.
        shift: of the same activation.

    Returns:
        Its weight ``[*, H, F]`` and its bias ``[*, H]``; an unchanged one is not copied.
    """
    offset = bias if shift == 0 else torch.add(bias, weight.sum(-1), alpha=shift)
    return weight if outer * scale == 1 else weight * (outer * scale), offset if outer == 1 else offset * outer


_ATEN = torch.ops.aten

IN_PLACE = {
    "tanh": InPlace(torch.sigmoid_, lambda g, y, out: _ATEN.sigmoid_backward.grad_input(g, y, grad_input=out), 2.0, 2.0, -1.0),
    "relu": InPlace(torch.relu_, lambda g, y, out: _ATEN.threshold_backward.grad_input(g, y, 0, grad_input=out)),
    "leaky_relu": InPlace(
        partial(F.leaky_relu, inplace=True),
        lambda g, y, out: _ATEN.leaky_relu_backward.grad_input(g, y, 0.01, True, grad_input=out),
    ),
    "elu": InPlace(
        partial(F.elu, inplace=True), lambda g, y, out: _ATEN.elu_backward.grad_input(g, 1, 1, 1, True, y, grad_input=out)
    ),
}
"""The activations whose derivative is a function of their value."""
