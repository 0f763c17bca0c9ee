"""Agreement of agents on parameters that each holds a copy of (F2A2, Li et al. 2023, section 5).

Each agent i minimises its own cost ``f_i(w_i)`` subject to ``w_i = z_i``, where ``z_i`` is its estimate of the common value. With
the augmented Lagrangian ``sum_i f_i(w_i) + <lam_i, w_i - z_i> + beta/2 |w_i - z_i|^2`` the primal-dual hybrid gradient method
repeats these steps (5.4 of the paper; rewards are negated costs)::

    w_i   <- w_i - step (grad f_i(w_i) + lam_i + beta (w_i - z_i))
    z_i   <- sum_j W_ij w_j
    lam_i <- lam_i + beta (w_i - z_i)

At a fixed point with ``sum_i lam_i = 0``, all copies are equal and ``sum_i grad f_i = 0``: an optimum of the sum. The
copies ``w_i`` are never overwritten by their average. Copies of N agents with P parameters each are stacked, ``[N, P]``; a graph
is a symmetric bool matrix ``[N, N]`` without loops. No intermediate result is larger than those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FOREVER = 2.0**62
"""An interval longer than any training."""

SPARSE = 1 / 8
"""Largest share of non-zero entries for which a sparse product is used."""


def full_graph(n_agents: int) -> Tensor:
    """The complete graph, ``[N, N]`` bool: every two agents are neighbours, ``n (n - 1) / 2`` edges."""
    return ~torch.eye(n_agents, dtype=torch.bool)


def empty_graph(n_agents: int) -> Tensor:
    """The graph without edges, ``[N, N]`` bool."""
    return torch.zeros(n_agents, n_agents, dtype=torch.bool)


def ring_graph(order: Tensor) -> Tensor:
    """Each agent is a neighbour of the next one in ``order``, a permutation ``[N]``; ``[N, N]`` bool.

    N edges; one for N = 2, none for N = 1.
    """
    return graph_of(torch.stack([order, order.roll(-1)], -1), len(order))


def graph_of(edges: Tensor | Sequence[Sequence[int]], n_agents: int) -> Tensor:
    """The graph ``[N, N]`` with the undirected ``edges`` ``[E, 2]``; edges from an agent to itself are ignored."""
    first, second = torch.as_tensor(edges, dtype=torch.int64).reshape(-1, 2).unbind(-1)
    graph = empty_graph(n_agents)
    graph[first, second] = True
    graph[second, first] = True
    return graph.fill_diagonal_(False)


def with_random_edges(graph: Tensor, share: float) -> Tensor:
    """The graph and ``round(share M)`` of the M edges that it lacks, drawn uniformly without replacement.

    On a ring ``M = n (n - 1) / 2 - n``, and ``share = 1`` completes it. Draws from torch's generator.

    Args:
        graph: ``[N, N]`` bool.
        share: share of the missing edges to add, in [0, 1].

    Returns:
        ``[N, N]`` bool.
    """
    missing = (~graph).triu(1).nonzero()
    drawn = missing[torch.randperm(len(missing))[: round(share * len(missing))]]
    return graph | graph_of(drawn, len(graph))


def metropolis_weights(graph: Tensor) -> Tensor:
    """``W_ij = 1 / (1 + max(deg_i, deg_j))`` for neighbours, ``W_ii = 1 - sum_j W_ij``: symmetric, rows and columns sum to 1.

    Source: Xiao, Boyd and Lall (2005), "A scheme for robust distributed sensor fusion based on average consensus".

    Args:
        graph: ``[N, N]`` bool.

    Returns:
        ``[N, N]`` float64.
    """
    degree = graph.sum(-1).double()
    between = graph / (1 + torch.maximum(degree, degree.unsqueeze(-1)))
    return between + torch.diag(1 - between.sum(-1))


def uniform_weights(graph: Tensor) -> Tensor:
    """``W_ij = 1 / (1 + deg_i)`` for neighbours and the agent itself: rows sum to 1, columns only where all degrees are equal.

    Args:
        graph: ``[N, N]`` bool.

    Returns:
        ``[N, N]`` float64.
    """
    closed = graph.double() + torch.eye(len(graph), dtype=torch.float64)
    return closed / closed.sum(-1, keepdim=True)


def combine(weights: Tensor, copies: Tensor) -> Tensor:
    """``sum_j W_mj w_j``: one mean where all weights are equal, a sparse product where most are zero.

    Args:
        weights: ``[M, N]`` on the CPU.
        copies: ``[N, P]`` on any device.

    Returns:
        ``[M, P]``; may be an expanded view, which must not be written to.
    """
    if torch.allclose(weights, weights[0, 0], rtol=0.0, atol=1e-12):
        return (copies.mean(0) * float(weights[0].sum())).expand(len(weights), -1)
    factor = weights.to(copies)
    if int(weights.count_nonzero()) <= SPARSE * weights.numel():
        return torch.sparse.mm(factor.to_sparse(), copies)
    return factor @ copies


def lagrangian_gradient(copies: Tensor, view: Tensor, dual: Tensor, *, penalty: float) -> Tensor:
    """``lam_i + beta (w_i - z_i)``: what the constraint adds to the gradient of ``f_i``; all ``[n, P]``."""
    return torch.add(dual, copies - view, alpha=penalty)


def rows_of(agents: Sequence[int], copies: Tensor) -> Tensor | slice:
    """An index ``[n]`` of the rows of ``agents`` in ``copies`` ``[N, P]``; a slice, which copies nothing, for all in order."""
    all_in_order = list(agents) == list(range(len(copies)))
    return slice(None) if all_in_order else torch.tensor(list(agents), device=copies.device)


def node_dual_change(copies: Tensor, view: Tensor, agents: Sequence[int], *, penalty: float) -> Tensor:
    """``beta (w_i - z_i)`` for ``agents`` and zero for the others (5.4d).

    The changes sum to zero only if all agents exchange at the same time and the weights' columns sum to 1.

    Args:
        copies: ``w``, ``[N, P]``.
        view: ``z`` of ``agents``, ``[n, P]``.
        agents: the agents that exchange.
        penalty: beta.

    Returns:
        The change of ``lam``, ``[N, P]``.
    """
    rows = rows_of(agents, copies)
    change = penalty * (copies[rows] - view)
    return change if isinstance(rows, slice) else torch.zeros_like(copies).index_copy_(0, rows, change)


def edge_dual_change(copies: Tensor, view: Tensor, agents: Sequence[int], weights: Tensor, *, penalty: float) -> Tensor:
    """For each of ``agents`` i and its neighbours j: ``D = beta / 2 W_ij (w_j - w_i)``; ``-D`` for i and ``+D`` for j.

    The changes sum to zero for any set of ``agents`` and any weights. Where all exchange at the same time each edge is used from
    both ends: with symmetric weights the change is then that of :func:`node_dual_change`.

    Args:
        copies: ``w``, ``[N, P]``.
        view: ``z`` of ``agents``, ``[n, P]``.
        agents: the agents that exchange.
        weights: ``W``, ``[N, N]``, on the CPU.
        penalty: beta.

    Returns:
        The change of ``lam``, ``[N, P]``.
    """
    change = node_dual_change(copies, view, agents, penalty=penalty / 2)
    # The sum of D over the agents i, for every j: column sums times w_j, minus the agents' copies weighted by the columns.
    used = weights[list(agents)]
    received = combine(used.T, copies[rows_of(agents, copies)])
    return change.add_(copies * used.sum(0).to(copies).unsqueeze(-1) - received, alpha=penalty / 2)


def gap(copies: Tensor) -> Tensor:
    """``max_i |w_i - mean_j w_j|`` over all parameters of copies ``[N, P]``: a scalar, zero where all are equal."""
    return (copies - copies.mean(0)).abs().max()


def draw_intervals(count: int, *, mean: float, deviation: float) -> Tensor:
    """Steps until each of ``count`` next exchanges: ``max(1, round(k))`` with ``k`` from ``N(mean, deviation)``.

    Draws from torch's generator, unless the deviation is 0.

    Returns:
        ``[count]`` int64.
    """
    if deviation == 0:
        drawn = torch.full((count,), mean, dtype=torch.float64)
    else:
        drawn = torch.normal(mean, deviation, (count,), dtype=torch.float64)
    return drawn.round().clamp(1, FOREVER).long()


def count_messages(graph: Tensor, agents: Sequence[int], *, both_ways: bool) -> int:
    """Number of directed edges that carry a copy when ``agents`` exchange at the same time.

    Every neighbour sends its copy to each of ``agents``. Edge duals also change the duals of the neighbours, which must receive
    the copies of ``agents`` for it (``both_ways``). An edge between two of ``agents`` always carries one copy in each direction.

    Args:
        graph: ``[N, N]`` bool.
        agents: the agents that exchange.
        both_ways: whether ``agents`` also send their copies to their neighbours.
    """
    exchanging = torch.zeros(len(graph), dtype=torch.bool)
    exchanging[list(agents)] = True
    used = graph & exchanging
    return int((used | used.T if both_ways else used).sum())


def message_bytes(messages: int, copies: Tensor) -> int:
    """Size of messages that each hold the P parameters of one row of ``copies`` ``[N, P]``: 4 P bytes in single precision."""
    return messages * copies.shape[-1] * copies.element_size()
