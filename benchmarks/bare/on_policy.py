"""Common parts of the on-policy loops: advantages, normalisation of value targets, clipped losses (Yu et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP = 0.2
VALUE_CLIP = 0.2
HUBER = 10.0
MAX_GRAD_NORM = 10.0
GAMMA, LAMBDA = 0.99, 0.95
LEARNING_RATE, EPSILON = 5e-4, 1e-5


class Units:
    """Running mean and deviation of value targets, as exponential averages with debiasing."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)

    def update(self, target: Tensor) -> None:
        """Update the averages with ``target``."""
        now = torch.stack([target.mean(), target.square().mean(), target.new_ones(())])
        self.sums.lerp_(now, 1 - 0.99999)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation."""
        mean, square = (self.sums[:2] / self.sums[2].clamp(min=1e-5)).unbind()
        return mean, (square - mean.square()).clamp(min=1e-2).sqrt()

    def into(self, value: Tensor) -> Tensor:
        """Real units to normalised ones."""
        mean, deviation = self.statistics()
        return (value - mean) / deviation

    def out_of(self, value: Tensor) -> Tensor:
        """Normalised units to real ones."""
        mean, deviation = self.statistics()
        return value * deviation + mean


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimiser."""
    return torch.optim.Adam(parameters, LEARNING_RATE, eps=EPSILON, fused=True)


def advantages(reward: Tensor, done: Tensor, value: Tensor) -> Tensor:
    """Generalised advantages ``[T, B, n]`` of rewards ``[T, B, n]``, ends ``[T, B, 1]`` and values ``[T + 1, B, n]``."""
    proceeding = GAMMA * (~done).float()
    errors = reward + proceeding * value[1:] - value[:-1]
    found, running = torch.empty_like(errors), torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        running = errors[t] + LAMBDA * proceeding[t] * running
        found[t] = running
    return found


def standardised(advantage: Tensor) -> Tensor:
    """Advantages with mean 0 and deviation 1."""
    centred = advantage - advantage.mean()
    return centred / (centred.square().mean().sqrt() + 1e-5)


def log_density(action: Tensor, loc: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a normal distribution, summed over the last dimension."""
    log_std = log_std.clamp(-5.0, 2.0)
    standard = (action - loc) * (-log_std).exp()
    return (-0.5 * standard.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def clipped_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """``-mean(min(rho A, clip(rho) A))``."""
    ratio = (log_prob - old_log_prob).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def value_loss(value: Tensor, old_value: Tensor, goal: Tensor) -> Tensor:
    """Clipped Huber loss, all in normalised units."""
    near = old_value + (value - old_value).clamp(-VALUE_CLIP, VALUE_CLIP)
    return torch.max(*(F.huber_loss(v, goal, reduction="none", delta=HUBER) for v in (value, near))).mean()
