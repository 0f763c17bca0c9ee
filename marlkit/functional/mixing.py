"""Team values made of the values of the agents' own actions (VDN, Sunehag et al. 2018; QMIX, Rashid et al. 2018).

Neither falls where an agent's value rises, so that the joint action of the highest team value is made of the actions of the
highest values of each agent.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def summed(values: Tensor) -> Tensor:
    """``Q = sum_i q_i``: ``[*, N, 1]`` to ``[*, 1, 1]``."""
    return values.sum(-2, keepdim=True)


def monotone(values: Tensor, weight: Tensor, bias: Tensor, final_weight: Tensor, final_bias: Tensor) -> Tensor:
    """``Q = |w'| . ELU(sum_i |w_i| q_i + b) + b'``, a network of one hidden layer whose weights are not negative.

    Args:
        values: ``q_i``, ``[*, N, 1]``.
        weight: ``w``, ``[*, N, E]``.
        bias: ``b``, ``[*, E]``.
        final_weight: ``w'``, ``[*, E]``.
        final_bias: ``b'``, ``[*, 1]``.

    Returns:
        ``[*, 1, 1]``.
    """
    hidden = F.elu((values * weight.abs()).sum(-2) + bias)
    return ((hidden * final_weight.abs()).sum(-1, keepdim=True) + final_bias).unsqueeze(-1)
