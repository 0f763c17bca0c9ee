"""The mean of a perceptron's last hidden layer over samples of a part of its input, in the memory of one chunk of samples.

PERLA's critic (Jafferjee et al. 2022) is ``(1/K) sum_k w . h_L(x, a_k) + b``. The last layer is linear, so that it reads only
the mean of ``h_L``, and ``h_0 = f(W_x x + W_a a_k)`` needs ``W_x x`` once per row. Autograd would store every ``h_l``, or, with
recomputation by chunks, allocate new memory for each intermediate result, which on a CPU takes up to a third of the time of a
product. Here all chunks use the same buffers, and the backward pass overwrites activations with their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from marlkit.nn.kernels.activation import InPlace, folded
from marlkit.nn.kernels.rows import product_over_rows, sum_over_rows

Draw = Callable[[slice, slice], Tensor]
"""``draw(rows, samples)``: samples ``[R, K, N, F]`` of rows; equal arguments give equal samples."""

_DRAWN = 8
"""Chunks whose samples are drawn at once: samples are small compared with the results computed from them."""


@dataclass(frozen=True)
class Sampling:
    """The samples to average over, and the activation.

    Attributes:
        draw: the samples.
        samples: K.
        chunk: evaluations of the perceptron at a time; at least one sample of one row for all agents.
        activation: ``f``.
    """

    draw: Draw
    samples: int
    chunk: int
    activation: InPlace

    def chunks(self, rows: int, agents: int) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each chunk and its samples, ``[R, K, N, F]``."""
        size = max(1, self.chunk // agents)
        for many, samples in boxes(rows, self.samples, _DRAWN * size):
            drawn = self.draw(many, samples)
            for few, some in boxes(drawn.shape[0], drawn.shape[1], size):
                yield slice(many.start + few.start, many.start + few.stop), drawn[few, some]


def boxes(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Split a table into boxes of at most ``size`` cells: whole rows, or parts of one row where a row is larger."""
    height, width = max(1, size // columns), min(size, columns)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))


def mean_hidden(
    sampling: Sampling, entered: Tensor, from_sample: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """``(1/K) sum_k h_L``, where ``h_0 = f(entered + W_a a_k)`` and ``h_l = f(W_l h_(l-1) + b_l)``; differentiable once.

    Agents are ``G`` groups of ``n`` that share parameters: ``G = 1`` or ``n = 1``.

    Args:
        sampling: the samples, which carry no gradient, and the non-linearity.
        entered: ``[G, R, n, H_0]``, the first layer's result for the rest of its input.
        from_sample: ``W_a``, ``[G, H_0, F]``.
        weights: ``W_l`` of the following hidden layers, ``[G, H_l, H_(l-1)]``; may be empty.
        biases: ``b_l``, ``[G, H_l]``.

    Returns:
        ``[G, R, n, H_L]``.
    """
    f = sampling.activation
    # The factors and the shift of f are applied once to the parameters instead of at every evaluation.
    pairs = zip(weights, biases, strict=True)
    layers = [folded(weight, bias, outer=f.before, scale=f.scale, shift=f.shift) for weight, bias in pairs]
    parameters = (*(weight for weight, _ in layers), *(bias for _, bias in layers))
    mean: Tensor = _MeanHidden.apply(sampling, f.before * entered, f.before * from_sample, *parameters)
    return f.scale * mean + f.shift


class _Chunk:
    """One chunk of evaluations at a time, in memory that the next chunk reuses."""

    def __init__(self, sampling: Sampling, entered: Tensor, from_sample: Tensor, layers: Sequence[Tensor]) -> None:
        self.sampling, self.from_sample = sampling, from_sample
        self.weights, self.biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        self.widths = [entered.shape[-1], *(weight.shape[1] for weight in self.weights)]
        agents = entered.shape[0] * entered.shape[2]
        evaluations = min(max(sampling.chunk, agents), sampling.samples * agents * entered.shape[1])
        self.memory = [entered.new_empty(evaluations * width) for width in self.widths]
        self.spare = entered.new_empty(evaluations * max(self.widths[:-1], default=0))

    def evaluate(self, entered: Tensor, drawn: Tensor) -> None:
        """Fill ``samples`` ``[G, M, F]`` and ``hidden``, ``[G, M, H_l]`` of each layer, where ``M = R K n``."""
        groups, rows, together, width = entered.shape
        self.shape = (groups, rows, drawn.shape[1], together)
        self.samples = drawn.unflatten(2, (groups, together)).movedim(2, 0).flatten(1, 3)
        self.hidden = [self._part(memory, width) for memory, width in zip(self.memory, self.widths, strict=True)]
        torch.bmm(self.samples, self.from_sample.mT, out=self.hidden[0])
        self.hidden[0].view(*self.shape, width).add_(entered.unsqueeze(2))
        self.sampling.activation.core(self.hidden[0])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            torch.baddbmm(bias.unsqueeze(1), self.hidden[i], weight.mT, out=self.hidden[i + 1])
            self.sampling.activation.core(self.hidden[i + 1])

    def sum_of_samples(self, layer: int) -> Tensor:
        """``[G, R, n, H_l]`` of ``hidden[layer]``."""
        return self.hidden[layer].view(*self.shape, self.widths[layer]).sum(2)

    def differentiate(self, gradient: Tensor, parameters: Sequence[Tensor]) -> None:
        """Overwrite ``hidden`` with the gradients of each layer before its non-linearity, and add those of the parameters.

        Args:
            gradient: of the sum of the last layer, ``[G, R, n, H_L]``.
            parameters: the gradients to add to: of ``W_a`` transposed, of each ``W_l``, of each ``b_l``.
        """
        derivative, hidden = self.sampling.activation.derivative, self.hidden
        last = hidden[-1].view(*self.shape, self.widths[-1])
        derivative(gradient.unsqueeze(2).expand_as(last), last, last)
        for i in reversed(range(len(self.weights))):
            parameters[1 + i].add_(product_over_rows(hidden[i + 1], hidden[i]))
            parameters[1 + i + len(self.weights)].add_(sum_over_rows(hidden[i + 1]))
            below = torch.bmm(hidden[i + 1], self.weights[i], out=self._part(self.spare, self.widths[i]))
            derivative(below, hidden[i], hidden[i])
        parameters[0].add_(product_over_rows(self.samples, hidden[0]))

    def _part(self, memory: Tensor, width: int) -> Tensor:
        groups, *rest = self.shape
        count = torch.Size(rest).numel()
        return memory[: groups * count * width].view(groups, count, width)


class _MeanHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sampling: Sampling, entered: Tensor, from_sample: Tensor, *layers: Tensor) -> Tensor:
        ctx.sampling = sampling
        ctx.save_for_backward(entered, from_sample, *layers)
        chunk = _Chunk(sampling, entered, from_sample, layers)
        total = entered.new_zeros(*entered.shape[:-1], chunk.widths[-1])
        for rows, drawn in sampling.chunks(entered.shape[1], entered.shape[0] * entered.shape[2]):
            chunk.evaluate(entered[:, rows], drawn)
            total[:, rows] += chunk.sum_of_samples(-1)
        return total.div_(sampling.samples)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        entered, from_sample, *layers = ctx.saved_tensors
        gradient = gradients[0] / ctx.sampling.samples
        chunk = _Chunk(ctx.sampling, entered, from_sample, layers)
        of_entered = torch.zeros_like(entered)
        # A product with few columns takes up to five times as long as its transpose, hence the transposed gradient of W_a.
        parameters = [entered.new_zeros(from_sample.mT.shape), *map(torch.zeros_like, layers)]
        for rows, drawn in ctx.sampling.chunks(entered.shape[1], entered.shape[0] * entered.shape[2]):
            chunk.evaluate(entered[:, rows], drawn)
            chunk.differentiate(gradient[:, rows], parameters)
            of_entered[:, rows] += chunk.sum_of_samples(0)
        return None, of_entered, parameters[0].mT, *parameters[1:]
