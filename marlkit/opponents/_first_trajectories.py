"""The first trajectories that a team plays: collected once, then fixed.

All state is in buffers of fixed size, so that a run resumed from any checkpoint continues exactly.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.nn.actions import action_features
from marlkit.spec import TeamSpec

NO_ENVIRONMENT = -1
"""Owner of a trajectory to which no environment adds steps."""


class FirstTrajectories(nn.Module):
    """Up to ``count`` trajectories of the whole team, each from one environment, of at most ``length`` steps.

    Each environment adds its steps to one trajectory until it has ``length`` steps or the episode ends, and then begins another
    while fewer than ``count`` have begun.

    Args:
        spec: the team.
        count: C.
        length: L.
    """

    observation: Tensor
    action: Tensor
    length: Tensor
    owner: Tensor

    def __init__(self, spec: TeamSpec, count: int, length: int) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("observation", torch.zeros(count, length, spec.n_agents, spec.observation))
        self.register_buffer("action", torch.zeros(count, length, spec.n_agents, spec.action_features))
        self.register_buffer("length", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("owner", torch.full((count,), NO_ENVIRONMENT))

    @property
    def begun(self) -> int:
        """Number of trajectories, including those that still grow."""
        return int((self.length > 0).sum())

    @property
    def complete(self) -> bool:
        """Whether all trajectories have begun and none grows any more."""
        return bool(((self.length > 0) & (self.owner == NO_ENVIRONMENT)).all())

    @torch.no_grad()
    def record(self, played: TensorDictBase) -> None:
        """Add steps ``[B, T]``; row b is the same environment in every call."""
        observation, first = played[keys.OBSERVATION], played[keys.IS_FIRST].squeeze(-1)
        action = action_features(played[keys.ACTION], self.spec)
        for step in range(played.batch_size[1]):
            if self.complete:
                return
            self._begin(first[:, step])
            growing = (self.owner != NO_ENVIRONMENT).nonzero().squeeze(-1)
            environment, position = self.owner[growing], self.length[growing]
            self.observation[growing, position] = observation[environment, step].to(self.observation.dtype)
            self.action[growing, position] = action[environment, step].to(self.action.dtype)
            self.length[growing] += 1
            self.owner[growing[position + 1 == self.observation.shape[1]]] = NO_ENVIRONMENT

    def _begin(self, is_first: Tensor) -> None:
        """Assign free trajectories to environments without one; the start of an episode ends the environment's trajectory."""
        growing = self.owner != NO_ENVIRONMENT
        growing &= ~is_first[self.owner.clamp(min=0)]
        self.owner.masked_fill_(~growing, NO_ENVIRONMENT)
        without = torch.ones_like(is_first)
        without[self.owner[growing]] = False
        begun = self.begun
        environments = without.nonzero().squeeze(-1)[: len(self.owner) - begun]
        self.owner[begun : begun + len(environments)] = environments

    def steps(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Observations and actions ``[S, L, N, O + F]`` of the trajectories ``index`` ``[S]``, and their lengths ``[S]``."""
        return torch.cat([self.observation[index], self.action[index]], -1), self.length[index]
