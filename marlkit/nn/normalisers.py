"""Running normalisation of value targets.

Source: the ``ValueNorm`` of the MAPPO reference implementation (Yu et al. 2022): exponential averages with debiasing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from marlkit.ranks import ALONE, Ranks

VARIANCE_FLOOR = 1e-2
DEBIAS_FLOOR = 1e-5


class ValueNormaliser(nn.Module):
    """Converts values between real and normalised units.

    ``m <- beta m + (1 - beta) mean(G)`` and likewise for the mean square and for the debiasing weight ``w`` (all start at 0);
    ``mean = m / w``, ``variance = max(s / w - mean^2, 0.01)``, ``normalise(x) = (x - mean) / sqrt(variance)``.

    Args:
        enabled: if not, both conversions are the identity and no averages are kept.
        beta: decay of the averages.
    """

    mean: Tensor
    mean_square: Tensor
    weight: Tensor

    def __init__(self, *, enabled: bool, beta: float = 0.99999) -> None:
        super().__init__()
        self.enabled = enabled
        self.beta = beta
        for name in ("mean", "mean_square", "weight"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.clamp(min=DEBIAS_FLOOR)
        mean = self.mean / weight
        variance = (self.mean_square / weight - mean.square()).clamp(min=VARIANCE_FLOOR)
        return mean, variance.sqrt()

    @torch.no_grad()
    def update(self, target: Tensor, ranks: Ranks = ALONE) -> None:
        """Update the averages with ``target`` ``[*]``, in real units, of all ranks; it has as many entries on each rank."""
        if not self.enabled:
            return
        moments = (target.mean(), target.square().mean())
        ranks.mean_(moments)
        for average, value in zip((self.mean, self.mean_square), moments, strict=True):
            average.mul_(self.beta).add_(value, alpha=1 - self.beta)
        self.weight.mul_(self.beta).add_(1 - self.beta)

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
