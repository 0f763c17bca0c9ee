"""A team's perceptron on a CPU, evaluated and differentiated a few rows at a time.

Layer by layer, every result of a large batch is written to main memory and read back several times: bias, product,
non-linearity, and the same again on the way back. That takes as long as half of the matrix products. Here a few rows at a time
pass through all layers, so that their intermediate results stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlkit.nn.kernels.activation import InPlace, folded
from marlkit.nn.kernels.rows import product_over_rows, sum_over_rows

CHUNK = 2**20
"""Elements of the widest layer's result in one chunk of rows."""


@dataclass(frozen=True)
class Layers:
    """The parameters of ``G`` groups of agents: one for all, or one for each.

    Attributes:
        weights: ``W_l``, ``[G, H_l, H_(l-1)]``, of one hidden layer or more and the output.
        biases: ``b_l``, ``[G, H_l]``.
        identity: ``e_i``, ``[n, H_0]``: added to the first layer of each agent where ``G = 1``; ``None``: no identity.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    identity: Tensor | None


def perceptron(features: Tensor, layers: Layers, activation: InPlace) -> Tensor:
    """``W_L f(… f(W_0 x + b_0 + e_i) …) + b_L``; differentiable any number of times; only the first derivative is fused.

    Args:
        features: ``x``, ``[R, V, F]``, where ``V = n``, or ``V = 1`` if all agents of the one group have the same input.
        layers: the parameters.
        activation: ``f``.

    Returns:
        ``[R, n, H_L]``; ``n = V`` without identity.
    """
    parameters = (*layers.weights, *layers.biases)
    arguments = (features, layers.identity, *parameters)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments):
        result: Tensor = _Perceptron.apply(activation, *arguments)
    else:
        result = _Evaluation(activation, features, layers.identity, parameters).run()
    if len(result) > 1:
        return result.transpose(0, 1).contiguous()
    return result.view(len(features), features.shape[1] if layers.identity is None else len(layers.identity), result.shape[-1])


def layer_by_layer(features: Tensor, layers: Layers, activation: InPlace) -> Tensor:
    """The same by ordinary operations: ``[R, V, F]`` to ``[G, R n / G, H_L]``."""
    groups = len(layers.weights[0])
    hidden = features.transpose(0, 1) if groups > 1 else features.flatten(0, 1).unsqueeze(0)
    for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        if i > 0:
            hidden = activation.scale * activation.core(activation.before * hidden) + activation.shift
        hidden = torch.baddbmm(bias.unsqueeze(1), hidden, weight.mT)
        if i == 0 and layers.identity is not None:
            hidden = (hidden.view(*features.shape[:2], hidden.shape[-1]) + layers.identity).flatten(0, 1).unsqueeze(0)
    return hidden


class _Evaluation:
    """Parameters with the factors and the shift of the activation folded in, and the rows split into chunks."""

    def __init__(self, activation: InPlace, features: Tensor, identity: Tensor | None, parameters: Sequence[Tensor]) -> None:
        half = len(parameters) // 2
        weights, biases = parameters[:half], parameters[half:]
        self.activation = f = activation
        self.groups = len(weights[0])
        # Outer factor of each layer (of its activation's argument), scale and shift of its input (of the activation before it).
        self.outer = [f.before] * (half - 1) + [1.0]
        self.scale, self.shift = [1.0] + [f.scale] * (half - 1), [0.0] + [f.shift] * (half - 1)
        self.weights, self.biases = [], []
        for weight, bias, outer, scale, shift in zip(weights, biases, self.outer, self.scale, self.shift, strict=True):
            weight, bias = folded(weight, bias, outer=outer, scale=scale, shift=shift)
            self.weights.append(weight)
            self.biases.append(bias.unsqueeze(1))
        self.identity = None if identity is None else identity * f.before
        self.features = features.transpose(0, 1) if self.groups > 1 else features.unsqueeze(0)
        self.rows = len(features)
        self.seen = 1 if self.groups > 1 else features.shape[1]
        self.together = self.seen if identity is None else len(identity)

    def chunks(self) -> Iterator[slice]:
        widest = max(bias.shape[-1] for bias in self.biases)
        size = max(1, CHUNK // (widest * self.groups * self.together))
        yield from (slice(start, min(start + size, self.rows)) for start in range(0, max(1, self.rows), size))

    def entering(self, rows: slice) -> Tensor:
        """The input of the first layer, ``[G, r V, F]`` (``V = 1`` with several groups)."""
        few = self.features[:, rows]
        return few if self.groups > 1 else few.flatten(1, 2)

    def hidden(self, entering: Tensor) -> list[Tensor]:
        """The activations' cores of each hidden layer, ``[G, r n, H_l]``."""
        first = torch.baddbmm(self.biases[0], entering, self.weights[0].mT)
        if self.identity is not None:
            by_agent = first.view(-1, self.seen, first.shape[-1])
            same = self.seen == self.together
            first = (by_agent.add_(self.identity) if same else by_agent + self.identity).flatten(0, 1).unsqueeze(0)
        found = [self.activation.core(first)]
        for weight, bias in zip(self.weights[1:-1], self.biases[1:-1], strict=True):
            found.append(self.activation.core(torch.baddbmm(bias, found[-1], weight.mT)))
        return found

    def run(self, kept: list[Tensor] | None = None) -> Tensor:
        """``[G, R n / G, H_L]``; the hidden layers of each chunk are appended to ``kept``."""
        results = []
        for rows in self.chunks():
            found = self.hidden(self.entering(rows))
            results.append(torch.baddbmm(self.biases[-1], found[-1], self.weights[-1].mT))
            if kept is not None:
                kept += found
        return results[0] if len(results) == 1 else torch.cat(results, 1)


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: InPlace, features: Tensor, identity: Tensor | None, *parameters: Tensor) -> Tensor:
        kept: list[Tensor] = []
        result = _Evaluation(activation, features, identity, parameters).run(kept)
        ctx.activation, ctx.arguments = activation, 2 + len(parameters)
        ctx.save_for_backward(features, identity, *parameters, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        features, identity, *rest = ctx.saved_tensors
        parameters, kept = rest[: ctx.arguments - 2], rest[ctx.arguments - 2 :]
        arguments = (features, identity, *parameters)
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_twice_differentiable(ctx.activation, arguments, wanted, gradients[0])
        return None, *_Gradients(ctx.activation, arguments, wanted).differentiate(gradients[0], kept)


class _Gradients(_Evaluation):
    """The gradients of features, identity and parameters, where ``wanted``."""

    def __init__(self, activation: InPlace, arguments: Sequence[Any], wanted: Sequence[bool]) -> None:
        features, identity, *parameters = arguments
        super().__init__(activation, features, identity, parameters)
        self.wanted = wanted
        self.learning = any(wanted[1:])
        self.of_weights: list[Tensor | None] = [None] * len(self.weights)
        self.of_biases: list[Tensor | None] = [None] * len(self.biases)
        self.of_identity: Tensor | None = None
        self.of_features = torch.empty_like(features, memory_format=torch.contiguous_format) if wanted[0] else None

    def differentiate(self, gradient: Tensor, kept: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients in the order of the arguments; ``None`` where not wanted."""
        depth = len(self.weights) - 1
        for number, rows in enumerate(self.chunks()):
            few = gradient[:, rows.start * self.together : rows.stop * self.together]
            self._chunk(few.contiguous(), rows, kept[number * depth : (number + 1) * depth])
        return self._arranged()

    def _chunk(self, gradient: Tensor, rows: slice, hidden: Sequence[Tensor]) -> None:
        for layer in reversed(range(1, len(self.weights))):
            below = hidden[layer - 1]
            self._learn(layer, gradient, below)
            gradient = torch.bmm(gradient, self.weights[layer])
            gradient = self.activation.derivative(gradient, below, gradient)
        by_agent = gradient.view(-1, self.together, gradient.shape[-1])
        if self.identity is not None:
            self.of_identity = _plus(self.of_identity, by_agent.sum(0))
        if self.seen != self.together and self.groups == 1:
            gradient = by_agent.sum(1).unsqueeze(0)
        self._learn(0, gradient, self.entering(rows))
        if self.of_features is not None:
            back = torch.bmm(gradient, self.weights[0])
            self.of_features[rows] = back.transpose(0, 1) if self.groups > 1 else back.view(-1, *self.of_features.shape[1:])

    def _learn(self, layer: int, gradient: Tensor, below: Tensor) -> None:
        if self.learning:
            self.of_weights[layer] = _plus(self.of_weights[layer], product_over_rows(gradient, below))
            self.of_biases[layer] = _plus(self.of_biases[layer], sum_over_rows(gradient))

    def _arranged(self) -> list[Tensor | None]:
        """Gradients of the parameters from those of the folded parameters."""
        weights, biases = self.of_weights.copy(), self.of_biases.copy()
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            outer, scale, shift = self.outer[layer], self.scale[layer], self.shift[layer]
            if weight is not None and bias is not None:
                biases[layer] = bias = bias if outer == 1 else bias.mul_(outer)
                weight = weight if outer * scale == 1 else weight.mul_(outer * scale)
                weights[layer] = weight if shift == 0 else weight.add_(bias.unsqueeze(-1), alpha=shift)
        identity = None if self.of_identity is None else self.of_identity.mul_(self.activation.before)
        found = [self.of_features, identity, *weights, *biases]
        return [gradient if wanted else None for gradient, wanted in zip(found, self.wanted, strict=True)]


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum; overwrites ``total`` where it is given."""
    return part if total is None else total.add_(part)


def _twice_differentiable(
    activation: InPlace, arguments: Sequence[Any], wanted: Sequence[bool], gradient: Tensor
) -> Iterator[Tensor | None]:
    features, identity, *parameters = arguments
    half = len(parameters) // 2
    result = layer_by_layer(features, Layers(parameters[:half], parameters[half:], identity), activation)
    chosen = [argument for argument, is_wanted in zip(arguments, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(result, chosen, gradient, create_graph=True))
    yield from (next(found) if is_wanted else None for is_wanted in wanted)
