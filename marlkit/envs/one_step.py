"""What games of a single joint action have in common: everybody sees 1, everybody receives the same reward, then it is over."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Environment, Runtime
from marlkit.spec import TeamSpec


class OneStepGame(Environment):
    """Base of the one-step games: a subclass says what a joint action is worth.

    Args:
        runtime: device; nothing here is random.
        spec: the team.
        num_envs: number of games B played at once.
    """

    def __init__(self, runtime: Runtime, spec: TeamSpec, num_envs: int) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self.device = runtime.device
        yes = torch.ones((), dtype=torch.bool, device=self.device)
        self._yes, self._no = yes.expand(num_envs, 1), (~yes).expand(num_envs, 1)
        mask = "action_mask" if spec.discrete else "action_dims"
        team = (num_envs, spec.n_agents)
        self._agents = {
            "observation": torch.ones(*team, 1, device=self.device),
            "alive": yes.expand(*team, 1),
            mask: yes.expand(*team, spec.action_features),
        }

    @abstractmethod
    def payoff(self, action: Tensor) -> Tensor:
        """What joint actions ``[B, N]`` or ``[B, N, D]`` are worth: ``[B]``."""

    def reset(self) -> TensorDict:
        """Every game before its only move."""
        return self._position(self._yes)

    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """Play every game and start it anew; see :meth:`Environment.step`.

        Raises:
            MarlkitError: the actions have a wrong shape or type.
        """
        self.refuse_unfit_action(action, "this game")
        arrived = self._position(self._no)
        reward = self.payoff(action).reshape(self.num_envs, 1, 1).expand(-1, self.spec.n_agents, -1)
        arrived.set(("agents", "reward"), reward)
        arrived.set("terminated", self._yes).set("truncated", self._no).set("done", self._yes)
        return arrived, self._position(self._yes)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every step is a whole episode and nothing is random."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to continue from."""

    def _position(self, is_first: Tensor) -> TensorDict:
        state = self._agents["observation"].flatten(1)
        step = {"agents": dict(self._agents), keys.STATE: state, keys.IS_FIRST: is_first}
        return TensorDict(step, batch_size=[self.num_envs], device=self.device)
