"""Players of agents that are not trained."""

from __future__ import annotations

import torch
from torch import Tensor

from marlkit.spec import TeamSpec


def flee(observation: Tensor, spec: TeamSpec) -> Tensor:
    """Continuous actions or numbers that depend on what is observed."""
    if spec.discrete:
        return (observation.sum(-1).abs() * 10).long() % spec.action_features
    return torch.tanh(observation[..., : spec.action_features] * 3)


def dozing(observation: Tensor, spec: TeamSpec) -> Tensor:
    """One agent too few."""
    return observation[:, 1:, 0]


NOTHING = 3
