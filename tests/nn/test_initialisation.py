"""Initialisations: their distributions, and that each component with the option draws all of its layers so."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import nn

from marlkit.actors.deterministic import DeterministicActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.critics.attention import AttentionCritic
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.counterfactual import CounterfactualCritic
from marlkit.critics.joint import JointCritic
from marlkit.critics.local import LocalCritic
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.nn.initialisation import initialise
from marlkit.nn.networks import TeamLinear
from marlkit.options import Initialisation
from marlkit.spec import Discrete, TeamSpec

SPEC = TeamSpec(3, 6, Discrete(4), state=9)
WITH_OPTION = [
    *(StochasticActor, DeterministicActor, LocalCritic, CentralisedCritic),
    *(CounterfactualCritic, JointCritic, MarginalisedCritic, AttentionCritic),
]


def drawn(how: Initialisation, gain: float = 2.0, inputs: int = 40, rows: tuple[int, int] = (300, 40)) -> tuple[Any, Any]:
    torch.manual_seed(0)
    weight, bias = torch.empty(rows), torch.empty(rows[0])
    initialise([weight], [bias], how, gain=gain, inputs=inputs)
    return weight, bias


def test_orthogonal_columns_are_orthogonal() -> None:
    weight, bias = drawn("orthogonal")
    torch.testing.assert_close(weight.T @ weight, 4 * torch.eye(40), rtol=0, atol=1e-4)
    assert not bias.any()


def test_xavier_is_uniform_within_its_bound() -> None:
    weight, bias = drawn("xavier")
    bound = 2 * math.sqrt(6 / 340)
    assert 0.99 * bound < weight.abs().max() <= bound
    assert float(weight.var()) == pytest.approx(bound**2 / 3, rel=0.05)
    assert not bias.any()


def test_uniform_is_that_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 300)
    weight, bias = drawn("uniform")
    torch.testing.assert_close(weight, layer.weight.detach())
    torch.testing.assert_close(bias, layer.bias.detach())


@pytest.mark.parametrize("how", get_args(Initialisation))
@pytest.mark.parametrize("component", WITH_OPTION, ids=lambda component: component.__name__)
def test_every_layer_of_a_component_is_drawn_so(component: Any, how: Initialisation) -> None:
    torch.manual_seed(0)
    built = component(SPEC, hidden=[16, 16], initialisation=how)
    layers = [layer for layer in built.modules() if isinstance(layer, TeamLinear)]
    assert len(layers) >= 3
    for layer in layers:
        for weight in layer.weights:
            few, product = min(weight.shape), weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            scaled = product / product.diagonal().mean()
            assert torch.allclose(scaled, torch.eye(few), atol=1e-4) == (how == "orthogonal" or few == 1)
        assert any(bias.any() for bias in layer.biases) == (how == "uniform" and len(layer.biases) > 0)


def test_a_gru_is_drawn_so_too() -> None:
    actor = StochasticActor(SPEC, hidden=[16], body="gru", initialisation="uniform")
    assert all(bias.any() for bias in (*actor.memory.from_input.biases, *actor.memory.from_hidden.biases, *actor.head.biases))


@pytest.mark.parametrize(
    ("component", "options", "inputs"),
    [
        (CounterfactualCritic, {}, 9 + 12),
        (CounterfactualCritic, {"own_observation": True}, 9 + 12 + 6),
        (JointCritic, {"view": "own"}, 6 + 12),
        (MarginalisedCritic, {}, 9 + 12),
    ],
)
def test_a_split_first_layer_is_drawn_as_one(component: Any, options: dict[str, Any], inputs: int) -> None:
    """State, observation and actions enter through maps of their own; the bound is that of a layer that has all of them."""
    torch.manual_seed(0)
    critic = component(SPEC, hidden=[512], initialisation="uniform", **options)
    bound = 1 / math.sqrt(inputs)
    maps = [critic.network.layers[0], critic.action_layer, getattr(critic, "observation_layer", None)]
    for layer in maps:
        if layer is not None:
            assert 0.99 * bound < float(layer.weights[0].detach().abs().max()) <= bound
