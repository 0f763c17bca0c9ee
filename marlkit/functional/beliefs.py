"""Combining two predictions of the same action, and counting which agents model which (modelling of other agents)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_of_logits(first: Tensor, second: Tensor) -> Tensor:
    """Logits of the normalised geometric mean of two categorical distributions, ``(l_1 + l_2) / 2``.

    A product of experts with weight 1/2 each, so that two equal distributions give the same distribution and no sharper one.

    Args:
        first: logits of one expert, ``[*, A]``.
        second: logits of the other, ``[*, A]``.

    Returns:
        ``[*, A]``.
    """
    return (first + second) / 2


def mean_of_normals(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The normalised geometric mean of two normal distributions, weighted by their precisions ``p = 1 / scale^2``.

    ``loc = (p_1 loc_1 + p_2 loc_2) / (p_1 + p_2)`` and ``scale = sqrt(2 / (p_1 + p_2))``: the same rule as
    :func:`mean_of_logits`, the mean of the natural parameters.

    Args:
        first: ``(loc, scale)`` of one expert, each ``[*, D]``, the scale positive.
        second: ``(loc, scale)`` of the other, of equal shapes.

    Returns:
        ``(loc, scale)``, each ``[*, D]``.
    """
    precision_1, precision_2 = first[1].pow(-2), second[1].pow(-2)
    total = precision_1 + precision_2
    return (precision_1 * first[0] + precision_2 * second[0]) / total, (2 / total).sqrt()


def pairs_modelled(groups: Sequence[int]) -> Tensor:
    """Number of agents i that use network g and model agent j: ``W[g, j] = sum_{i in g} [i != j]``.

    Args:
        groups: the network of each agent i.

    Returns:
        ``[G, N]`` float.
    """
    n_agents = len(groups)
    others = 1 - torch.eye(n_agents)
    counted = torch.zeros(max(groups) + 1, n_agents)
    return counted.index_add(0, torch.tensor(groups), others)
