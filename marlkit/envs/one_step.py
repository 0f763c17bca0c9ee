"""What games of a single joint action share: every agent sees 1, receives the same reward, and the episode ends."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from marlkit.component import Runtime
from marlkit.envs._adapter import AdapterEnvironment, Outcome
from marlkit.spec import TeamSpec


class OneStepGame(AdapterEnvironment[Tensor]):
    """Base of the one-step games: a subclass says what a joint action is worth.

    Args:
        runtime: device; nothing here is random.
        spec: the team.
        num_envs: number of games B played at once.
    """

    name = "this game"

    def __init__(self, runtime: Runtime, spec: TeamSpec, num_envs: int) -> None:
        super().__init__(runtime, num_envs=num_envs, max_steps=None, reward="individual")
        self.prepare(spec)
        self._position = torch.ones(num_envs, spec.n_agents, 1, device=self.device)

    @abstractmethod
    def payoff(self, action: Tensor) -> Tensor:
        """What joint actions ``[B, N]`` or ``[B, N, D]`` are worth: ``[B]``."""

    def restart(self) -> Tensor:
        """Every game before its only move, ``[B, N, 1]``."""
        return self._position

    def simulate(self, action: Tensor) -> Outcome[Tensor]:
        """Play every game with actions ``[B, N]`` or ``[B, N, D]``."""
        reward = self.payoff(action).reshape(self.num_envs, 1, 1).expand(-1, self.spec.n_agents, -1)
        return Outcome(self._position, reward, self._all, self._none)

    def proceed(self, seen: Tensor, done: Tensor, finished: Tensor) -> Tensor:
        """Every game before its only move, ``[B, N, 1]``."""
        return self._position

    def observation(self, seen: Tensor) -> Tensor:
        """``[B, N, 1]``."""
        return seen

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every step is a whole episode and nothing is random."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to continue from."""
