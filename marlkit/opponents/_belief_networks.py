"""The networks of a theory of mind (Rabinowitz et al. 2018; F2A2, Li et al. 2023): character, mental state, two predictions.

``G`` networks, one per modelling agent or per group of them, model the same agents, in one batched product per layer; common
inputs are never copied per network (:mod:`marlkit.nn.networks`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from marlkit.nn.networks import ACTIVATIONS, GAINS, TeamGRU, TeamLinear

OUTPUT_GAIN = 0.01
"""Gain of the last layer's initialisation: beliefs start nearly uniform."""


class SequenceEncoder(nn.Module):
    """Stacked gated recurrent units, one stack per network, over sequences that are the input of all networks.

    Args:
        inputs: features of a step.
        width: features H of each hidden state.
        layers: number of units.
        networks: G.
    """

    def __init__(self, inputs: int, width: int, layers: int, networks: int) -> None:
        super().__init__()
        groups = range(networks)
        self.layers = nn.ModuleList(TeamGRU(width, groups) for _ in range(layers))
        self.layers[0].from_input = TeamLinear(inputs, 3 * width, groups, gain=1.0)
        self.shape = (networks, width)

    def forward(self, steps: Tensor, starts: Tensor) -> Tensor:
        """``[Q, L, inputs] -> [G, L, Q, H]``; the hidden state is zero before a step where ``starts`` ``[Q, L, 1]`` holds."""
        networks, width = self.shape
        states, keep = steps.transpose(0, 1).unsqueeze(0), (~starts).transpose(0, 1)
        zero = steps.new_zeros(networks, len(steps), width)
        for layer in self.layers:
            assert isinstance(layer, TeamGRU)
            states = layer.sequences(states, zero, keep)
        return states


class PredictionHead(nn.Module):
    """A multilayer perceptron per network, of an observation common to all networks and of vectors of each network.

    Args:
        observation: features of an observation.
        memories: features of each of the network's own vectors; may be empty.
        hidden: widths of the hidden layers.
        outputs: features of a prediction.
        networks: G.
        activation: name of the non-linearity.
    """

    def __init__(
        self, observation: int, memories: Sequence[int], hidden: Sequence[int], outputs: int, networks: int, activation: str
    ) -> None:
        super().__init__()
        groups = range(networks)
        self.activation = ACTIVATIONS[activation]
        gain = GAINS.get(activation, math.sqrt(2))
        first, *rest = [gain] * len(hidden) + [OUTPUT_GAIN]
        widths = [*hidden, outputs]
        self.seen = TeamLinear(observation, widths[0], groups, gain=first)
        self.remembered = nn.ModuleList(TeamLinear(m, widths[0], groups, gain=first, bias=False) for m in memories)
        self.rest = nn.ModuleList(
            TeamLinear(before, after, groups, gain=g) for (before, after), g in zip(pairwise(widths), rest, strict=True)
        )

    def forward(self, observation: Tensor, *memories: Tensor) -> Tensor:
        """``[R, N, observation]`` and memories ``[G, R, N, memory]`` or ``[G, 1, N, memory]`` give ``[G, R, N, outputs]``."""
        entered = _by_network(self.seen, observation.unsqueeze(0))
        for layer, memory in zip(self.remembered, memories, strict=True):
            entered = entered + _by_network(layer, memory)
        for layer in self.rest:
            entered = _by_network(layer, self.activation(entered))
        return entered


def _by_network(layer: nn.Module, features: Tensor) -> Tensor:
    """``[G, R, N, inputs] -> [G, R, N, outputs]``."""
    assert isinstance(layer, TeamLinear)
    return layer.by_network(features.flatten(1, 2)).unflatten(1, features.shape[1:3])


class BeliefNetworks(nn.Module):
    """G networks that model the behaviour of N agents.

    Args:
        observation: features O of an observation.
        action: features F of an action (one-hot where discrete).
        outputs: features P of a prediction.
        networks: G.
        width: features H of a character and of a mental state.
        layers: number of stacked recurrent units.
        hidden: widths of the hidden layers of both heads.
        activation: their non-linearity.
    """

    def __init__(
        self,
        observation: int,
        action: int,
        outputs: int,
        *,
        networks: int,
        width: int,
        layers: int,
        hidden: Sequence[int],
        activation: str,
    ) -> None:
        super().__init__()
        self.character_encoder = SequenceEncoder(observation + action, width, layers, networks)
        self.mental_encoder = SequenceEncoder(observation + action, width, layers, networks)
        self.natural_head = PredictionHead(observation, [width, width], hidden, outputs, networks, activation)
        self.impromptu_head = PredictionHead(observation, [], hidden, outputs, networks, activation)

    def characters(self, steps: Tensor, length: Tensor) -> Tensor:
        """The last hidden state of each trajectory.

        Args:
            steps: ``[S, L, N, O + F]``, observations and actions, oldest first.
            length: ``[S]``, number of steps of each trajectory, at least 1; the rest of ``L`` is padding.

        Returns:
            ``[S, N, G, H]``.
        """
        count, longest, n_agents = steps.shape[:3]
        sequences = steps.transpose(1, 2).flatten(0, 1)
        never = torch.zeros(len(sequences), longest, 1, dtype=torch.bool, device=steps.device)
        states = self.character_encoder(sequences, never)
        last = (length - 1).repeat_interleave(n_agents)
        every = torch.arange(len(sequences), device=steps.device)
        return states[:, last, every].transpose(0, 1).unflatten(0, (count, n_agents))

    def mental_states(self, steps: Tensor, valid: Tensor) -> Tensor:
        """The hidden state after the last of M recent steps; zero where there is none.

        Args:
            steps: ``[R, M, N, O + F]``, oldest first.
            valid: ``[R, M]`` bool; invalid steps come first.

        Returns:
            ``[G, R, N, H]``.
        """
        n_agents = steps.shape[2]
        starts = torch.ones_like(valid)
        starts[:, 1:] = ~valid[:, :-1]
        sequences = steps.transpose(1, 2).flatten(0, 1)
        states = self.mental_encoder(sequences, starts.repeat_interleave(n_agents, 0).unsqueeze(-1))
        return states[:, -1].unflatten(1, (-1, n_agents)) * valid[:, -1].view(1, -1, 1, 1)

    def natural(self, observation: Tensor, character: Tensor, mental: Tensor) -> Tensor:
        """Prediction ``[R, G, N, P]``.

        Args:
            observation: ``[R, N, O]``.
            character: ``[N, G, H]``.
            mental: ``[G, R, N, H]``.
        """
        prediction: Tensor = self.natural_head(observation, character.transpose(0, 1).unsqueeze(1), mental)
        return prediction.transpose(0, 1)

    def impromptu(self, observation: Tensor) -> Tensor:
        """Prediction ``[R, G, N, P]`` from the observation ``[R, N, O]`` alone."""
        prediction: Tensor = self.impromptu_head(observation)
        return prediction.transpose(0, 1)
