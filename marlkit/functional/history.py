"""The steps before a step: windows over consecutive steps, their episode boundaries, and the slots of a ring buffer."""

from __future__ import annotations

import torch
from torch import Tensor


def windows(steps: Tensor, length: int) -> Tensor:
    """Every step together with the ``length`` steps before it, oldest first.

    Args:
        steps: ``[M + T, B, *]``, consecutive steps; the first ``length`` = M have no window.
        length: M, may be 0.

    Returns:
        ``[T, B, M + 1, *]``; entry ``[t, b, j]`` is ``steps[t + j, b]``, so that the last one is the step itself.
    """
    count = len(steps) - length
    return torch.stack([steps[first : first + count] for first in range(length + 1)], 2)


def in_episode_of_last(is_first: Tensor, missing: Tensor | int, length: int) -> Tensor:
    """Which steps of each window belong to the same episode as its last step.

    ``valid[t, b, j] = t + j >= missing[b]  and  not any_{j < k <= M} is_first[t + k, b]``: step j exists, and no episode
    begins after it in the window.

    Args:
        is_first: ``[M + T, B]`` bool, of consecutive steps; whether an episode begins there.
        missing: how many of the oldest steps do not exist: one number or ``[B]``; at most M.
        length: M.

    Returns:
        ``[T, B, M + 1]`` bool; true for the last step of every window.
    """
    begins = windows(is_first, length)
    begins_later = begins.flip(-1).cumsum(-1).flip(-1)[..., 1:] > 0
    same = torch.cat([~begins_later, torch.ones_like(begins[..., :1])], -1)
    exists = torch.arange(len(is_first), device=is_first.device).unsqueeze(-1) >= missing
    return same & windows(exists.expand_as(is_first), length)


def ring_slot(order: Tensor, *, position: int, filled: int, capacity: int) -> Tensor:
    """The slot of a step in a ring buffer.

    Args:
        order: ``[*]`` int64; 0 for the oldest stored step, ``filled - 1`` for the newest; others give some slot.
        position: slot that is written next.
        filled: number of stored steps.
        capacity: number of slots.

    Returns:
        ``(position - filled + order) mod capacity``, ``[*]`` int64.
    """
    return (position - filled + order) % capacity
