"""Unmodified VMAS, with the agents' tensors stacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vmas import make_env


class Simulator:
    """``envs`` copies of a scenario with continuous actions; nothing is reset before :meth:`reset` is called.

    Args:
        scenario: its name.
        envs: number of copies B.
        device: where.
        options: of the scenario.
    """

    def __init__(self, scenario: str, envs: int, device: torch.device, **options: Any) -> None:
        self.env = make_env(scenario, num_envs=envs, device=device, continuous_actions=True, seed=0, **options)
        self.actions: int = self.env.get_agent_action_size(self.env.agents[0])
        _, self.agents, self.features = self.reset().shape

    def reset(self) -> Tensor:
        """Reset every copy; returns observations ``[B, N, O]``."""
        return torch.stack(self.env.reset(), 1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions ``[B, N, D]``, clipped to [-1, 1], give observations ``[B, N, O]``, rewards ``[B, N]`` and ends ``[B]``."""
        observation, reward, done, _ = self.env.step(list(action.clamp(-1, 1).unbind(1)))
        return torch.stack(observation, 1), torch.stack(reward, 1), done
