"""Networks of a team: batched products equal separate networks, and gradients reach no other agent's parameters (PS-1, B13)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from marlkit.errors import OptionError
from marlkit.nn.networks import TeamGRU, TeamNetwork, group_of_agents


def network(groups: tuple[int, ...], *, agent_id: bool = True, outputs: int = 2) -> TeamNetwork:
    torch.manual_seed(0)
    return TeamNetwork(
        3, outputs, hidden=[4, 5], groups=groups, activation="tanh", output_gain=1.0, agent_id=agent_id, layer_norm=False
    ).double()


def separately(net: Any, x: torch.Tensor, agent: int) -> torch.Tensor:
    """The network of one agent, written out with plain affine maps."""
    group = net.layers[0].groups[agent]
    for index, layer in enumerate(net.layers):
        x = F.linear(x, layer.weights[group], layer.biases[group])
        if index == 0 and net.identity is not None:
            x = x + net.identity[agent]
        if index < len(net.layers) - 1:
            x = torch.tanh(x)
    return x


@pytest.mark.parametrize("groups", [(0, 0, 0), (0, 1, 2), (0, 1, 0)], ids=["all", "none", "groups"])
def test_batched_networks_equal_a_loop_of_separate_ones(groups: tuple[int, ...]) -> None:
    net = network(groups)
    x = torch.randn(7, 2, 3, 3, dtype=torch.float64)
    expected = torch.stack([separately(net, x[..., agent, :], agent) for agent in range(3)], -2)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x[..., [2, 0], :], [2, 0]), expected[..., [2, 0], :], rtol=0, atol=1e-12)


def test_gradients_do_not_cross_agents_that_share_nothing() -> None:
    net: Any = network((0, 1, 2))
    net(torch.randn(5, 3, 3, dtype=torch.float64))[:, 1].sum().backward()
    for layer in net.layers:
        assert [bool(w.grad.abs().sum() > 0) for w in layer.weights] == [False, True, False]


def test_identity_tells_agents_apart_only_where_they_share() -> None:
    same = torch.ones(1, 3, 3, dtype=torch.float64)
    with_identity, without = network((0, 0, 0))(same), network((0, 0, 0), agent_id=False)(same)
    assert torch.equal(without[0, 0], without[0, 1])
    assert not torch.allclose(with_identity[0, 0], with_identity[0, 1])
    assert network((0, 1, 2)).identity is None


def best_return(net: TeamNetwork) -> float:
    """Maximise the exact expectation of r = 1 iff a1 != a2 for two agents with equal observations."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    same = torch.ones(1, 2, 3, dtype=torch.float64)
    for _ in range(300):
        first, second = net(same)[0].softmax(-1)
        value = first[0] * second[1] + first[1] * second[0]
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    return value.item()


def test_sharing_without_identity_cannot_break_symmetry() -> None:
    assert best_return(network((0, 0), agent_id=False)) == pytest.approx(0.5, abs=1e-6)
    assert best_return(network((0, 0))) > 0.95
    assert best_return(network((0, 1))) > 0.95


def test_groups_must_name_every_agent_once() -> None:
    assert group_of_agents([[0, 2], [1]], 3) == (0, 1, 0)
    for wrong in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]):
        with pytest.raises(OptionError, match="share"):
            group_of_agents(wrong, 3)


def test_recurrent_sequence_equals_steps_with_resets() -> None:
    torch.manual_seed(0)
    gru = TeamGRU(4, (0, 1)).double()
    x, hidden = torch.randn(3, 5, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    is_first = torch.zeros(3, 5, 1, dtype=torch.bool)
    is_first[1, 2] = True
    states = gru(x, hidden, is_first)
    stepped = hidden
    for t in range(5):
        if t == 2:
            stepped = stepped.clone()
            stepped[1] = 0
        stepped = gru(x[:, t], stepped, torch.zeros(3, 1, dtype=torch.bool))
        torch.testing.assert_close(states[:, t], stepped, rtol=0, atol=1e-12)


def test_recurrent_unit_equals_torchs() -> None:
    torch.manual_seed(0)
    gru, cell = TeamGRU(4, (0,)), torch.nn.GRUCell(4, 4)
    cell.weight_ih.data, cell.bias_ih.data = gru.from_input.weights[0].data, gru.from_input.biases[0].data
    cell.weight_hh.data, cell.bias_hh.data = gru.from_hidden.weights[0].data, gru.from_hidden.biases[0].data
    x, hidden = torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    ours = gru(x, hidden, torch.zeros(6, 1, dtype=torch.bool))
    torch.testing.assert_close(ours[:, 0], cell(x[:, 0], hidden[:, 0]), rtol=1e-5, atol=1e-6)
