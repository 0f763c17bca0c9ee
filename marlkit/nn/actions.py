"""Actions as inputs and outputs of networks: features, views, bounds, half-ranges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marlkit.functional.bounds import bounded, executed
from marlkit.functional.one_hot import one_hot
from marlkit.nn.distributions import NormalTeam
from marlkit.spec import Continuous, TeamSpec

LOG_DEVIATION_RANGE = (-5.0, 2.0)
"""Bounds of the logarithm of the standard deviation, in half-ranges of the action; `options.StartingDeviation` is inside them."""


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


class ActionBounds(nn.Module):
    """The bounds of continuous actions, as every environment clips to them; none of discrete ones. And which ones agents have.

    Args:
        spec: the team.
    """

    low: Tensor | None
    high: Tensor | None
    owned: Tensor

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        bounds = (spec.action.low, spec.action.high) if isinstance(spec.action, Continuous) else (None, None)
        for name, bound in zip(("low", "high"), bounds, strict=True):
            self.register_buffer(name, None if bound is None else torch.tensor(bound), persistent=False)
        sizes = torch.tensor(spec.own_action_sizes).unsqueeze(-1)
        self.register_buffer("owned", torch.arange(spec.action_features) < sizes, persistent=False)

    def forward(self, action: Tensor) -> Tensor:
        """``[*, N, D]`` as it is executed; discrete actions and their features as they are."""
        return executed(action, self.low, self.high)

    def without_padding(self, features: Tensor) -> Tensor:
        """Features ``[*, N, F]`` of actions as they are executed, zero where an agent has none."""
        return self(features).masked_fill(~self.owned, 0.0)


class ActionRange(nn.Module):
    """``action = middle + half_range * x``; middle 0 and half-range 1 where actions are unbounded.

    Args:
        action: the team's action space.
        n_agents: number of agents N.
    """

    middle: Tensor
    half_range: Tensor

    def __init__(self, action: Continuous, n_agents: int) -> None:
        super().__init__()
        shape = (n_agents, action.size)
        low = -torch.ones(shape) if action.low is None else torch.tensor(action.low)
        high = torch.ones(shape) if action.high is None else torch.tensor(action.high)
        self.register_buffer("middle", (low + high) / 2, persistent=False)
        reach = (high - low) / 2
        # Padding has no range; a zero deviation there would put NaN into the gradient of a logarithm that is masked anyway.
        self.register_buffer("half_range", torch.where(reach > 0, reach, torch.ones_like(reach)), persistent=False)

    def scaled(self, action: Tensor, agents: Sequence[int] | slice = slice(None)) -> Tensor:
        """``(action - middle) / half_range`` of ``agents``, ``[*, n, D]``: from the environment's units to half-ranges."""
        return (action - self.middle[agents]) / self.half_range[agents]

    def normal(
        self, mean: Tensor, log_deviation: Tensor, dims: Tensor, agents: Sequence[int] | slice = slice(None)
    ) -> NormalTeam:
        """The distribution of the action in the environment's units.

        Args:
            mean: in half-ranges, ``[*, n, D]``.
            log_deviation: logarithm of the deviation in half-ranges, ``[*, n, D]`` or fewer dimensions; kept in
                ``LOG_DEVIATION_RANGE``, with a gradient that leads back there (:func:`marlkit.functional.bounds.bounded`).
            dims: ``[*, n, D]`` bool, true for the dimensions that the agent has.
            agents: the n agents; all by default.
        """
        middle, half = self.middle[agents], self.half_range[agents]
        scale = half * bounded(log_deviation, *LOG_DEVIATION_RANGE).exp()
        return NormalTeam(middle + half * mean, scale, dims)
