"""On-policy rollouts: a fixed number of steps with the current policy, used once."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor, Data, Environment
from marlkit.contract import Contract
from marlkit.minibatches import refuse_unfit_length
from marlkit.options import PositiveInt
from marlkit.spec import TeamSpec


class RolloutData(Data):
    """``steps`` joint steps of every environment, continuing where the last rollout stopped.

    Args:
        spec: the team.
        steps: length T of a rollout; the batch of an iteration has ``num_envs * steps`` joint steps.
    """

    contract = Contract(traits=("on_policy",))

    def __init__(self, spec: TeamSpec, *, steps: PositiveInt = 100) -> None:
        self.spec = spec
        self.steps = steps
        self._current: TensorDict | None = None
        self._storage: TensorDict | None = None

    @torch.no_grad()
    def collect(self, env: Environment, actor: Actor) -> TensorDict:
        """The next rollout, batch ``[B, T]``; it is overwritten by the next call."""
        if self._current is None:
            self._current = self._with_memory(env.reset(), actor.initial_hidden(env.num_envs))
        for step in range(self.steps):
            taken = actor(self._current.copy())
            arrived, current = env.step(taken[keys.ACTION])
            hidden = taken.get(keys.following(keys.HIDDEN), None)
            taken["next"] = arrived if hidden is None else self._with_memory(arrived.copy(), hidden)
            self._store(taken, step)
            self._current = self._with_memory(current, hidden)
        assert self._storage is not None
        return self._storage.transpose(0, 1)

    @classmethod
    def brief(cls, steps: int) -> dict[str, Any]:
        """A short rollout."""
        return {"steps": steps}

    def refuse_unfit_length(self, sequence_length: int | None) -> None:
        """A rollout must be whole sequences."""
        refuse_unfit_length(self.steps, sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """Where the next rollout starts."""
        return {} if self._current is None else {"current": self._current.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._current = None
        if state:
            first = state["current"][keys.IS_FIRST]
            self._current = TensorDict(state["current"], batch_size=first.shape[:1], device=first.device)

    def _with_memory(self, step: TensorDict, hidden: Tensor | None) -> TensorDict:
        return step if hidden is None else step.copy().set(keys.HIDDEN, hidden)

    def _store(self, taken: TensorDict, step: int) -> None:
        if self._storage is None or self._storage.batch_size != (self.steps, *taken.batch_size):
            # Time-major, so that every write is one contiguous copy.
            self._storage = taken.new_empty((self.steps, *taken.batch_size))
        for key, stored in self._storage.items(include_nested=True, leaves_only=True):
            stored[step].copy_(taken.get(key))
