"""How the weights of a network's layers are drawn at the start."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from marlkit.options import Initialisation


def initialise(weights: Iterable[Tensor], biases: Iterable[Tensor], how: Initialisation, *, gain: float, inputs: int) -> None:
    """Draw weights ``[out, in]`` and biases ``[out]``.

    - ``orthogonal``: orthonormal rows or columns, times ``gain``; biases 0 (Saxe et al. 2014, arXiv:1312.6120).
    - ``xavier``: uniform within ``gain sqrt(6 / (in + out))``; biases 0 (Glorot and Bengio 2010).
    - ``uniform``: weights and biases uniform within ``1 / sqrt(inputs)`` whatever the gain, as ``torch.nn.Linear`` starts.

    Args:
        weights: a layer's weights, of one network after the other.
        biases: likewise.
        how: one of these.
        gain: a factor of the weights.
        inputs: number of inputs of the layer; larger than ``in`` where several maps add to it.
    """
    bound = 1 / math.sqrt(inputs)
    for weight in weights:
        if how == "orthogonal":
            nn.init.orthogonal_(weight, gain)
        elif how == "xavier":
            nn.init.xavier_uniform_(weight, gain)
        else:
            nn.init.uniform_(weight, -bound, bound)
    for bias in biases:
        if how == "uniform":
            nn.init.uniform_(bias, -bound, bound)
        else:
            nn.init.zeros_(bias)
