"""How two opinions of the same action become one, and whose opinions of whom count (modelling of other agents)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_of_logits(first: Tensor, second: Tensor) -> Tensor:
    """Logits of the normalised geometric mean of two categorical distributions, ``(l_1 + l_2) / 2``.

    A product of experts in which each has half a say, so that two experts who agree are believed and not sharpened.

    Args:
        first: logits of one expert.
        second: those of the other, of equal shape.
    """
    return (first + second) / 2


def mean_of_normals(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The normalised geometric mean of two normal distributions, weighted by their precisions ``p = 1 / scale^2``.

    ``loc = (p_1 loc_1 + p_2 loc_2) / (p_1 + p_2)`` and ``scale = sqrt(2 / (p_1 + p_2))``: the same rule as
    :func:`mean_of_logits`, the mean of the natural parameters.

    Args:
        first: ``(loc, scale)`` of one expert, the scale positive.
        second: those of the other, of equal shape.

    Returns:
        ``(loc, scale)``.
    """
    precision_1, precision_2 = first[1].pow(-2), second[1].pow(-2)
    total = precision_1 + precision_2
    return (precision_1 * first[0] + precision_2 * second[0]) / total, (2 / total).sqrt()


def pairs_modelled(groups: Sequence[int]) -> Tensor:
    """How many agents i that use network g model agent j: ``W[g, j] = sum_{i in g} [i != j]``.

    Args:
        groups: the network of each agent i.

    Returns:
        ``[G, N]`` float.
    """
    n_agents = len(groups)
    others = 1 - torch.eye(n_agents)
    counted = torch.zeros(max(groups) + 1, n_agents)
    return counted.index_add(0, torch.tensor(groups), others)
