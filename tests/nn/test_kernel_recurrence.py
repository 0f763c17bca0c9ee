"""Gated recurrent units over whole sequences: values and derivatives, and agreement with the step-by-step form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marlkit.nn.kernels.recurrence import recurrence, step_by_step
from marlkit.nn.networks import TeamGRU


def arguments(
    networks: int, steps: int, sequences: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gates, hidden state, where sequences continue, weight and bias; all but the flags require gradients."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    keep = torch.ones(steps, sequences, 1, dtype=torch.bool)
    keep[steps // 2, 0] = keep[steps - 1, -1] = False
    return (
        drawn(networks, steps, sequences, 3 * size),
        drawn(networks, sequences, size),
        keep,
        drawn(networks, 3 * size, size),
        drawn(networks, 3 * size),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_two_steps_by_hand() -> None:
    gates = torch.tensor([[[[0.1, 0.2, 0.3]], [[0.4, 0.5, 0.6]]]], dtype=torch.float64)
    hidden, keep = torch.full((1, 1, 1), 0.5, dtype=torch.float64), torch.ones(2, 1, 1)
    weight = torch.tensor([[[1.0], [2.0], [3.0]]], dtype=torch.float64)
    bias = torch.tensor([[0.01, 0.02, 0.03]], dtype=torch.float64)
    expected, state = [], 0.5
    for reset_in, update_in, new_in in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)):
        reset, update = sigmoid(reset_in + state + 0.01), sigmoid(update_in + 2 * state + 0.02)
        new = math.tanh(new_in + reset * (3 * state + 0.03))
        state = (1 - update) * new + update * state
        expected.append(state)
    found = recurrence(gates, hidden, keep, weight, bias)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_sequence_that_starts_again_has_no_memory() -> None:
    gates, hidden, keep, weight, bias = (tensor.detach() for tensor in arguments(2, 4, 3, 5))
    states = recurrence(gates, hidden, keep, weight, bias)
    fresh = recurrence(gates[:, 2:, :1], torch.zeros_like(hidden[:, :1]), keep[2:, :1], weight, bias)
    torch.testing.assert_close(states[:, 2:, :1], fresh, rtol=0, atol=1e-15)
    other = recurrence(gates, hidden + 1, keep, weight, bias)
    assert torch.equal(other[:, 2:, 0], states[:, 2:, 0])
    assert not torch.equal(other[:, 2:, 1], states[:, 2:, 1])


@pytest.mark.parametrize(("networks", "steps", "sequences"), [(1, 1, 2), (3, 4, 2)])
def test_derivatives_of_first_and_second_order(networks: int, steps: int, sequences: int) -> None:
    given = arguments(networks, steps, sequences, 2)
    assert torch.autograd.gradcheck(recurrence, given)
    assert torch.autograd.gradgradcheck(recurrence, given)


def test_an_argument_may_be_made_of_another() -> None:
    _, hidden, keep, weight, bias = arguments(2, 4, 3, 2)
    states = recurrence(hidden.unsqueeze(1).repeat(1, 4, 1, 3), hidden * 2, keep, weight, bias)
    once, twice = (
        torch.autograd.grad(states.square().sum(), hidden, retain_graph=True, create_graph=c)[0] for c in (False, True)
    )
    torch.testing.assert_close(once, twice, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("learning", [False, True])
def test_it_equals_ordinary_operations(learning: bool) -> None:
    given = arguments(2, 6, 7, 4, torch.float32)
    with torch.set_grad_enabled(learning):
        found, expected = recurrence(*given), step_by_step(*given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.requires_grad == learning
    if learning:
        wanted = [tensor for tensor in given if tensor.requires_grad]
        weights = torch.randn_like(found)
        for one, other in zip(
            torch.autograd.grad(found, wanted, weights), torch.autograd.grad(expected, wanted, weights), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_arguments_is_written_over() -> None:
    given = arguments(2, 3, 4, 5)
    before = [tensor.detach().clone() for tensor in given]
    recurrence(*given).sum().backward()
    assert all(torch.equal(tensor.detach(), value) for tensor, value in zip(given, before, strict=True))


@pytest.mark.parametrize("groups", [(0, 0, 0), (0, 1, 2), (0, 1, 0)])
@pytest.mark.parametrize("agents", [None, [2, 0]])
def test_a_teams_sequences_are_those_of_each_agent(groups: tuple[int, ...], agents: list[int] | None) -> None:
    torch.manual_seed(0)
    gru = TeamGRU(4, groups).double()
    chosen = range(3) if agents is None else agents
    features, hidden = torch.randn(5, 6, len(chosen), 4).double(), torch.randn(5, len(chosen), 4).double()
    is_first = torch.rand(5, 6, 1) < 0.3
    states = gru(features, hidden, is_first, agents)
    for place, agent in enumerate(chosen):
        unit = torch.nn.GRUCell(4, 4).double()
        for names, layer in ((("weight_ih", "bias_ih"), gru.from_input), (("weight_hh", "bias_hh"), gru.from_hidden)):
            for name, held in zip(names, (layer.weights, layer.biases), strict=True):
                getattr(unit, name).data = held[groups[agent]].data
        state = hidden[:, place]
        for step in range(6):
            state = unit(features[:, step, place], state * ~is_first[:, step])
            torch.testing.assert_close(states[:, step, place], state, rtol=0, atol=1e-12)


def test_a_layer_with_a_hook_is_called_at_every_step() -> None:
    torch.manual_seed(0)
    gru = TeamGRU(4, (0, 1))
    given = torch.randn(3, 5, 2, 4), torch.randn(3, 2, 4), torch.zeros(3, 5, 1, dtype=torch.bool)
    plain, calls = gru(*given), []
    for layer in (gru.from_input, gru.from_hidden):
        layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gru(*given), plain, rtol=0, atol=1e-6)
    assert len(calls) == 1 + 5
