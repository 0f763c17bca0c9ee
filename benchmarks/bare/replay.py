"""A ring buffer of played steps, every quantity in one tensor ``[steps, environments, *]``."""

from __future__ import annotations

import torch
from torch import Tensor


class Replay:
    """Keeps the latest steps of every environment.

    Args:
        steps: C, how many of each.
        envs: B.
        shapes: of a step's quantities behind ``[C, B]``.
        device: where.
    """

    def __init__(self, steps: int, envs: int, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        self.steps, self.envs, self.device = steps, envs, device
        self.kept = {name: torch.zeros(steps, envs, *shape, device=device) for name, shape in shapes.items()}
        self.played = 0

    def add(self, **quantities: Tensor) -> None:
        """Store one step of every environment."""
        for name, value in quantities.items():
            self.kept[name][self.played % self.steps] = value
        self.played += 1

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Numbers of steps, counted since the start of all, and environments: uniform over the stored steps."""
        oldest = max(0, self.played - self.steps)
        step = torch.randint(oldest, self.played, (count,), device=self.device)
        return step, torch.randint(self.envs, (count,), device=self.device)

    def take(self, name: str, step: Tensor, env: Tensor) -> Tensor:
        """A quantity of some steps."""
        return self.kept[name][step % self.steps, env]
