"""Actions as what a network takes in."""

from __future__ import annotations

import torch
from torch import Tensor

from marlkit.functional.one_hot import one_hot
from marlkit.spec import TeamSpec


def action_features(action: Tensor, spec: TeamSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot vectors of discrete actions, continuous ones as they are.

    Args:
        action: ``[*, N]`` int64 or ``[*, N, D]`` float.
        spec: the team.
        dtype: of the one-hot vectors.

    Returns:
        ``[*, N, F]``, ``F`` being A or D.
    """
    if not spec.discrete:
        return action
    return one_hot(action, spec.action_features, dtype)


def in_own_view(joint: Tensor, own: Tensor) -> Tensor:
    """Put ``own`` ``[*, N, F]`` into each agent's own view of ``joint`` ``[*, V, N, F]``: ``[*, N, N, F]``."""
    n_agents = own.shape[-2]
    mine = torch.eye(n_agents, dtype=torch.bool, device=own.device).unsqueeze(-1)
    return torch.where(mine, own.unsqueeze(-2), joint)
