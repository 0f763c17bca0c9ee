"""Names of the metrics that tell returns: of the team, of each group where agents are opposed, and of each agent."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from marlkit.spec import TeamSpec


def has_agent_returns(spec: TeamSpec) -> bool:
    """Whether agents may have different returns."""
    return spec.n_agents > 1 and not spec.team_reward


def return_names(kind: str, spec: TeamSpec) -> list[str]:
    """The metrics of returns of one ``kind`` (``episode``, ``evaluation``); see :func:`return_metrics`."""
    groups = [f"{kind}/group_return/{as_word(group)}" for group in spec.members] or [f"{kind}/return"]
    return groups + [f"{kind}/agent_return/{as_word(name)}" for name in spec.agent_names if has_agent_returns(spec)]


def as_word(name: str) -> str:
    """A name without spaces, which loggers do not take; some scenarios of VMAS call their agents `agent 0`."""
    return "_".join(name.split())


def return_metrics(kind: str, spec: TeamSpec, team: float, agents: Tensor | None) -> dict[str, float]:
    """Returns by name: the team's, or the mean over each group where agents are opposed; and each agent's.

    Nobody seeks the mean over opposed agents, so that it is not told.

    Args:
        kind: of the episodes.
        spec: the team.
        team: mean return over the agents.
        agents: mean return of each agent ``[N]``; ``None`` where all receive the same. NaN is left out.
    """
    if agents is None:
        return {f"{kind}/return": team}
    groups = [agents[list(members)].mean().item() for members in spec.members.values()] or [team]
    values = [*groups, *(agents.tolist() if has_agent_returns(spec) else [])]
    found = zip(return_names(kind, spec), values, strict=True)
    return {name: value for name, value in found if not math.isnan(value)}


def by_group(agents: Tensor, spec: TeamSpec) -> Iterator[tuple[str, Tensor]]:
    """The mean over the agents of each group of ``[B, N]``, as ``[B]``."""
    for group, members in spec.members.items():
        yield as_word(group), agents[:, torch.tensor(members, device=agents.device)].mean(1)
