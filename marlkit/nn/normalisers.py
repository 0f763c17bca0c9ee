"""Running normalisation of value targets.

Sources: the ``ValueNorm`` of the MAPPO reference implementation (Yu et al. 2022): exponential averages with debiasing; van
Hasselt et al. 2016, "Learning values across many orders of magnitude" (PopArt).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from marlkit.options import ValueNorm
from marlkit.ranks import ALONE, Ranks

VARIANCE_FLOOR = 1e-2


class ValueNormaliser(nn.Module):
    """Converts values between real and normalised units.

    Weighted averages over all batches ``G_1 .. G_k``, of which batch ``j`` weighs ``(1 - beta) beta^(k - j)``, ``weight`` in all:
    ``mean`` of the targets, and ``variance`` of the targets about it; ``normalise(x) = (x - mean) / sqrt(max(variance, 0.01))``.
    The variance is updated as a sum of squared deviations (Chan, Golub and LeVeque 1983), never as ``E[x^2] - E[x]^2``, which in
    single precision loses the deviation of targets that are far from zero.

    With PopArt a change of the averages changes no value: ``sigma f(x) + mu`` stays what it was, because who updates them also
    replaces the network's output ``f`` by ``scale f + shift``, ``scale = sigma_old / sigma``, ``shift = (mu_old - mu) / sigma``
    (:meth:`marlkit.component.Critic.learn_scale`). Its deviation is 1 before the first update.

    Args:
        enabled: if not, both conversions are the identity and no averages are kept; `popart`: the network follows.
        beta: decay of the averages.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor

    def __init__(self, *, enabled: ValueNorm, beta: float = 0.99999) -> None:
        super().__init__()
        self.enabled = bool(enabled)
        self.rescales = enabled == "popart"
        self.beta = beta
        for name in ("mean", "variance", "weight"):
            first = float(self.rescales and name == "variance")
            self.register_buffer(name, torch.tensor(first, dtype=torch.float32))
        self.register_load_state_dict_pre_hook(_from_mean_square)

    @torch.no_grad()
    def update(self, target: Tensor, ranks: Ranks = ALONE, counted: Tensor | None = None) -> None:
        """Update the averages with ``target`` ``[*]``, in real units, of all ranks; it has as many entries on each rank.

        Where there is ``counted`` ``[*]`` bool, with its entries alone; where none counts, they stay as they are.
        """
        if not self.enabled:
            return
        if counted is None:
            mean = target.mean()
            ranks.mean_([mean])
            variance = (target - mean).square().mean()
            ranks.mean_([variance])
            self.weight.mul_(self.beta).add_(1 - self.beta)
            share = (1 - self.beta) / self.weight
        else:
            mean = ranks.masked_mean(target, counted)
            variance = ranks.masked_mean((target - mean).square(), counted)
            given = (1 - self.beta) * (ranks.mean(counted.any().to(mean.dtype)) > 0).to(mean.dtype)
            self.weight.mul_(1 - given).add_(given)
            share = given / self.weight.clamp(min=1 - self.beta)
        step = mean - self.mean
        # The mean of two groups, and their squared deviations about it.
        self.variance.lerp_(variance, share).add_(share * (1 - share) * step.square())
        self.mean.add_(share * step)

    def change_since(self, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``scale`` and ``shift`` ``[]`` from units with an earlier :meth:`mean_and_deviation` to those of now."""
        (mean_before, deviation_before), (mean, deviation) = before, self._statistics()
        return deviation_before / deviation, (mean_before - mean) / deviation

    def noted(self, value: Tensor) -> Tensor:
        """What to note of a network's values ``[*]`` in real units, so as to compare it later with what it says then."""
        return value if self.rescales else self.normalise(value)

    def recalled(self, noted: Tensor) -> Tensor:
        """What a network said when its values were :meth:`noted`, ``[*]``, in the units in which it speaks now.

        The output of a network stays what it was when the averages change; with PopArt its value does.
        """
        return self.normalise(noted) if self.rescales else noted

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """``mu`` and ``sigma`` of now, ``[]`` each, which later updates do not change; 0 and 1 of the identity."""
        if not self.enabled:
            return torch.zeros_like(self.mean), torch.ones_like(self.mean)
        mean, deviation = self._statistics()
        return mean.clone(), deviation

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
