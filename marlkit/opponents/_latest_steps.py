"""The latest steps that a team played, of all environments, in buffers that checkpoints hold."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.keys import Key
from marlkit.spec import TeamSpec


class LatestSteps(nn.Module):
    """A ring buffer of the ``count`` latest joint steps: observations, actions, available actions and which agents were alive.

    Args:
        spec: the team.
        count: K.
    """

    position: Tensor

    def __init__(self, spec: TeamSpec, count: int) -> None:
        super().__init__()
        team = (count, spec.n_agents)
        action = torch.zeros(team, dtype=torch.int64) if spec.discrete else torch.zeros(*team, spec.action_features)
        self.count = count
        self.names: dict[Key, str] = {
            keys.OBSERVATION: "observation",
            keys.ACTION: "action",
            keys.ACTION_MASK if spec.discrete else keys.ACTION_DIMS: "available",
            keys.ALIVE: "alive",
        }
        self.register_buffer("observation", torch.zeros(*team, spec.observation))
        self.register_buffer("action", action)
        self.register_buffer("available", torch.ones(*team, spec.action_features, dtype=torch.bool))
        # In slots without a step no agent is alive.
        self.register_buffer("alive", torch.zeros(*team, 1, dtype=torch.bool))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def record(self, played: TensorDictBase) -> None:
        """Add steps ``[B, T]`` in order of time; they replace the oldest."""
        steps = played.select(*self.names).transpose(0, 1).flatten(0, 1)[-self.count :]
        slots = (self.position + torch.arange(len(steps), device=self.position.device)) % self.count
        for key, name in self.names.items():
            kept = getattr(self, name)
            kept[slots] = steps[key].to(kept.dtype)
        self.position.add_(len(steps)).remainder_(self.count)

    def steps(self) -> TensorDict:
        """The whole buffer, batch ``[K]``."""
        return TensorDict({key: getattr(self, name) for key, name in self.names.items()}, batch_size=[self.count])
