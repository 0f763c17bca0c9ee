"""The model that each agent has of the others in the bare loop of F2A2: character, mental state and belief."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bare.perceptron import initial, perceptron

MEMORY, LAYERS, HIDDEN = 32, 2, 64


class Normal(NamedTuple):
    """Means and deviations ``[G, R, N, D]`` of agent j's action, as predicted by agent g."""

    loc: Tensor
    scale: Tensor

    def log_density(self, action: Tensor) -> Tensor:
        """Log-density ``[G, R, N]`` of actions ``[R, N, D]``."""
        standard = (action - self.loc) / self.scale
        return (-0.5 * standard.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


class Minds(nn.Module):
    """A network per agent, all of which model the same agents.

    Args:
        agents: N, number of modelling and of modelled agents.
        features: O, of an observation.
        actions: D.
    """

    def __init__(self, agents: int, features: int, actions: int) -> None:
        super().__init__()
        self.character_units, self.mental_units = (
            nn.ModuleList(nn.GRU(features + actions, MEMORY, LAYERS, batch_first=True) for _ in range(agents)) for _ in range(2)
        )
        self.natural_widths = (features + 2 * MEMORY, HIDDEN, 2 * actions)
        self.impromptu_widths = (features, HIDDEN, 2 * actions)
        self.natural = nn.Parameter(initial(agents, self.natural_widths))
        self.impromptu = nn.Parameter(initial(agents, self.impromptu_widths))

    def characters(self, seen: Tensor, length: Tensor) -> Tensor:
        """The mean over trajectories ``[S, L, N, O + D]`` of ``length`` ``[S]`` steps each: ``[G, N, H]``."""
        return self._last(self.character_units, seen, length).mean(1)

    def mental_states(self, seen: Tensor, length: Tensor) -> Tensor:
        """Hidden states ``[G, R, N, H]`` after the first ``length`` ``[R]`` of steps ``[R, M, N, O + D]``; zero after none."""
        return self._last(self.mental_units, seen, length)

    def _last(self, units: nn.ModuleList, seen: Tensor, length: Tensor) -> Tensor:
        rows, _, agents, _ = seen.shape
        sequences = seen.transpose(1, 2).flatten(0, 1)
        index = (length - 1).clamp(min=0).repeat_interleave(agents)
        every = torch.arange(len(sequences), device=seen.device)
        states = torch.stack([unit(sequences)[0][every, index] for unit in units])
        return states.unflatten(1, (rows, agents)) * (length > 0).view(1, -1, 1, 1)

    def natural_prediction(self, observation: Tensor, character: Tensor, mental: Tensor) -> Normal:
        """Predictions from observations ``[R, N, O]``, characters ``[G, N, H]`` and mental states ``[G, R, N, H]``."""
        seen = observation.expand(len(mental), -1, -1, -1)
        read = torch.cat([seen, character.unsqueeze(1).expand_as(mental), mental], -1)
        return self._prediction(self.natural, self.natural_widths, read)

    def impromptu_prediction(self, observation: Tensor) -> Normal:
        """Predictions from observations ``[R, N, O]`` alone."""
        return self._prediction(self.impromptu, self.impromptu_widths, observation.expand(len(self.impromptu), -1, -1, -1))

    def _prediction(self, flat: Tensor, widths: tuple[int, ...], read: Tensor) -> Normal:
        activation: Callable[[Tensor], Tensor] = F.leaky_relu
        output = perceptron(flat, widths, read.flatten(1, 2), activation).unflatten(1, read.shape[1:3])
        loc, log_scale = output.chunk(2, -1)
        return Normal(loc, log_scale.clamp(-5.0, 2.0).exp())

    def belief(self, natural: Normal, impromptu: Normal) -> Normal:
        """The mean of both predictions, weighted by precision."""
        first, second = natural.scale.pow(-2), impromptu.scale.pow(-2)
        total = first + second
        return Normal((first * natural.loc + second * impromptu.loc) / total, (2 / total).sqrt())


def cross_entropy(prediction: Normal, action: Tensor) -> Tensor:
    """``-mean log q_g(a_j)`` over rows, g and j != g."""
    agents = action.shape[1]
    others = 1 - torch.eye(agents, device=action.device)
    return -(prediction.log_density(action) * others.unsqueeze(1)).sum() / (len(action) * agents * (agents - 1))


def minds_loss(
    minds: Minds, observation: Tensor, action: Tensor, mental: Tensor, character: Tensor, latest: tuple[Tensor, Tensor]
) -> Tensor:
    """The cross-entropies of the belief, of the natural prediction and, on the latest steps, of the impromptu one."""
    natural = minds.natural_prediction(observation, character, mental)
    belief = minds.belief(natural, minds.impromptu_prediction(observation))
    newest = cross_entropy(minds.impromptu_prediction(latest[0]), latest[1])
    return cross_entropy(belief, action) + cross_entropy(natural, action) + newest
