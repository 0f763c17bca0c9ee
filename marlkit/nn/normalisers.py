"""Running normalisation of value targets.

Source: the ``ValueNorm`` of the MAPPO reference implementation (Yu et al. 2022): exponential averages with debiasing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from marlkit.ranks import ALONE, Ranks

VARIANCE_FLOOR = 1e-2


class ValueNormaliser(nn.Module):
    """Converts values between real and normalised units.

    Weighted averages over all batches ``G_1 .. G_k``, of which batch ``j`` weighs ``(1 - beta) beta^(k - j)``, ``weight`` in all:
    ``mean`` of the targets, and ``variance`` of the targets about it; ``normalise(x) = (x - mean) / sqrt(max(variance, 0.01))``.
    The variance is updated as a sum of squared deviations (Chan, Golub and LeVeque 1983), never as ``E[x^2] - E[x]^2``, which in
    single precision loses the deviation of targets that are far from zero.

    Args:
        enabled: if not, both conversions are the identity and no averages are kept.
        beta: decay of the averages.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor

    def __init__(self, *, enabled: bool, beta: float = 0.99999) -> None:
        super().__init__()
        self.enabled = enabled
        self.beta = beta
        for name in ("mean", "variance", "weight"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))
        self.register_load_state_dict_pre_hook(_from_mean_square)

    @torch.no_grad()
    def update(self, target: Tensor, ranks: Ranks = ALONE) -> None:
        """Update the averages with ``target`` ``[*]``, in real units, of all ranks; it has as many entries on each rank."""
        if not self.enabled:
            return
        mean = target.mean()
        ranks.mean_([mean])
        variance = (target - mean).square().mean()
        ranks.mean_([variance])
        self.weight.mul_(self.beta).add_(1 - self.beta)
        share = (1 - self.beta) / self.weight
        step = mean - self.mean
        # The mean of two groups, and their squared deviations about it.
        self.variance.lerp_(variance, share).add_(share * (1 - share) * step.square())
        self.mean.add_(share * step)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.variance.clamp(min=VARIANCE_FLOOR).sqrt()

    def normalise(self, value: Tensor) -> Tensor:
        """``[*]`` in real units to ``[*]`` in normalised units."""
        if not self.enabled:
            return value
        mean, deviation = self._statistics()
        return (value - mean) / deviation

    def denormalise(self, value: Tensor) -> Tensor:
        """``[*]`` in normalised units to ``[*]`` in real units."""
        if not self.enabled:
            return value
        mean, deviation = self._statistics()
        return value * deviation + mean


def _from_mean_square(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert what older checkpoints hold: averages of the targets and of their squares, each times the weight."""
    held = [state.get(f"{prefix}{name}") for name in ("mean", "mean_square", "weight")]
    found = [value.double() for value in held if isinstance(value, Tensor)]
    if len(found) < len(held):
        return
    mean, square, weight = found
    weight = weight.clamp(min=torch.finfo(torch.float32).tiny)
    mean = mean / weight
    variance = (square / weight - mean.square()).clamp(min=0)
    dtype = state.pop(f"{prefix}mean_square").dtype
    state |= {f"{prefix}mean": mean.to(dtype), f"{prefix}variance": variance.to(dtype)}
