"""Marginalising over other agents' actions: samples that need no storage, repeats evaluated once, exact enumeration.

PERLA (Jafferjee et al. 2022) replaces a value ``V(x, a_-i)`` by its mean over ``a_-i ~ pi_-i``. The samples of a row follow from
an integer seed by a counter-based generator, so that any minibatch, chunk or recomputation sees the same samples, and memory
does not grow with their number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shifted_right(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def counter_uniform(seed: Tensor, first: int, count: int) -> Tensor:
    """Numbers ``first`` to ``first + count - 1`` of the uniform stream of each seed.

    The mixing function of SplitMix64 (Steele, Lea and Flood 2014) applied to ``seed + (counter + 1) * golden``; its upper 23 bits
    make a number in (0, 1), ends excluded.

    Args:
        seed: ``[R, 1]`` int64.
        first: index of the first number in the stream.
        count: how many numbers.

    Returns:
        ``[R, count]`` float32.
    """
    counter = torch.arange(first + 1, first + count + 1, device=seed.device)
    mixed = seed + counter * _GOLDEN
    mixed = (mixed ^ _shifted_right(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shifted_right(mixed, 27)) * _MIX_2
    mixed = mixed ^ _shifted_right(mixed, 31)
    return unit_interval(mixed)


def unit_interval(bits: Tensor) -> Tensor:
    """The middle of one of 2**23 equal parts of (0, 1), chosen by the upper 23 of 64 bits: ``[*]`` int64 to ``[*]`` float32.

    Not 24 bits: the middle of the last part would need 25 binary digits, and float32, which has 24, would round it to one.
    """
    return (_shifted_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


def normal_from_uniform(uniform: Tensor) -> Tensor:
    """Standard normal numbers by inversion, ``sqrt(2) erfinv(2 u - 1)``: ``[*]`` in (0, 1) to ``[*]``."""
    return torch.erfinv(2 * uniform - 1) * math.sqrt(2)


def categorical_from_uniform(logits: Tensor, uniform: Tensor) -> Tensor:
    """Actions by inversion of the cumulative distribution; an action of probability zero is never drawn.

    Args:
        logits: ``[..., A]``, broadcastable against ``uniform[..., None]``.
        uniform: ``[...]`` in (0, 1).

    Returns:
        ``[...]`` int64.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    # Rounding may leave the last value below one; dividing by it keeps a large draw on the last available action.
    cumulative = cumulative / cumulative[..., -1:]
    return (uniform.unsqueeze(-1) > cumulative).sum(-1)


def repeats(code: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``K`` samples repeat an earlier one.

    Args:
        code: ``[R, K, N]`` int64, equal for equal samples.

    Returns:
        ``(order, count)``, both ``[R, K, N]``: ``order`` sorts the samples, and in that order ``count`` is, at the first
        occurrence of a sample, how often it occurs, and 0 at its repeats.
    """
    sorted_code, order = code.sort(dim=1)
    samples = code.shape[1]
    position = torch.arange(samples, device=code.device).view(1, -1, 1)
    first = torch.ones_like(code, dtype=torch.bool)
    first[:, 1:] = sorted_code[:, 1:] != sorted_code[:, :-1]
    start = torch.where(first, position, samples)
    following_start = torch.full_like(start, samples)
    following_start[:, :-1] = start[:, 1:].flip(1).cummin(1).values.flip(1)
    return order, torch.where(first, following_start - position, 0)


def action_code(actions: Tensor) -> Tensor:
    """A hash ``[...]`` of non-negative integers ``[..., N]``; distinct rows collide with a probability of about 2**-63."""
    agents = torch.arange(1, actions.shape[-1] + 1, device=actions.device)
    factor = (agents * _MIX_1) ^ _shifted_right(agents * _GOLDEN, 29)
    return ((actions + 1) * (factor | 1)).sum(-1)


def joint_actions(n_agents: int, n_actions: int) -> Tensor:
    """Every joint action, ``[n_actions ** n_agents, n_agents]`` int64; one empty joint action for no agents."""
    if n_agents == 0:
        return torch.zeros(1, 0, dtype=torch.int64)
    axes = [torch.arange(n_actions)] * n_agents
    return torch.cartesian_prod(*axes).reshape(-1, n_agents)


def others_of(n_agents: int) -> Tensor:
    """``[N, N - 1]`` int64: the agents other than i, in order."""
    return torch.tensor([[j for j in range(n_agents) if j != i] for i in range(n_agents)]).reshape(n_agents, n_agents - 1)
