"""Unmodified VMAS, with the agents' tensors stacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vmas import make_env


class Simulator:
    """``envs`` copies of a scenario; nothing is reset before :meth:`reset` is called.

    Args:
        scenario: its name.
        envs: number of copies B.
        device: where.
        continuous: whether actions are forces, or numbers.
        options: of the scenario.
    """

    def __init__(self, scenario: str, envs: int, device: torch.device, *, continuous: bool = True, **options: Any) -> None:
        self.env = make_env(scenario, num_envs=envs, device=device, continuous_actions=continuous, seed=0, **options)
        self.continuous = continuous
        space = self.env.action_space[0]
        self.actions: int = self.env.get_agent_action_size(self.env.agents[0]) if continuous else int(space.n)
        """Dimensions of an action, or how many there are."""
        _, self.agents, self.features = self.reset().shape

    def reset(self) -> Tensor:
        """Reset every copy; returns observations ``[B, N, O]``."""
        return torch.stack(self.env.reset(), 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions ``[B, N, D]``, clipped to [-1, 1], or numbers ``[B, N, 1]`` give observations, rewards and ends.

        These are ``[B, N, O]``, ``[B, N]`` and ``[B]``.
        """
        action = action.clamp(-1, 1) if self.continuous else action
        observation, reward, done, _ = self.env.step(list(action.unbind(1)))
        return torch.stack(observation, 1), torch.stack(reward, 1), done
