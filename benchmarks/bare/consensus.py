"""Copies of one critic that agree with their neighbours on a ring, in the bare loop of F2A2."""

from __future__ import annotations

import torch
from torch import Tensor

PENALTY = 0.1
INTERVAL_MEAN, INTERVAL_DEVIATION = 50.0, 25.0


class Agreement:
    """Duals and views of copies ``[N, P]``.

    Args:
        copies: all equal.
    """

    def __init__(self, copies: Tensor) -> None:
        agents = len(copies)
        order = torch.randperm(agents)
        graph = torch.zeros(agents, agents, dtype=torch.bool)
        graph[order, order.roll(1)] = graph[order.roll(1), order] = True
        graph.fill_diagonal_(False)
        degree = graph.sum(1)
        weights = graph / (1 + torch.maximum(degree, degree.unsqueeze(1)))
        self.weights = (weights + torch.diag(1 - weights.sum(1))).to(copies)
        self.view, self.dual = copies.detach().clone(), torch.zeros_like(copies)
        self.wait = self._drawn(agents)

    def add_gradient(self, copies: Tensor) -> None:
        """``lam_i + beta (w_i - z_i)``."""
        assert copies.grad is not None
        copies.grad.add_(self.dual).add_(copies.detach() - self.view, alpha=PENALTY)

    def after_step(self, copies: Tensor) -> None:
        """Let the agents whose interval has passed exchange copies with their neighbours."""
        self.wait -= 1
        due = self.wait <= 0
        if due.any():
            self.exchange(copies.detach(), due.nonzero().squeeze(1))
            self.wait[due] = self._drawn(int(due.sum()))

    def exchange(self, copies: Tensor, agents: Tensor) -> None:
        """``z_i = sum_j W_ij w_j``; ``beta / 2 W_ij (w_j - w_i)`` goes from ``lam_i`` to ``lam_j``."""
        agents = agents.to(copies.device)
        used = self.weights[agents]
        self.view[agents] = used @ copies
        self.dual[agents] += PENALTY / 2 * (copies[agents] - self.view[agents])
        self.dual += PENALTY / 2 * (used.sum(0).unsqueeze(1) * copies - used.T @ copies[agents])

    def _drawn(self, count: int) -> Tensor:
        return torch.normal(INTERVAL_MEAN, INTERVAL_DEVIATION, (count,)).round().clamp(min=1)
