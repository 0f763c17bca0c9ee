"""What came before a step: windows over consecutive steps, which of them belong to the running episode, and places in a ring."""

from __future__ import annotations

import torch
from torch import Tensor


def windows(steps: Tensor, length: int) -> Tensor:
    """Every step together with the ``length`` steps before it, oldest first.

    Args:
        steps: ``[M + T, B, *]``, consecutive steps; the first ``length`` = M have no window of their own.
        length: M, may be 0.

    Returns:
        ``[T, B, M + 1, *]``; entry ``[t, b, j]`` is ``steps[t + j, b]``, so that the last one is the step itself.
    """
    count = len(steps) - length
    return torch.stack([steps[first : first + count] for first in range(length + 1)], 2)


def in_episode_of_last(is_first: Tensor, missing: Tensor | int, length: int) -> Tensor:
    """Of the steps of each window, which belong to the episode of the window's last step.

    ``valid[t, b, j] = t + j >= missing[b]  and  not any_{j < k <= M} is_first[t + k, b]``: step j is there, and no episode has
    begun since.

    Args:
        is_first: ``[M + T, B]`` bool, of consecutive steps; whether an episode begins there.
        missing: how many of them, from the oldest on, do not exist: one number or ``[B]``; at most M.
        length: M.

    Returns:
        ``[T, B, M + 1]`` bool; true for the last step of every window.
    """
    begun = windows(is_first, length)
    since = begun.flip(-1).cumsum(-1).flip(-1)[..., 1:] > 0
    same = torch.cat([~since, torch.ones_like(begun[..., :1])], -1)
    there = torch.arange(len(is_first), device=is_first.device).unsqueeze(-1) >= missing
    return same & windows(there.expand_as(is_first), length)


def ring_slot(order: Tensor, *, position: int, filled: int, capacity: int) -> Tensor:
    """Where a ring keeps a step.

    Args:
        order: any shape; 0 for the oldest step kept, ``filled - 1`` the newest. Others give some slot of the ring.
        position: slot that is written next.
        filled: number of steps kept.
        capacity: number of slots.

    Returns:
        ``(position - filled + order) mod capacity``.
    """
    return (position - filled + order) % capacity
