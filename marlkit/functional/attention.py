"""Attention of each agent over the others (Iqbal and Sha 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weights_of_others(query: Tensor, key: Tensor) -> Tensor:
    """``w_ij = softmax_{j != i}(q_i . k_ij / sqrt(d))`` per head.

    Args:
        query: ``[*, N, h, d]``.
        key: ``[*, V, N, h, d]``, of agent j in the view of agent i (V = N), or in one common view (V = 1).

    Returns:
        ``[*, h, N, N]``; zero where i = j, otherwise each row sums to one (all are zero for a single agent).
    """
    n_agents, size = query.shape[-3], query.shape[-1]
    scores = torch.einsum("...ihd,...ijhd->...hij", query, key) / math.sqrt(size)
    if n_agents == 1:
        return torch.zeros_like(scores)
    own = torch.eye(n_agents, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(own, -math.inf).softmax(-1)


def attended(weights: Tensor, value: Tensor) -> Tensor:
    """``x_i = concat_h sum_j w_ij^h v_ij^h``.

    Args:
        weights: ``[*, h, N, N]``.
        value: ``[*, V, N, h, d]``, as the keys of :func:`weights_of_others`.

    Returns:
        ``[*, N, h d]``.
    """
    return torch.einsum("...hij,...ijhd->...ihd", weights, value).flatten(-2)
