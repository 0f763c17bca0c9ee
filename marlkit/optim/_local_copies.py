"""The copies of one network that the agents hold, with what each agent keeps to agree with the others (F2A2, Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marlkit.errors import MarlkitError
from marlkit.functional import consensus


class LocalCopies(nn.Module):
    """A network of which every agent has its own leaf parameters, seen as copies ``w`` ``[N, P]`` of one.

    The parameters stay those of the network; kept here are ``dual`` (lam, zero at first) and ``view`` (z, equal to the copies at
    first), both ``[N, P]``, and how many steps are left until each agent's next exchange. These are counted in plain numbers on
    the CPU: reading them from a GPU would wait for it.

    Args:
        name: of the network, for messages.
        leaves: the parameters of each agent, in one order; those of all agents are set to those of the first.
        intervals: steps until each agent's first exchange, ``[N]`` int64.

    Raises:
        MarlkitError: the agents' parameters do not correspond.
    """

    dual: Tensor
    view: Tensor

    def __init__(self, name: str, leaves: Sequence[Sequence[nn.Parameter]], intervals: Tensor) -> None:
        super().__init__()
        self.leaves = [list(own) for own in leaves]
        self._refuse_unequal(name)
        with torch.no_grad():
            for own in self.leaves[1:]:
                for parameter, first in zip(own, self.leaves[0], strict=True):
                    parameter.copy_(first)
        self.register_buffer("view", self.values(range(len(self.leaves))))
        self.register_buffer("dual", torch.zeros_like(self.view))
        self.waits: list[int] = intervals.tolist()

    def _refuse_unequal(self, name: str) -> None:
        shapes = [[tuple(parameter.shape) for parameter in own] for own in self.leaves]
        for agent, own in enumerate(shapes):
            if own != shapes[0] or not own:
                raise MarlkitError(
                    f"agents can only agree on parameters that correspond, but the {name} keeps parameters of shapes {own} for "
                    f"agent {agent} and {shapes[0]} for agent 0"
                )

    @torch.no_grad()
    def values(self, agents: Sequence[int]) -> Tensor:
        """The copies of ``agents``, ``[n, P]``; new memory."""
        flat = torch.cat([parameter.reshape(-1) for agent in agents for parameter in self.leaves[agent]])
        return flat.view(len(agents), -1)

    def reached(self) -> list[int]:
        """The agents of whose parameters any has a gradient."""
        return [agent for agent, own in enumerate(self.leaves) if any(parameter.grad is not None for parameter in own)]

    @torch.no_grad()
    def add_gradient(self, agents: Sequence[int], penalty: float) -> None:
        """Add the gradient of penalty and dual where ``agents`` have a gradient."""
        pairs = [(p.grad, piece) for p, piece in self._added(agents, penalty) if p.grad is not None]
        if pairs:
            torch._foreach_add_([gradient for gradient, _ in pairs], [piece for _, piece in pairs])

    @torch.no_grad()
    def draw_together(self, agents: Sequence[int], penalty: float, pull: float) -> None:
        """Move the copies of ``agents`` by ``-pull (lam / beta + w - z)`` where they have a gradient."""
        pairs = [(p, piece) for p, piece in self._added(agents, penalty) if p.grad is not None]
        if pairs:
            torch._foreach_add_([parameter for parameter, _ in pairs], [piece for _, piece in pairs], alpha=-pull / penalty)

    def _added(self, agents: Sequence[int], penalty: float) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters of ``agents``, each with the gradient of penalty and dual by it."""
        if not agents:
            return []
        rows = consensus.rows_of(agents, self.dual)
        added = consensus.lagrangian_gradient(self.values(agents), self.view[rows], self.dual[rows], penalty=penalty)
        parameters = [parameter for agent in agents for parameter in self.leaves[agent]]
        pieces = added.view(-1).split([parameter.numel() for parameter in parameters])
        return [(p, piece.view_as(p)) for p, piece in zip(parameters, pieces, strict=True)]

    def due(self, agents: Sequence[int]) -> list[int]:
        """Those of ``agents``, who all have taken a step, who exchange after it."""
        for agent in agents:
            self.waits[agent] -= 1
        return [agent for agent in agents if self.waits[agent] == 0]

    @torch.no_grad()
    def exchange(self, agents: Sequence[int], weights: Tensor, *, dual_step: float, by_edge: bool) -> Tensor:
        """Let ``agents`` average the copies of their neighbours and move the duals; returns the copies ``[N, P]``."""
        copies = self.values(range(len(self.leaves)))
        view = consensus.combine(weights[list(agents)], copies)
        self.view[consensus.rows_of(agents, copies)] = view
        if by_edge:
            self.dual += consensus.edge_dual_change(copies, view, agents, weights, penalty=dual_step)
        else:
            self.dual += consensus.node_dual_change(copies, view, agents, penalty=dual_step)
        return copies

    def wait(self, agents: Sequence[int], intervals: Tensor) -> None:
        """Let ``agents``, who have just exchanged, wait for ``intervals`` ``[n]`` of their own steps."""
        for agent, interval in zip(agents, intervals.tolist(), strict=True):
            self.waits[agent] = interval

    def get_extra_state(self) -> Tensor:
        """Steps until each agent's next exchange."""
        return torch.tensor(self.waits)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from :meth:`get_extra_state`."""
        self.waits = state.tolist()
