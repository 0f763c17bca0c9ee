"""The pure functions of consensus: graphs, weights, averages, duals, intervals, messages; and their fixed points (PD-1, PD-2)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from quadratics import Quadratics, quadratics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marlkit.functional import consensus

N = 8
STAR = consensus.graph_of([[0, agent] for agent in range(1, N)], N)
DOUBLE = torch.float64


def edges_of(graph: Tensor) -> set[tuple[int, int]]:
    """The undirected edges, read entry by entry; the matrix must be symmetric and without loops."""
    rows = graph.tolist()
    assert all(rows[i][j] == rows[j][i] for i in range(len(rows)) for j in range(len(rows)))
    assert not any(rows[i][i] for i in range(len(rows)))
    return {(i, j) for i, j in itertools.combinations(range(len(rows)), 2) if rows[i][j]}


def is_connected(graph: Tensor) -> bool:
    """Whether a walk from agent 0 reaches every agent."""
    seen, waiting = {0}, [0]
    while waiting:
        here = waiting.pop()
        for other, joined in enumerate(graph[here].tolist()):
            if joined and other not in seen:
                seen.add(other)
                waiting.append(other)
    return len(seen) == len(graph)


# --- graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "edges"), [(1, 0), (2, 1), (3, 3), (4, 4), (8, 8), (31, 31)])
def test_a_ring_has_as_many_edges_as_agents_and_is_connected(n: int, edges: int) -> None:
    torch.manual_seed(n)
    order = torch.randperm(n)
    graph = consensus.ring_graph(order)
    assert len(edges_of(graph)) == edges
    assert is_connected(graph)
    for first, second in zip(order.tolist(), order.roll(-1).tolist(), strict=True):
        assert graph[first, second] == (first != second)


def test_full_and_empty_graphs() -> None:
    for n in (1, 2, 5, 8):
        assert edges_of(consensus.full_graph(n)) == set(itertools.combinations(range(n), 2))
        assert edges_of(consensus.empty_graph(n)) == set()


def test_a_graph_of_edges() -> None:
    assert edges_of(consensus.graph_of([[3, 1], [0, 1]], 4)) == {(1, 3), (0, 1)}
    assert edges_of(consensus.graph_of([], 4)) == set()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_random_edges_are_as_many_as_asked_distinct_and_new(n: int, share: float) -> None:
    torch.manual_seed(0)
    ring = consensus.ring_graph(torch.randperm(n))
    found = edges_of(consensus.with_random_edges(ring, share))
    assert found >= edges_of(ring)
    lacking = max(0, n * (n - 1) // 2 - n)
    assert len(found - edges_of(ring)) == round(share * lacking)
    if share == 1:
        assert found == set(itertools.combinations(range(n), 2))


def test_random_edges_are_drawn_again_and_evenly() -> None:
    torch.manual_seed(0)
    ring = consensus.ring_graph(torch.randperm(N))
    draws = [frozenset(edges_of(consensus.with_random_edges(ring, 0.25)) - edges_of(ring)) for _ in range(400)]
    count = Counter(edge for drawn in draws for edge in drawn)
    assert len(set(draws)) > 300
    assert set(count) == set(itertools.combinations(range(N), 2)) - edges_of(ring)
    # Each of the 20 is among the 5 drawn with probability 1/4: 100 times of 400, deviation sqrt(400 / 4 * 3 / 4) = 8.7.
    assert all(abs(times - 100) < 5 * 8.7 for times in count.values())


# --- weights --------------------------------------------------------------------------------------------------------------


def some_graphs() -> list[Tensor]:
    torch.manual_seed(1)
    random = [consensus.graph_of((torch.rand(N, N) < 0.3).nonzero(), N) for _ in range(5)]
    ring = consensus.ring_graph(torch.randperm(N))
    return [consensus.full_graph(N), consensus.empty_graph(N), ring, STAR, consensus.with_random_edges(ring, 0.4), *random]


def test_metropolis_weights_are_symmetric_and_doubly_stochastic() -> None:
    for graph in some_graphs():
        weights = consensus.metropolis_weights(graph)
        degree = [sum(row) for row in graph.tolist()]
        for i, j in itertools.permutations(range(N), 2):
            assert weights[i, j].item() == pytest.approx(graph.tolist()[i][j] / (1 + max(degree[i], degree[j])))
        assert torch.equal(weights, weights.T)
        assert (weights >= 0).all()
        for axis in (0, 1):
            assert torch.allclose(weights.sum(axis), torch.ones(N, dtype=DOUBLE), rtol=0, atol=1e-14)


def test_uniform_weights_average_the_closed_neighbourhood() -> None:
    for graph in some_graphs():
        weights = consensus.uniform_weights(graph)
        for i in range(N):
            near = [j for j in range(N) if graph[i, j] or i == j]
            expected = [1 / len(near) if j in near else 0.0 for j in range(N)]
            assert weights[i].tolist() == pytest.approx(expected, abs=1e-15)


def test_both_weights_are_equal_on_regular_graphs_and_differ_on_a_star() -> None:
    for graph in (consensus.full_graph(N), consensus.ring_graph(torch.arange(N))):
        both = consensus.metropolis_weights(graph), consensus.uniform_weights(graph)
        assert torch.allclose(*both, rtol=0, atol=1e-15)
    assert consensus.uniform_weights(STAR)[3].tolist() == [0.5, 0, 0, 0.5, 0, 0, 0, 0]
    assert consensus.metropolis_weights(STAR)[3].tolist() == [0.125, 0, 0, 0.875, 0, 0, 0, 0]


# --- averages and duals ---------------------------------------------------------------------------------------------------


def weight_matrices() -> list[Any]:
    """Weights for each branch of the product: all equal, mostly zero, neither; square and not."""
    ring = consensus.metropolis_weights(consensus.ring_graph(torch.arange(40)))
    full = consensus.metropolis_weights(consensus.full_graph(40))
    dense = torch.rand(40, 40, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    named = {"ring": ring, "full": full, "dense": dense}
    rows = {f"{name}-rows": weights[[5, 2, 30]] for name, weights in named.items()}
    columns = {f"{name}-columns": weights.T[:, [7]] for name, weights in named.items()}
    return [pytest.param(weights, id=name) for name, weights in (named | rows | columns).items()]


@pytest.mark.parametrize("weights", weight_matrices())
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_combine_is_the_weighted_sum(weights: Tensor, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    copies = torch.randn(weights.shape[1], 3, dtype=dtype)
    expected = [
        [sum(w * copies[j, p].item() for j, w in enumerate(row)) for p in range(3)] for row in weights.tolist()
    ]  # fmt: skip
    found = consensus.combine(weights, copies)
    assert found.dtype == dtype
    tolerance = 1e-13 if dtype == DOUBLE else 1e-5
    assert np.allclose(found.numpy(), np.array(expected), rtol=0, atol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("graph", [consensus.full_graph(64), consensus.ring_graph(torch.arange(64))], ids=["full", "ring"])
@pytest.mark.parametrize("agents", [list(range(64)), [3, 50]], ids=["all", "two"])
def test_nothing_is_larger_than_the_copies(graph: Tensor, agents: list[int]) -> None:
    copies = torch.randn(64, 500)
    weights = consensus.metropolis_weights(graph)
    with LargestTensor() as noted:
        view = consensus.combine(weights[agents], copies)
        consensus.edge_dual_change(copies, view, agents, weights, penalty=0.1)
    assert noted.largest == copies.numel()


def test_what_is_added_to_the_gradient_is_that_of_the_lagrangian() -> None:
    torch.manual_seed(0)
    copies, view, dual = torch.randn(3, N, 5, dtype=DOUBLE).unbind()
    copies.requires_grad_()
    lagrangian = (dual * (copies - view)).sum() + 0.7 / 2 * (copies - view).square().sum()
    (expected,) = torch.autograd.grad(lagrangian, copies)
    found = consensus.lagrangian_gradient(copies.detach(), view, dual, penalty=0.7)
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("agents", [list(range(N)), [2], [7, 0, 3]])
@pytest.mark.parametrize("weights_of", [consensus.metropolis_weights, consensus.uniform_weights])
def test_dual_steps_are_those_of_a_loop_over_agents_and_neighbours(
    agents: list[int], weights_of: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    copies = torch.randn(N, 5, dtype=DOUBLE)
    for graph in some_graphs():
        weights = weights_of(graph)
        w, W = copies.numpy(), weights.numpy()
        view = consensus.combine(weights[agents], copies)
        node, edge = np.zeros((N, 5)), np.zeros((N, 5))
        for i in agents:
            node[i] = 0.3 * (w[i] - sum(W[i, j] * w[j] for j in range(N)))
            for j in range(N):
                if graph[i, j]:
                    moved = 0.3 / 2 * W[i, j] * (w[j] - w[i])
                    edge[i] -= moved
                    edge[j] += moved
        found = consensus.node_dual_change(copies, view, agents, penalty=0.3)
        assert np.allclose(found.numpy(), node, rtol=0, atol=1e-14)
        found = consensus.edge_dual_change(copies, view, agents, weights, penalty=0.3)
        assert np.allclose(found.numpy(), edge, rtol=0, atol=1e-14)
        assert found.sum(0).abs().max() < 1e-14


def test_where_all_exchange_the_duals_by_edge_and_by_node_move_alike() -> None:
    copies = torch.randn(N, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for graph in some_graphs():
        weights = consensus.metropolis_weights(graph)
        view = consensus.combine(weights, copies)
        node = consensus.node_dual_change(copies, view, range(N), penalty=0.3)
        edge = consensus.edge_dual_change(copies, view, range(N), weights, penalty=0.3)
        assert torch.allclose(edge, node, rtol=0, atol=1e-14)


def test_gap_is_the_largest_distance_from_the_mean() -> None:
    copies = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, -7.0]])
    assert consensus.gap(copies).item() == 6.0
    assert consensus.gap(copies[:1]).item() == 0.0


# --- intervals and messages -----------------------------------------------------------------------------------------------


def test_intervals_are_rounded_normal_and_at_least_one() -> None:
    torch.manual_seed(0)
    drawn = consensus.draw_intervals(20000, mean=200.0, deviation=30.0)
    assert drawn.dtype == torch.int64
    assert abs(drawn.double().mean().item() - 200) < 5 * 30 / 20000**0.5
    assert abs(drawn.double().std().item() - 30) < 5 * 30 / (2 * 20000) ** 0.5
    few = consensus.draw_intervals(20000, mean=2.0, deviation=2.0)
    assert few.min() == 1
    # P(k <= 1.5) of N(2, 2) is Phi(-1/4) = 0.4013.
    assert abs((few == 1).double().mean().item() - 0.4013) < 5 * (0.24 / 20000) ** 0.5


def test_intervals_without_deviation_draw_nothing() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert consensus.draw_intervals(3, mean=1.0, deviation=0.0).tolist() == [1, 1, 1]
    assert consensus.draw_intervals(2, mean=2.6, deviation=0.0).tolist() == [3, 3]
    assert consensus.draw_intervals(2, mean=0.2, deviation=0.0).tolist() == [1, 1]
    assert consensus.draw_intervals(1, mean=1e30, deviation=0.0).item() > 10**18
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("agents", [[], [2], [0, 5, 6], list(range(N))])
def test_messages_are_the_directed_edges_used(agents: list[int]) -> None:
    for graph in some_graphs():
        to_asking = {(j, i) for i in agents for j in range(N) if graph[i, j]}
        there_and_back = to_asking | {(i, j) for j, i in to_asking}
        assert consensus.count_messages(graph, agents, both_ways=False) == len(to_asking)
        assert consensus.count_messages(graph, agents, both_ways=True) == len(there_and_back)


def test_messages_of_all_by_hand() -> None:
    ring = consensus.ring_graph(torch.arange(N))
    for both_ways in (False, True):
        count = [
            consensus.count_messages(g, range(N), both_ways=both_ways) for g in (consensus.full_graph(N), ring, STAR)
        ]  # fmt: skip
        assert count == [56, 16, 14]
        assert consensus.count_messages(consensus.empty_graph(N), range(N), both_ways=both_ways) == 0


def test_a_message_holds_a_copy() -> None:
    assert consensus.message_bytes(56, torch.zeros(N, 100)) == 56 * 4 * 100
    assert consensus.message_bytes(3, torch.zeros(N, 7, dtype=DOUBLE)) == 3 * 8 * 7


# --- where it leads -------------------------------------------------------------------------------------------------------


def descend(
    problem: Quadratics,
    graph: Callable[[], Tensor],
    steps: int,
    *,
    weights_of: Callable[[Tensor], Tensor] = consensus.metropolis_weights,
    by_edge: bool = False,
    penalty: float = 1.0,
    rate: float = 0.1,
    interval: tuple[float, float] = (1.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """Copies and duals after gradient steps from zero, each agent exchanging at its own intervals."""
    n_agents = len(problem.target)
    copies = torch.zeros(problem.target.shape, dtype=DOUBLE)
    view, dual = copies.clone(), copies.clone()
    draw = {"mean": interval[0], "deviation": interval[1]}
    waits = consensus.draw_intervals(n_agents, **draw)
    for _ in range(steps):
        gradient = problem.gradients(copies) + consensus.lagrangian_gradient(copies, view, dual, penalty=penalty)
        copies = copies - rate * gradient
        waits -= 1
        agents: Sequence[int] = (waits == 0).nonzero().flatten().tolist()
        if agents:
            weights = weights_of(graph())
            view[agents] = consensus.combine(weights[agents], copies)
            if by_edge:
                dual += consensus.edge_dual_change(copies, view[agents], agents, weights, penalty=penalty)
            else:
                dual += consensus.node_dual_change(copies, view[agents], agents, penalty=penalty)
            waits[agents] = consensus.draw_intervals(len(agents), **draw)
    return copies, dual


def random_ring() -> Tensor:
    return consensus.ring_graph(torch.tensor([3, 0, 6, 1, 7, 2, 5, 4]))


GRAPHS: dict[str, Callable[[], Tensor]] = {
    "full": lambda: consensus.full_graph(N),
    "ring": random_ring,
    "star": lambda: STAR,
    "ring with random edges": lambda: consensus.with_random_edges(random_ring(), 0.3),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("by_edge", [False, True], ids=["node", "edge"])
def test_the_optimum_of_the_sum_is_reached(graph: str, by_edge: bool) -> None:
    """PD-1."""
    torch.manual_seed(0)
    problem = quadratics()
    copies, dual = descend(problem, GRAPHS[graph], 800, by_edge=by_edge)
    optimum = torch.from_numpy(problem.optimum(np.ones(N))).expand(N, -1)
    assert (copies - optimum).abs().max() < 1e-8
    assert dual.sum(0).abs().max() < 1e-10
    assert (dual + problem.gradients(optimum)).abs().max() < 1e-7


def test_uniform_weights_on_a_star_count_agents_by_their_neighbours() -> None:
    """PD-1: row-stochastic weights and duals by node lead to the optimum of ``sum_i (deg_i + 1) f_i``."""
    problem = quadratics()
    copies, dual = descend(problem, lambda: STAR, 800, weights_of=consensus.uniform_weights)
    biased = problem.optimum([8, *[2] * 7])
    assert np.abs(copies.numpy() - biased).max() < 1e-8
    assert np.abs(biased - problem.optimum(np.ones(N))).max() > 0.1
    assert dual.sum(0).abs().max() > 0.1
    copies, _ = descend(problem, lambda: STAR, 800, weights_of=consensus.uniform_weights, by_edge=True)
    assert np.abs(copies.numpy() - problem.optimum(np.ones(N))).max() < 1e-8


def test_without_penalty_every_agent_finds_its_own_optimum() -> None:
    """PD-1."""
    problem = quadratics()
    for by_edge in (False, True):
        copies, dual = descend(problem, GRAPHS["full"], 600, penalty=0.0, by_edge=by_edge)
        assert np.abs(copies.numpy() - problem.target).max() < 1e-8
        assert not dual.any()


@pytest.mark.parametrize(
    ("interval", "steps", "graph"), [((8.0, 4.0), 1000, "full"), ((8.0, 4.0), 1800, "ring"), ((200.0, 100.0), 12000, "ring")]
)
def test_exchanges_at_different_times(interval: tuple[float, float], steps: int, graph: str) -> None:
    """PD-2: edge duals still reach the optimum; node duals reach agreement on another value."""
    torch.manual_seed(0)
    problem = quadratics()
    optimum = problem.optimum(np.ones(N))
    copies, dual = descend(problem, GRAPHS[graph], steps, by_edge=True, penalty=2.0, interval=interval)
    assert np.abs(copies.numpy() - optimum).max() < 1e-5
    assert dual.sum(0).abs().max() < 1e-10
    copies, dual = descend(problem, GRAPHS[graph], steps, by_edge=False, penalty=2.0, interval=interval)
    assert consensus.gap(copies) < 1e-6
    assert np.abs(copies.numpy() - optimum).max() > 0.01
    assert dual.sum(0).abs().max() > 0.1
