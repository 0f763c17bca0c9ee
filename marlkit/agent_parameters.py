"""Which parameters of a network belong to which agents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from marlkit.networks import TeamLinear


def agent_parameters(module: nn.Module, agents: Sequence[int]) -> list[nn.Parameter]:
    """The leaf parameters of the groups of ``agents`` in every layer of ``module``, in one order for every agent.

    Nobody else uses them where each agent is a group of its own; what belongs to no group, such as identities, is left out.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, TeamLinear)]
    return [parameter for layer in layers for parameter in layer.agent_parameters(agents)]
