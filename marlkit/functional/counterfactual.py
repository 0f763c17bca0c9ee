"""Values of an agent's own actions with the others' actions fixed: the counterfactual baseline (COMA, Foerster et al. 2018).

``Q_i[b] = Q_i(s, (b, a_-i))`` is a vector over agent i's own actions ``b`` and no function of the action that it took. Its mean
under the agent's policy is a baseline that leaves the policy gradient unbiased: given the observations and ``a_-i`` it is a
constant, and ``sum_b pi_i(b | o_i) grad log pi_i(b | o_i) = 0``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def executed_value(action_values: Tensor, action: Tensor) -> Tensor:
    """``Q_i[a_i]`` of the action taken.

    Args:
        action_values: ``[*, N, A]``; further dimensions before these are valued at the same actions.
        action: ``[*, N]`` int64.

    Returns:
        ``[*, N, 1]``.
    """
    return action_values.gather(-1, action.unsqueeze(-1).expand(*action_values.shape[:-1], 1))


def policy_value(action_values: Tensor, logits: Tensor) -> Tensor:
    """``sum_b pi_i(b) Q_i[b]``, the counterfactual baseline; unavailable actions have probability zero.

    Args:
        action_values: ``[*, N, A]``, finite.
        logits: ``[*, N, A]``, of the policies.

    Returns:
        ``[*, N, 1]``.
    """
    return (logits.softmax(-1) * action_values).sum(-1, keepdim=True)


def others_features(joint: Tensor) -> Tensor:
    """The actions of the others as each agent views them, its own set to zero.

    Args:
        joint: ``[*, V, N, F]``, action features in each of ``V = N`` views, or in one common view (V = 1).

    Returns:
        ``[*, N, N F]``.
    """
    n_agents = joint.shape[-2]
    own = torch.eye(n_agents, dtype=torch.bool, device=joint.device).unsqueeze(-1)
    return joint.expand(*joint.shape[:-3], n_agents, n_agents, -1).masked_fill(own, 0.0).flatten(-2)
