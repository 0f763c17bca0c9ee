"""Categorical samples with a gradient: the straight-through Gumbel-softmax (Jang et al. 2017; Maddison et al. 2017).

With ``g = -log(-log(U))``, ``U`` uniform on (0, 1), ``argmax(logits + g)`` is an exact sample of ``softmax(logits)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlkit.functional.one_hot import one_hot


def gumbel_from_uniform(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise ``-log(-log(U))``, finite at ``U = 0`` and ``U = 1`` too.

    Args:
        uniform: ``[*]``, in [0, 1].

    Returns:
        ``[*]``.
    """
    limits = torch.finfo(uniform.dtype)
    # The largest number below one is 1 - eps / 2.
    inside = uniform.clamp(limits.tiny, 1.0 - limits.eps / 2)
    return -(-inside.log()).log()


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One-hot of ``argmax(logits + noise)`` whose gradient is that of ``softmax((logits + noise) / temperature)``.

    Args:
        logits: ``[*, A]``; unavailable actions hold a value too low for any noise to select it.
        noise: Gumbel noise, ``[*, A]``.
        temperature: the lower, the closer the softmax to the one-hot and the more its gradient varies.

    Returns:
        ``[*, A]``, exactly one-hot.
    """
    perturbed = logits + noise
    relaxed = (perturbed / temperature).softmax(-1)
    hard = one_hot(perturbed.argmax(-1), logits.shape[-1], relaxed.dtype)
    # In this order the difference is exactly zero, and the sum exactly one-hot.
    return hard + (relaxed - relaxed.detach())
