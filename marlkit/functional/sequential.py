"""The compound factor of sequential updates.

Agents that update one after another weight the team's advantage with the ratios of the agents before them (Kuba et al. 2022,
"Trust region policy optimisation in multi-agent reinforcement learning", HAPPO and HATRPO):
``M_{1:m} = A * prod_{j <= m} pi_new_j(a_j | o_j) / pi_old_j(a_j | o_j)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlkit.functional.reduce import broadcast


@torch.no_grad()
def compound(factor: Tensor, log_prob: Tensor, old_log_prob: Tensor, alive: Tensor) -> Tensor:
    """Multiply the factor by the ratio of one agent: ``factor * exp(log_prob - old_log_prob)``, without gradient.

    An agent that is not alive did not act: its ratio is one, whatever its log-probabilities.

    Args:
        factor: the advantage times the ratios of the agents before, ``[B, T, 1]`` or any shape.
        log_prob: log-probability of the agent's action after its update, broadcastable to ``factor``.
        old_log_prob: the same before its update.
        alive: bool, whether the agent took part.

    Returns:
        The shape of ``factor``.

    Raises:
        ValueError: a shape does not fit that of ``factor``.
    """
    log_ratio = broadcast("log_prob", log_prob, "factor", factor) - broadcast("old_log_prob", old_log_prob, "factor", factor)
    alive = broadcast("alive", alive, "factor", factor)
    return factor * log_ratio.masked_fill(~alive, 0.0).exp()
