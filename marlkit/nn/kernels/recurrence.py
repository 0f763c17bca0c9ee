"""Gated recurrent units of several networks over whole sequences (Cho et al. 2014), with their derivatives.

Autograd would store and differentiate about ten operations per step, and accumulate the gradient of the same weights at each.
Here the weights' gradient is one product over all steps, and a step takes about six operations forwards and ten backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlkit.nn.kernels.activation import tanh_
from marlkit.nn.kernels.rows import product_over_rows, sum_over_rows

_ATEN = torch.ops.aten


def recurrence(gates: Tensor, hidden: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Hidden states after each step; differentiable any number of times, the first derivative with few operations.

    With ``u = keep_l h_(l-1)`` and ``x`` the contributions of the input to the gates: ``r, z = sigmoid(x + U u + b)``,
    ``n = tanh(x_n + r * (U_n u + b_n))``, ``h_l = (1 - z) n + z u``.

    Args:
        gates: ``x`` of G networks, L steps and Q sequences, ``[G, L, Q, 3 H]``, in the order ``r, z, n``.
        hidden: ``h_0``, ``[G, Q, H]``.
        keep: factor of the state before each step, ``[L, Q, 1]``: 0 where a sequence restarts; without gradient.
        weight: ``U``, ``[G, 3 H, H]``.
        bias: ``b``, ``[G, 3 H]``.

    Returns:
        ``[G, L, Q, H]``.
    """
    arguments = (gates, hidden, keep.detach(), weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments):
        states: Tensor = _Recurrence.apply(*arguments)
        return states
    return _run(*arguments, None)


def step_by_step(gates: Tensor, hidden: Tensor, keep: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by ordinary operations, ``[G, L, Q, H]``; the arguments are those of :func:`recurrence`."""
    states = []
    for gate, kept in zip(gates.unbind(1), keep, strict=True):
        before = hidden * kept
        hidden = unit(gate, torch.baddbmm(bias.unsqueeze(1), before, weight.mT), before)
        states.append(hidden)
    return torch.stack(states, 1)


def unit(gates: Tensor, from_hidden: Tensor, hidden: Tensor) -> Tensor:
    """One step ``[*, H]`` from the contributions of input and state to the gates, ``[*, 3 H]``, and the state ``[*, H]``."""
    reset_in, update_in, new_in = gates.chunk(3, -1)
    reset_hidden, update_hidden, new_hidden = from_hidden.chunk(3, -1)
    reset = torch.sigmoid(reset_in + reset_hidden)
    update = torch.sigmoid(update_in + update_hidden)
    new = torch.tanh(new_in + reset * new_hidden)
    return new + update * (hidden - new)


class _Step(NamedTuple):
    """Stored for the derivative of a step, in addition to the states: ``U u + b``, ``r`` and ``z`` concatenated, and ``n``."""

    from_hidden: Tensor
    reset_update: Tensor
    new: Tensor


def _run(gates: Tensor, hidden: Tensor, keep: Tensor, weight: Tensor, bias: Tensor, kept: list[Tensor] | None) -> Tensor:
    """The states; a :class:`_Step` for each step is appended to ``kept``."""
    size = hidden.shape[-1]
    states = torch.empty_like(gates[..., :size], memory_format=torch.contiguous_format)
    offset, matrix = bias.unsqueeze(1), weight.mT
    for index in range(gates.shape[1]):
        gate, before = gates[:, index], hidden * keep[index]
        from_hidden = torch.baddbmm(offset, before, matrix)
        reset_update = torch.sigmoid_(gate[..., : 2 * size] + from_hidden[..., : 2 * size])
        new = tanh_(torch.addcmul(gate[..., 2 * size :], reset_update[..., :size], from_hidden[..., 2 * size :]))
        hidden = states[:, index]
        torch.lerp(new, before, reset_update[..., size:], out=hidden)
        if kept is not None:
            kept += _Step(from_hidden, reset_update, new)
    return states


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Tensor) -> Tensor:
        kept: list[Tensor] = []
        gates, hidden, keep, weight, bias = arguments
        states = _run(gates, hidden, keep, weight, bias, kept)
        ctx.save_for_backward(*arguments, states, *kept)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arguments, (states, *kept) = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if torch.is_grad_enabled():
            return _twice_differentiable(arguments, ctx.needs_input_grad, gradients[0])
        return _differentiated(gradients[0], arguments, states, kept)


def _differentiated(
    gradient: Tensor, arguments: Sequence[Tensor], states: Tensor, kept: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments but ``keep``."""
    gates, hidden, keep, weight, _ = arguments
    width = len(_Step._fields)
    of_gates, of_products = (torch.empty_like(gates, memory_format=torch.contiguous_format) for _ in range(2))
    entering = torch.cat([hidden.unsqueeze(1), states[:, :-1]], 1).mul_(keep)
    of_state = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    for index in reversed(range(gates.shape[1])):
        step = _Step(*kept[index * width : (index + 1) * width])
        of_state = of_state + gradient[:, index]
        past = _through(step, entering[:, index], of_state, of_gates[:, index], of_products[:, index])
        of_state = torch.baddbmm(past, of_products[:, index], weight).mul_(keep[index])
    rows = of_products.flatten(1, 2)
    return of_gates, of_state, None, product_over_rows(rows, entering.flatten(1, 2)), sum_over_rows(rows)


def _through(step: _Step, before: Tensor, of_state: Tensor, of_gates: Tensor, of_products: Tensor) -> Tensor:
    """Write the gradients of ``x`` and ``U u + b``; return the part of that of ``u`` that does not pass through the product."""
    size = of_state.shape[-1]
    reset, update = step.reset_update[..., :size], step.reset_update[..., size:]
    past = of_state * update
    of_new = _ATEN.tanh_backward(of_state - past, step.new)
    both = of_products[..., : 2 * size]
    torch.mul(of_new, step.from_hidden[..., 2 * size :], out=both[..., :size])
    torch.mul(of_state, before - step.new, out=both[..., size:])
    _ATEN.sigmoid_backward.grad_input(both, step.reset_update, grad_input=both)
    torch.mul(of_new, reset, out=of_products[..., 2 * size :])
    of_gates[..., : 2 * size] = both
    of_gates[..., 2 * size :] = of_new
    return past


def _twice_differentiable(arguments: Sequence[Tensor], wanted: Sequence[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    # Views are separate nodes: where one argument depends on another, their connection must not be differentiated here.
    arguments = [argument.view_as(argument) for argument in arguments]
    chosen = [argument for argument, is_wanted in zip(arguments, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(step_by_step(*arguments), chosen, gradient, create_graph=True))
    return tuple(next(found) if is_wanted else None for is_wanted in wanted)
