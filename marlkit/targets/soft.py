"""Targets that follow smoothly (Lillicrap et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch

from marlkit.contract import Contract
from marlkit.learning import Afterwards
from marlkit.options import Probability
from marlkit.spec import TeamSpec
from marlkit.targets._lagging import LaggingTargets


class SoftTargets(LaggingTargets):
    """``target <- (1 - tau) target + tau online`` after every optimiser step on the network.

    Args:
        spec: the team.
        tau: share of the way that a copy goes at each step; 0.001 to 0.01.
        options: those of :class:`marlkit.targets._lagging.LaggingTargets`.
    """

    contract = Contract(traits=("lagging",))

    def __init__(self, spec: TeamSpec, *, tau: Probability = 0.005, **options: Any) -> None:
        super().__init__(spec, **options)
        self.tau = tau

    def approach(self, name: str, afterwards: Afterwards) -> None:
        """One step of the exponential average; what is no fraction is copied."""
        pairs = list(zip(*self.tensors(name), strict=True))
        fractions = [pair for pair in pairs if pair[0].is_floating_point()]
        if fractions:
            torch._foreach_lerp_([copied for copied, _ in fractions], [online for _, online in fractions], self.tau)
        for copied, online in pairs:
            if not copied.is_floating_point():
                copied.copy_(online)
