"""Networks of a team: one per agent, one for all, or one per group, evaluated in one batched product.

Unshared parameters are separate leaf parameters (so that an optimiser can step one agent alone) that are stacked for the
product; no Python loop runs over agents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marlkit.errors import OptionError
from marlkit.nn.initialisation import initialise
from marlkit.nn.kernels.activation import IN_PLACE, tanh_
from marlkit.nn.kernels.perceptron import Layers, perceptron
from marlkit.nn.kernels.recurrence import recurrence, unit
from marlkit.options import Initialisation, Share

# Each may overwrite its argument, which is always the result of a layer.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tanh_,
    "gelu": F.gelu,
    **{name: IN_PLACE[name].core for name in ("relu", "leaky_relu", "elu")},  # these equal their cores
}

GAINS = {"tanh": 5 / 3}
"""Gain of a hidden layer's initialisation that preserves the scale of its output; sqrt(2) for the other activations."""


def group_of_agents(share: Share, n_agents: int) -> tuple[int, ...]:
    """The parameter group of each agent.

    Raises:
        OptionError: the groups do not name every agent exactly once.
    """
    if share == "all":
        return (0,) * n_agents
    if share == "none":
        return tuple(range(n_agents))
    named = sorted(agent for group in share for agent in group)
    if named != list(range(n_agents)):
        raise OptionError("share", f"groups must name each of the {n_agents} agents (0 to {n_agents - 1}) once, got {share}")
    return tuple(next(g for g, group in enumerate(share) if agent in group) for agent in range(n_agents))


class GroupedParameters:
    """A module that holds leaf parameters per group of agents, and tells which are whose.

    Components with the trait ``separate_parameters`` collect the parameters of an agent from the modules of this class.
    """

    def agent_parameters(self, agents: Sequence[int]) -> list[nn.Parameter]:
        """The leaf parameters of the groups of ``agents``, in one order for every agent."""
        raise NotImplementedError


class TeamParameter(nn.ParameterList, GroupedParameters):
    """A parameter per group of agents, all equal at first.

    Args:
        value: what each holds at first, ``[*]``.
        groups: the group of each agent.
    """

    def __init__(self, value: Tensor, groups: Sequence[int]) -> None:
        super().__init__(value.clone() for _ in range(max(groups) + 1))
        self.groups = tuple(groups)

    def agent_parameters(self, agents: Sequence[int]) -> list[nn.Parameter]:
        """The parameters of the groups of ``agents``."""
        return [self[group] for group in dict.fromkeys(self.groups[agent] for agent in agents)]

    def stacked(self, agents: Sequence[int]) -> Tensor:
        """The parameters of ``agents``, ``[n, *]``."""
        return torch.stack([self[self.groups[agent]] for agent in agents])


