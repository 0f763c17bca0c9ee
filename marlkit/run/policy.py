"""A trained policy outside training: observations in, actions out.

Each agent's action depends on its own observation only, unless the policy is centralised (:attr:`Policy.centralised`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor
from marlkit.errors import MarlkitError
from marlkit.keys import Key
from marlkit.spec import Continuous, TeamSpec

Array = Tensor | np.ndarray
Observations = Array | Sequence[Array] | Mapping[str, Array]


class Policy:
    """Chooses the actions of a team.

    Where the policy is centralised, an agent's action also depends on the observations and actions of the others, so that one
    call needs the observations of the whole team at the same step. Otherwise agent i's row of the actions depends only on its row
    of the observations (for samples, also on the random numbers drawn), so that each agent can run a copy of its own.

    Args:
        actor: the trained actor.
        spec: the team that it was trained for.
    """

    def __init__(self, actor: Actor, spec: TeamSpec) -> None:
        self.actor = actor.eval()
        self.spec = spec
        self._carried: dict[Key, Tensor] | None = None
        self._is_first = True

    @property
    def centralised(self) -> bool:
        """Whether acting needs the observations of all agents (trait ``centralised_execution`` of the actor)."""
        return "centralised_execution" in self.actor.traits

    def reset(self) -> None:
        """Clear the hidden state at the start of an episode; no effect on a policy without memory."""
        self._carried, self._is_first = None, True

    @torch.no_grad()
    def __call__(self, observations: Observations, *, deterministic: bool = True, action_mask: Array | None = None) -> Tensor:
        """Choose actions; tensors, NumPy arrays and lists of numbers are taken alike.

        Args:
            observations: ``[*, N, O]``; or one tensor ``[*, o_i]`` per agent in order, or by agent name.
            deterministic: whether to choose the most likely action instead of a sample.
            action_mask: ``[*, N, A]`` bool, discrete actions that are available; ``None``: all that each agent has.

        Returns:
            ``[*, N]`` int64 or ``[*, N, D]`` float in the environment's units, within its bounds.

        Raises:
            MarlkitError: the observations or the mask do not fit the team, or a policy with memory is given another number of
                rows than in the step before.
        """
        stacked = self._stacked(observations)
        leading = stacked.shape[:-2]
        rows = stacked.reshape(-1, *stacked.shape[-2:])
        batch = TensorDict({}, batch_size=[len(rows)], device=rows.device)
        batch.set(keys.OBSERVATION, rows)
        own = self._own_actions(rows) if action_mask is None else self._available(action_mask, leading)
        batch.set(keys.ACTION_MASK if self.spec.discrete else keys.ACTION_DIMS, own)
        batch.set(keys.IS_FIRST, torch.full((len(rows), 1), self._is_first, device=rows.device))
        carried = self._remembered(len(rows))
        for key, value in carried.items():
            batch.set(key, value)
        self.actor(batch, deterministic=deterministic)
        self._carried, self._is_first = {key: batch[keys.following(key)] for key in carried}, False
        action = self._bounded(batch[keys.ACTION])
        return action.reshape(*leading, *action.shape[1:])

    def _remembered(self, rows: int) -> dict[Key, Tensor]:
        if self._carried is None:
            return self.actor.initial_state(rows)
        known = next((len(value) for value in self._carried.values()), rows)
        if known != rows:
            raise MarlkitError(f"the hidden state is of {known} rows of observations, got {rows}; call reset() first")
        return self._carried

    def _stacked(self, observations: Observations) -> Tensor:
        if isinstance(observations, Mapping):
            missing = set(self.spec.agent_names) ^ set(observations)
            if missing:
                names = ", ".join(self.spec.agent_names)
                raise MarlkitError(f"observations are needed for {names}; missing or unknown: {sorted(missing)}")
            observations = [observations[name] for name in self.spec.agent_names]
        if isinstance(observations, np.ndarray):
            observations = _tensor(observations, "observations")
        if not isinstance(observations, Tensor):
            if not isinstance(observations, Sequence):
                raise MarlkitError(f"observations must be a tensor, or one per agent, got a {type(observations).__name__}")
            observations = self._padded([_tensor(own, "observations") for own in observations])
        wanted = (self.spec.n_agents, self.spec.observation)
        if observations.shape[-2:] != wanted:
            raise MarlkitError(f"observations must end in [N, O] = {list(wanted)}, got {list(observations.shape)}")
        return observations.to(torch.float32)

    def _padded(self, observations: Sequence[Tensor]) -> Tensor:
        sizes = self.spec.own_observation_sizes
        shapes = [list(own.shape) for own in observations]
        leading = shapes[0][:-1] if shapes else []
        wanted = [[*leading, size] for size in sizes]
        if shapes != wanted:
            named = ", ".join(f"{name}: {size}" for name, size in zip(self.spec.agent_names, sizes, strict=True))
            raise MarlkitError(f"observations must be one tensor [*, o_i] per agent with o_i = {{{named}}}, got shapes {shapes}")
        return torch.stack([torch.nn.functional.pad(own, (0, self.spec.observation - own.shape[-1])) for own in observations], -2)

    def _available(self, action_mask: Array, leading: Sequence[int]) -> Tensor:
        wanted = [*leading, self.spec.n_agents, self.spec.action_features]
        if not self.spec.discrete:
            raise MarlkitError("an action mask is for discrete actions; this team's are continuous")
        action_mask = _tensor(action_mask, "the action mask")
        if list(action_mask.shape) != wanted or action_mask.dtype != torch.bool:
            raise MarlkitError(
                f"the action mask must be bool [*, N, A] = {wanted}, got {action_mask.dtype} {list(action_mask.shape)}"
            )
        return action_mask.reshape(-1, *wanted[-2:])

    def _own_actions(self, rows: Tensor) -> Tensor:
        sizes = torch.tensor(self.spec.own_action_sizes, device=rows.device).unsqueeze(-1)
        own = torch.arange(self.spec.action_features, device=rows.device) < sizes
        return own.expand(len(rows), *own.shape)

    def _bounded(self, action: Tensor) -> Tensor:
        space = self.spec.action
        if not isinstance(space, Continuous) or space.low is None or space.high is None:
            return action
        return torch.maximum(torch.minimum(action, action.new_tensor(space.high)), action.new_tensor(space.low))


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.array(value))  # a copy: some arrays cannot be written to, of which torch would warn
    except (TypeError, ValueError) as error:
        raise MarlkitError(f"{what} must be made of numbers, got a {type(value).__name__} that is not ({error})") from error
