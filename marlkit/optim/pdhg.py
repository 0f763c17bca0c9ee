"""Primal-dual hybrid gradient: agents learn from what is theirs and agree with their neighbours (F2A2, Li et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marlkit.component import Actor, Critic, Update
from marlkit.contract import Contract, When
from marlkit.errors import OptionError
from marlkit.functional import consensus
from marlkit.learning import Adjust, Learning, Metrics, Minimise
from marlkit.optim._local_copies import LocalCopies
from marlkit.options import NonNegativeFloat, NonNegativeInt, Part, PositiveFloat, Probability
from marlkit.spec import TeamSpec


class PdhgUpdate(Update):
    """Any update, decentralised: each agent's critic is its copy ``w_i`` of one critic, and the copies are drawn together.

    Every gradient step on a copy has ``lam_i + beta (w_i - z_i)`` added to its gradient (after clipping), and after an interval
    of its own steps agent i exchanges copies with its neighbours: ``z_i = sum_j W_ij w_j``, ``lam_i += s (w_i - z_i)``. In
    between ``z_i`` and ``lam_i`` stay what they are. The copies start equal and are never overwritten. Where agents are rewarded
    differently, the critic that they agree on fits the mean of their value targets. An agent without neighbours learns alone.

    Args:
        spec: the team.
        step: how the agents learn.
        share_actor: whether the agents also hold copies of one actor; otherwise each has its own.
        penalty: beta, against losses that are means over the agents; 0.01 to 10, more than
            the costs bend downwards where they are not convex. With 0 each agent learns alone.
        dual: `node`, as in the paper: ``lam_i += s (w_i - z_i)`` at agent i's exchange, which finds the optimum only if all
            exchange at the same time; `edge`: ``s / 2 W_ij (w_j - w_i)`` goes from lam_i to lam_j for every neighbour j, which
            finds it in any case and where all exchange at the same time is the same step.
        dual_step: s, step of the duals; `null`, as in the paper: the penalty.
        pull: share of ``lam_i / beta + w_i - z_i`` by which each of its steps draws a copy, beside what the optimiser does with
            the gradient of the costs; at most 0.5 with ``s = beta``, and an exchange at every step is stable whatever the
            optimiser is. Where it scales gradients, as Adam does, the agents then agree where their scaled gradients sum to
            zero. `null`, as in the paper: penalty and duals are added to the gradient, and the optimiser scales them too.
        topology: who are neighbours: `full`, `ring` (the agents in random order), `none`, or edges such as `[[0, 1], [1, 2]]`.
        extra_edges: share of the edges that a `ring` lacks which are added to it, at random anew for each exchange; with 1 it
            is `full`.
        weights: W: `metropolis`, or `uniform` over an agent and its neighbours, which with the dual by `node` weights agents by
            their number of neighbours.
        interval_mean: steps of an agent from one exchange to the next on average, 1 to 200; `null`: never, as with the topology
            `none`. Without `pull`, an optimiser that takes steps of a limited size, as Adam does, needs some for the copies to
            follow the duals, which else swing back and forth.
        interval_std: deviation of that interval, which is normally distributed, rounded, and at least 1.
    """

    contract = Contract(
        inherits=("step",),
        without=("per_agent",),
        needs={
            "critic": ("separate_parameters",),
            "actor": (When("share_actor=true", ("separate_parameters",)),),
            "step": (When("share_actor=true", ("by_gradient",)),),
        },
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        step: Update,
        share_actor: bool = False,
        penalty: NonNegativeFloat = 0.1,
        dual: Literal["node", "edge"] = "edge",
        dual_step: PositiveFloat | None = None,
        pull: Part | None = None,
        topology: Literal["full", "ring", "none"] | list[tuple[NonNegativeInt, NonNegativeInt]] = "full",
        extra_edges: Probability = 0.0,
        weights: Literal["metropolis", "uniform"] = "metropolis",
        interval_mean: PositiveFloat | None = 1.0,
        interval_std: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(step, PdhgUpdate):
            raise OptionError("step", "cannot be `pdhg` itself: copies would be drawn together twice")
        if extra_edges and topology != "ring":
            raise OptionError("extra_edges", f"adds edges to the topology `ring`, got {extra_edges} with `{topology}`")
        self.spec = spec
        self.step = step
        self.share_actor = share_actor
        self.penalty = penalty
        self.dual_step = penalty if dual_step is None else dual_step
        if pull is not None and not penalty:
            raise OptionError("penalty", f"must be above 0 with `pull`, got {penalty}")
        self.pull = pull
        self.by_edge = dual == "edge"
        self.extra_edges = extra_edges
        self.weights_of = consensus.metropolis_weights if weights == "metropolis" else consensus.uniform_weights
        if interval_mean is None:
            topology = "none"
        self.interval = {"mean": 1.0 if interval_mean is None else interval_mean, "deviation": interval_std}
        self.graph = _graph(topology, spec.n_agents)
        self.is_random = topology == "ring"
        self.copies = nn.ModuleDict()
        self.messages = 0
        self.bytes = 0

    def attach(self, actor: Actor, critic: Critic) -> None:
        """Draw the order of the agents in a ring, make the copies equal, and start what is kept of them."""
        if self.is_random:
            order = torch.randperm(self.spec.n_agents)
            self.graph = self.graph[order][:, order]
        networks: dict[str, Actor | Critic] = {"critic": critic, "actor": actor} if self.share_actor else {"critic": critic}
        for name, network in networks.items():
            leaves = [list(network.shared_parameters(agent)) for agent in range(self.spec.n_agents)]
            self.copies[name] = LocalCopies(name, leaves, self._intervals(self.spec.n_agents))
        self.step.attach(actor, critic)

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """The wrapped update on a batch ``[*, T]``, its optimiser steps followed by exchanges."""
        sent = self.messages, self.bytes
        agreeing = replace(learning, minimise=self._minimise(learning))
        metrics = self.step.update(batch, agreeing)
        return metrics | self._metrics(self.messages - sent[0], self.bytes - sent[1])

    def _minimise(self, learning: Learning) -> Minimise:
        neighboured = set(self.graph.any(-1).nonzero().flatten().tolist())

        def minimise(loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
            stepping: dict[str, list[int]] = {}

            def adjust_both() -> None:
                if adjust is not None:
                    adjust()
                for name, copies in self._copies():
                    stepping[name] = [agent for agent in copies.reached() if agent in neighboured]
                    if self.pull is None:
                        copies.add_gradient(stepping[name], self.penalty)
                    else:
                        copies.draw_together(stepping[name], self.penalty, self.pull)

            def exchange() -> None:
                due = {name: copies.due(stepping[name]) for name, copies in self._copies()}
                if any(due.values()):
                    with learning.ranks.common():
                        self._exchange(due)

            metrics = learning.minimise(loss, max_grad_norm, adjust_both)
            learning.afterwards(exchange)
            return metrics

        return minimise

    def _exchange(self, due: dict[str, list[int]]) -> None:
        """Let those who are ``due`` exchange copies, of every network over the same graph."""
        graph = consensus.with_random_edges(self.graph, self.extra_edges) if self.extra_edges else self.graph
        weights = self.weights_of(graph)
        for name, copies in self._copies():
            agents = due[name]
            if agents:
                exchanged = copies.exchange(agents, weights, dual_step=self.dual_step, by_edge=self.by_edge)
                messages = consensus.count_messages(graph, agents, both_ways=self.by_edge)
                self.messages += messages
                self.bytes += consensus.message_bytes(messages, exchanged)
                copies.wait(agents, self._intervals(len(agents)))

    def _intervals(self, count: int) -> Tensor:
        return consensus.draw_intervals(count, **self.interval)

    def _copies(self) -> list[tuple[str, LocalCopies]]:
        return [(name, copies) for name, copies in self.copies.items() if isinstance(copies, LocalCopies)]

    @torch.no_grad()
    def _metrics(self, messages: int, sent: int) -> Metrics:
        """How far the copies are apart, how large the duals and their sum are, and what this update has sent."""
        kept = [copies for _, copies in self._copies()]
        gaps = [consensus.gap(copies.values(range(self.spec.n_agents))) for copies in kept]
        dual = torch.cat([copies.dual for copies in kept], -1)
        return {
            "consensus/gap": torch.stack(gaps).max(),
            "consensus/dual": dual.norm(),
            "consensus/dual_sum": dual.sum(0).norm(),
            "consensus/bytes": dual.new_tensor(float(sent)),
            "consensus/messages": dual.new_tensor(float(messages)),
        }

    def get_extra_state(self) -> dict[str, Any]:
        """The graph, whose order is random, and what has been sent."""
        return {"graph": self.graph, "messages": self.messages, "bytes": self.bytes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_extra_state`."""
        self.graph = state["graph"].cpu()
        self.messages, self.bytes = state["messages"], state["bytes"]


def _graph(topology: str | list[tuple[int, int]], n_agents: int) -> Tensor:
    if topology == "full":
        return consensus.full_graph(n_agents)
    if topology == "ring":
        return consensus.ring_graph(torch.arange(n_agents))
    if topology == "none":
        return consensus.empty_graph(n_agents)
    assert not isinstance(topology, str)
    named: set[frozenset[int]] = set()
    for first, second in topology:
        edge, which = frozenset((first, second)), f"edge [{first}, {second}]"
        if max(edge) >= n_agents:
            raise OptionError("topology", f"{which} names an agent that is not there: they are numbered 0 to {n_agents - 1}")
        if len(edge) == 1:
            raise OptionError("topology", f"{which} goes from an agent to itself")
        if edge in named:
            raise OptionError("topology", f"{which} is named twice; edges go both ways")
        named.add(edge)
    return consensus.graph_of([list(edge) for edge in topology], n_agents)
