"""The perceptron in chunks of rows against a loop over agents and rows in plain autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from marlkit.nn.kernels import perceptron as module
from marlkit.nn.kernels.activation import IN_PLACE
from marlkit.nn.kernels.perceptron import Layers, layer_by_layer, perceptron
from marlkit.nn.networks import ACTIVATIONS, TeamNetwork

REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.clamp(max=0).exp() - 1),
}
ROWS, AGENTS = 7, 3
SHAPES = {
    "shared": (1, AGENTS, True),
    "one view": (1, 1, True),
    "no identity": (1, AGENTS, False),
    "unshared": (AGENTS, AGENTS, False),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def leaves(shape: str, widths: tuple[int, ...]) -> list[Tensor]:
    """Features, identity (maybe empty), weights, biases."""
    groups, seen, identity = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[int, ...]] = [(ROWS, seen, widths[0]), (AGENTS if identity else 0, widths[1])]
    shapes += [(groups, after, before) for before, after in itertools.pairwise(widths)]
    shapes += [(groups, after) for after in widths[1:]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def arguments(tensors: list[Tensor]) -> tuple[Tensor, Layers]:
    features, identity, *rest = tensors
    half = len(rest) // 2
    return features, Layers(rest[:half], rest[half:], identity if len(identity) else None)


def looped(features: Tensor, layers: Layers, f: Callable[[Tensor], Tensor]) -> Tensor:
    """One agent of one row at a time."""
    found = []
    for row, agent in itertools.product(range(ROWS), range(AGENTS)):
        group = agent if len(layers.weights[0]) > 1 else 0
        hidden = features[row, agent if features.shape[1] > 1 else 0]
        for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
            if i > 0:
                hidden = f(hidden)
            hidden = weight[group] @ hidden + bias[group]
            if i == 0 and layers.identity is not None:
                hidden = hidden + layers.identity[agent]
        found.append(hidden)
    return torch.stack(found).view(ROWS, AGENTS, -1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
@pytest.mark.parametrize("widths", [(4, 6, 2), (4, 5, 6, 1)])
def test_values_and_gradients_equal_a_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: str, chunk: int, widths: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    ours, theirs = leaves(shape, widths), leaves(shape, widths)
    result = perceptron(*arguments(ours), IN_PLACE[name])
    expected = looped(*arguments(theirs), REFERENCE[name])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(perceptron(*arguments(ours), IN_PLACE[name]), expected, rtol=0, atol=1e-12)
    weight = torch.randn(result.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first = torch.autograd.grad(result, ours, weight, allow_unused=True, retain_graph=True)
    again = torch.autograd.grad(result, ours, weight, allow_unused=True)
    expected_gradients = torch.autograd.grad(expected, theirs, weight, allow_unused=True)
    for gradient, repeated, right in zip(first, again, expected_gradients, strict=True):
        assert (gradient is None) == (right is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, right, rtol=0, atol=1e-11)
            assert torch.equal(gradient, repeated), "differentiating once must not spoil what is kept"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_first_and_second_derivatives_agree_with_finite_differences(name: str, shape: str) -> None:
    given = leaves(shape, (2, 3, 1))
    chosen = [tensor for tensor in given if tensor.numel()]

    def function(*tensors: Tensor) -> Tensor:
        found = iter(tensors)
        return perceptron(*arguments([next(found) if tensor.numel() else tensor for tensor in given]), IN_PLACE[name])

    assert torch.autograd.gradcheck(function, chosen)
    assert torch.autograd.gradgradcheck(function, chosen)


def test_fixed_arguments_receive_no_gradient_and_pass_it_on() -> None:
    given, expected = leaves("shared", (4, 6, 2)), leaves("shared", (4, 6, 2))
    for tensor in given[1:]:
        tensor.requires_grad_(False)
    perceptron(*arguments(given), IN_PLACE["tanh"]).square().sum().backward()
    looped(*arguments(expected), torch.tanh).square().sum().backward()
    torch.testing.assert_close(given[0].grad, expected[0].grad, rtol=0, atol=1e-11)
    assert all(tensor.grad is None for tensor in given[1:])


@pytest.mark.parametrize("name", IN_PLACE)
def test_single_precision(name: str) -> None:
    single = [tensor.detach().float().requires_grad_() for tensor in leaves("one view", (4, 6, 5, 2))]
    exact = leaves("one view", (4, 6, 5, 2))
    values, expected = perceptron(*arguments(single), IN_PLACE[name]), looped(*arguments(exact), REFERENCE[name])
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=2e-5)
    for ours, right in zip(torch.autograd.grad(values.sum(), single), torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=5e-5)


def test_no_rows_give_no_values() -> None:
    features, layers = arguments(leaves("shared", (4, 6, 2)))
    assert perceptron(features[:0], layers, IN_PLACE["tanh"]).shape == (0, AGENTS, 2)
    assert layer_by_layer(features[:0], layers, IN_PLACE["tanh"]).shape == (1, 0, 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [(0, 0, 0), (0, 1, 2), (0, 1, 0)], ids=["all", "none", "groups"])
@pytest.mark.parametrize("agents", [None, [2], [0, 2]], ids=str)
@pytest.mark.parametrize("hidden", [[8], [8, 6], []], ids=str)
def test_a_network_is_the_same_either_way(activation: str, groups: Any, agents: Any, hidden: Any) -> None:
    """A hook on a layer makes the network evaluate layer by layer."""
    results = []
    for hooked in (False, True):
        torch.manual_seed(0)
        network = TeamNetwork(
            *(4, 2), hidden=hidden, groups=groups, activation=activation, output_gain=1.0, agent_id=True, layer_norm=False
        ).double()
        features = torch.randn(2, 5, len(agents or groups), 4, dtype=torch.float64).requires_grad_()
        calls: list[int] = []
        if hooked:
            network.layers[0].register_forward_hook(lambda *_, seen=calls: seen.append(1))
        values = network(features, agents)
        torch.testing.assert_close(network.leave(network.enter(features, agents), agents), values, rtol=0, atol=1e-12)
        values.square().sum().backward()
        assert bool(calls) == hooked
        results.append([values.detach(), features.grad, *(p.grad for p in network.parameters())])
    for fast, plain in zip(*results, strict=True):
        assert (fast is None) == (plain is None)
        if fast is not None:
            torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
def test_no_hook_is_skipped(hook: str) -> None:
    options = {"hidden": [8, 6], "activation": "tanh", "output_gain": 1.0, "agent_id": False, "layer_norm": False}
    network = TeamNetwork(4, 2, groups=(0, 0), **options)  # type: ignore[arg-type]
    calls: list[int] = []
    getattr(network.layers[2], f"register_{hook}")(lambda *_: calls.append(1))
    network(torch.randn(5, 2, 4)).sum().backward()
    assert calls == [1]


def test_within_autocast_layers_are_ordinary_ones() -> None:
    torch.manual_seed(0)
    options = {"hidden": [8, 6], "activation": "relu", "output_gain": 1.0, "agent_id": False, "layer_norm": False}
    network = TeamNetwork(4, 2, groups=(0, 1), **options)  # type: ignore[arg-type]
    features = torch.randn(5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        values = network(features)
    values.sum().backward()
    assert values.dtype == torch.bfloat16
    torch.testing.assert_close(values.float(), network(features), rtol=0.05, atol=0.05)
