"""Targets that follow smoothly (Lillicrap et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from marlkit.contract import Contract
from marlkit.lagging import LaggingTargets
from marlkit.options import Probability
from marlkit.spec import TeamSpec


class SoftTargets(LaggingTargets):
    """``target <- (1 - tau) target + tau online`` after every optimiser step on the network.

    Args:
        spec: the team.
        tau: share of the way that a copy goes at each step; 0.001 to 0.01.
        actor: whether the policy has a lagging copy too.
    """

    contract = Contract(traits=("lagging",))

    def __init__(self, spec: TeamSpec, *, tau: Probability = 0.005, actor: bool = True) -> None:
        super().__init__(spec, actor)
        self.tau = tau

    def approach(self, name: str, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One step of the exponential average; what is no fraction is copied."""
        for copied, online in pairs:
            if copied.is_floating_point():
                copied.lerp_(online, self.tau)
            else:
                copied.copy_(online)
