"""Perceptrons of N agents whose parameters are one tensor ``[N, P]``: one leaf for clipping, optimiser and consensus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def initial(agents: int, widths: Sequence[int]) -> Tensor:
    """Parameters ``[N, P]`` as ``nn.Linear`` draws them."""
    parts = []
    for inputs, outputs in pairwise(widths):
        parts.append(torch.empty(agents, (inputs + 1) * outputs).uniform_(-(inputs**-0.5), inputs**-0.5))
    return torch.cat(parts, 1)


def perceptron(flat: Tensor, widths: Sequence[int], x: Tensor, activation: Callable[[Tensor], Tensor] = torch.tanh) -> Tensor:
    """``[N, R, inputs] -> [N, R, outputs]``, agent i with its row of ``flat``."""
    layers = list(pairwise(widths))
    parts = iter(flat.split([size for inputs, outputs in layers for size in (inputs * outputs, outputs)], 1))
    for number, ((inputs, outputs), weight, bias) in enumerate(zip(layers, parts, parts, strict=False)):
        x = torch.baddbmm(bias.unsqueeze(1), x if number == 0 else activation(x), weight.view(-1, inputs, outputs))
    return x