class TeamLinear(nn.Module, GroupedParameters):
    """An affine map per group of agents.

    Args:
        inputs, outputs: numbers of features.
        groups: the group of each agent; its length is the size of the agent axis.
        gain: of the initialisation of each group's weight.
        bias: whether the map has a bias.
        initialisation: how weights and biases are drawn (:func:`marlkit.nn.initialisation.initialise`).
        further_inputs: number of inputs that other maps add to the same outputs.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: Sequence[int],
        *,
        gain: float,
        bias: bool = True,
        initialisation: Initialisation = "orthogonal",
        further_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        count = max(self.groups) + 1
        weights = [torch.empty(outputs, inputs) for _ in range(count)]
        biases = [torch.empty(outputs) for _ in range(count if bias else 0)]
        initialise(weights, biases, initialisation, gain=gain, inputs=inputs + further_inputs)
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)

    def forward(self, features: Tensor, agents: Sequence[int] | None = None) -> Tensor:
        """``[*, n, inputs] -> [*, n, outputs]``, where ``n`` counts ``agents`` (``None``: all, in order)."""
        if len(self.weights) == 1:
            return F.linear(features, self.weights[0], self.biases[0] if len(self.biases) else None)
        weight = self.stacked(self.weights, agents)
        flat = features.reshape(-1, len(weight), features.shape[-1]).transpose(0, 1)
        if len(self.biases):
            product = torch.baddbmm(self.stacked(self.biases, agents).unsqueeze(1), flat, weight.transpose(1, 2))
        else:
            product = torch.bmm(flat, weight.transpose(1, 2))
        return product.transpose(0, 1).reshape(*features.shape[:-1], weight.shape[1])

    def by_network(self, features: Tensor, agents: Sequence[int] | None = None) -> Tensor:
        """``[G, R, inputs]``, or ``[1, R, inputs]`` if all networks have the same input, to ``[G, R, outputs]``."""
        weight = self.stacked(self.weights, agents)
        features = features.expand(len(weight), -1, -1)
        if _has_hooks(self):
            result: Tensor = self(features.transpose(0, 1), agents)
            return result.transpose(0, 1)
        if len(self.biases):
            return torch.baddbmm(self.stacked(self.biases, agents).unsqueeze(1), features, weight.mT)
        return torch.bmm(features, weight.mT)

    def stacked(self, parameters: nn.ParameterList, agents: Sequence[int] | None = None) -> Tensor:
        """The ``weights`` or ``biases`` of ``agents``, ``[n, *]``; ``[1, *]`` where all agents share them."""
        if len(parameters) == 1:
            return parameters[0].unsqueeze(0)
        groups = self.groups if agents is None else [self.groups[agent] for agent in agents]
        return torch.stack([parameters[group] for group in groups])

    def agent_parameters(self, agents: Sequence[int]) -> list[nn.Parameter]:
        """The leaf parameters of the groups of ``agents``."""
        groups = dict.fromkeys(self.groups[agent] for agent in agents)
        return [parameters[group] for group in groups for parameters in (self.weights, self.biases) if len(parameters)]


class TeamNetwork(nn.Module):
    """A multilayer perceptron per group of agents.

    Where agents share a network, an agent's identity enters the first layer as a learnt bias, which is what appending a
    one-hot identity to the input computes, without building it.

    Args:
        inputs, outputs: numbers of features.
        hidden: widths of the hidden layers.
        groups: the group of each agent.
        activation: name of the non-linearity.
        output_gain: gain of the last layer's initialisation.
        initialisation: how the layers are drawn (:func:`marlkit.nn.initialisation.initialise`).
        further_inputs: number of inputs that other maps add to the first layer.
        agent_id: whether agents that share a network have an identity.
        layer_norm: whether to normalise the input and every hidden layer's output; without an affine part, which the next layer
            has.
        input_norm: whether `layer_norm` is for the input too, which may be normalised already.
    """

    identity: nn.Parameter | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: Sequence[int],
        groups: Sequence[int],
        activation: str,
        output_gain: float,
        agent_id: bool,
        layer_norm: bool,
        input_norm: bool = True,
        initialisation: Initialisation = "orthogonal",
        further_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.in_place = IN_PLACE.get(activation)
        self.layer_norm = layer_norm
        self.input_norm = input_norm
        gain = GAINS.get(activation, math.sqrt(2))
        widths = [inputs, *hidden, outputs]
        gains = [gain] * len(hidden) + [output_gain]
        has_identity = agent_id and len(groups) > len(set(groups))
        further = [further_inputs, *[0] * len(hidden)]
        self.layers = nn.ModuleList(
            TeamLinear(before, after, groups, gain=g, initialisation=initialisation, further_inputs=more)
            for (before, after), g, more in zip(pairwise(widths), gains, further, strict=True)
        )
        self.register_parameter("identity", None)
        if has_identity:
            scale = gain / math.sqrt(inputs + len(groups))
            bound = 1 / math.sqrt(inputs + further_inputs)
            drawn = torch.empty(len(groups), widths[1])
            self.identity = nn.Parameter(
                drawn.uniform_(-bound, bound) if initialisation == "uniform" else drawn.normal_(0, scale)
            )

    @torch.no_grad()
    def rescale(self, scale: Tensor, shift: Tensor, *added: TeamLinear) -> None:
        """Replace the outputs ``f`` by ``scale f + shift``, ``[]`` each.

        Args:
            scale: ``[]``.
            shift: ``[]``.
            added: maps whose outputs others add to the first layer's.
        """
        last = cast(TeamLinear, self.layers[-1])
        for weight, bias in zip(last.weights, last.biases, strict=True):
            weight.mul_(scale)
            bias.mul_(scale).add_(shift)
        if len(self.layers) == 1:
            further = [weight for layer in added for weight in layer.weights]
            for entering in (*further, *([] if self.identity is None else [self.identity])):
                entering.mul_(scale)

    def enter(self, features: Tensor, agents: Sequence[int] | None = None) -> Tensor:
        """The first layer before its non-linearity: ``[*, n, inputs] -> [*, n, hidden[0]]``."""
        entered = self.layers[0](self._normalised(features) if self.input_norm else features, agents)
        if self.identity is None:
            return entered
        return entered + (self.identity if agents is None else self.identity[list(agents)])

    def leave(self, entered: Tensor, agents: Sequence[int] | None = None) -> Tensor:
        """The layers after :meth:`enter`: ``[*, n, hidden[0]] -> [*, n, outputs]``; overwrites ``entered``."""
        if len(self.layers) > 2 and self._can_fuse(entered):
            return self._fused(self.activation(entered), agents, 1)
        for layer in self.layers[1:]:
            entered = layer(self._normalised(self.activation(entered)), agents)
        return entered

    def forward(self, features: Tensor, agents: Sequence[int] | None = None) -> Tensor:
        """``[*, n, inputs] -> [*, n, outputs]``, where ``n`` counts ``agents`` (``None``: all, in order)."""
        if len(self.layers) > 1 and self._can_fuse(features):
            return self._fused(features, agents, 0)
        return self.leave(self.enter(features, agents), agents)

    def _can_fuse(self, features: Tensor) -> bool:
        """Whether several layers can be evaluated in one call (:mod:`marlkit.nn.kernels.perceptron`)."""
        if self.in_place is None or self.layer_norm or features.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        return not self.hooked

    def _fused(self, features: Tensor, agents: Sequence[int] | None, first: int) -> Tensor:
        """The output of the layers from number ``first`` on, ``[*, n, outputs]``."""
        assert self.in_place is not None
        result = perceptron(features.reshape(-1, *features.shape[-2:]), self._stacked(agents, first), self.in_place)
        return result.view(*features.shape[:-2], *result.shape[-2:])

    def _stacked(self, agents: Sequence[int] | None, first: int) -> Layers:
        layers = cast(list[TeamLinear], list(self.layers))[first:]
        weights = [layer.stacked(layer.weights, agents) for layer in layers]
        biases = [layer.stacked(layer.biases, agents) for layer in layers]
        identity: Tensor | None = self.identity if first == 0 else None
        if identity is not None and agents is not None:
            identity = identity[list(agents)]
        if identity is not None and len(weights[0]) > 1:
            biases[0], identity = biases[0] + identity, None
        return Layers(weights, biases, identity)

    @property
    def hooked(self) -> bool:
        """Whether one of the layers has a hook or a replaced forward pass."""
        return any(map(_has_hooks, self.layers))

    def _normalised(self, features: Tensor) -> Tensor:
        return F.layer_norm(features, features.shape[-1:]) if self.layer_norm else features


def _has_hooks(layer: nn.Module) -> bool:
    """Whether a layer has a hook or a replaced forward pass, so that it must be called."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)


class TeamGRU(nn.Module):
    """A gated recurrent unit per group of agents (Cho et al. 2014), with hidden states set to zero where episodes start.

    ``r, z = sigmoid(W x + U h)``, ``n = tanh(W_n x + r * (U_n h))``, ``h' = (1 - z) n + z h``.

    Args:
        features: size of the input and of the hidden state.
        groups: the group of each agent.
        initialisation: how both maps are drawn (:func:`marlkit.nn.initialisation.initialise`).
    """

    def __init__(self, features: int, groups: Sequence[int], initialisation: Initialisation = "orthogonal") -> None:
        super().__init__()
        self.from_input = TeamLinear(features, 3 * features, groups, gain=1.0, initialisation=initialisation)
        self.from_hidden = TeamLinear(features, 3 * features, groups, gain=1.0, initialisation=initialisation)

    def forward(self, features: Tensor, hidden: Tensor, is_first: Tensor, agents: Sequence[int] | None = None) -> Tensor:
        """Hidden states after each step, ``[M, n, H]`` or ``[M, L, n, H]``.

        Args:
            features: ``[M, n, H]`` for single steps or ``[M, L, n, H]`` for sequences.
            hidden: ``[M, n, H]``, before the first step.
            is_first: ``[M, 1]`` or ``[M, L, 1]`` bool.
            agents: the n agents; ``None``: all.
        """
        if features.dim() == 3:
            before = hidden * ~is_first.unsqueeze(-1)
            return unit(self.from_input(features, agents), self.from_hidden(before, agents), before)
        many, length, n_agents, size = features.shape
        keep = (~is_first).transpose(0, 1)
        if len(self.from_hidden.weights) > 1:
            states = self.sequences(features.permute(2, 1, 0, 3), hidden.transpose(0, 1), keep, agents)
            return states.permute(2, 1, 0, 3)
        # A shared network treats the agents as further sequences.
        rows = features.transpose(0, 1).reshape(1, length, many * n_agents, size)
        keep = keep.unsqueeze(2).expand(-1, -1, n_agents, -1).flatten(1, 2)
        states = self.sequences(rows, hidden.reshape(1, many * n_agents, -1), keep, agents)
        return states.view(length, many, n_agents, -1).transpose(0, 1)

    def sequences(self, features: Tensor, hidden: Tensor, keep: Tensor, agents: Sequence[int] | None = None) -> Tensor:
        """Hidden states ``[G, L, Q, H]`` of G networks after each step of Q sequences.

        Args:
            features: ``[G, L, Q, inputs]``, or ``[1, L, Q, inputs]`` if all networks have the same input.
            hidden: ``[G, Q, H]``, before the first step.
            keep: ``[L, Q, 1]`` bool, false where the hidden state is set to zero before the step.
            agents: the agents whose networks are evaluated; ``None``: all.
        """
        gates = self.from_input.by_network(features.flatten(1, 2), agents).unflatten(1, features.shape[1:3])
        layer = self.from_hidden
        if not _has_hooks(layer):
            return recurrence(gates, hidden, keep, layer.stacked(layer.weights, agents), layer.stacked(layer.biases, agents))
        states = []
        for gate, kept in zip(gates.unbind(1), keep, strict=True):
            before = hidden * kept
            hidden = unit(gate, layer.by_network(before, agents), before)
            states.append(hidden)
        return torch.stack(states, 1)
