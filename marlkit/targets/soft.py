"""Targets that follow smoothly (Lillicrap et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marlkit.contract import Contract
from marlkit.learning import Afterwards
from marlkit.options import PositiveInt, Probability
from marlkit.spec import TeamSpec
from marlkit.targets._lagging import LaggingTargets


class SoftTargets(LaggingTargets):
    """``target <- (1 - tau) target + tau online`` after every optimiser step on the network, or every few on the critic.

    Args:
        spec: the team.
        tau: weight of the online network at each step; 0.001 to 0.01.
        critic_interval: optimiser steps on the critic from one step of its copy to the next, the first with the first; 2 in TD3,
            whose copies wait for the actor.
        options: those of :class:`marlkit.targets._lagging.LaggingTargets`.
    """

    contract = Contract(traits=("lagging",))

    critic_steps: Tensor

    def __init__(self, spec: TeamSpec, *, tau: Probability = 0.005, critic_interval: PositiveInt = 1, **options: Any) -> None:
        super().__init__(spec, **options)
        self.tau = tau
        self.critic_interval = critic_interval
        if critic_interval > 1:
            self.register_buffer("critic_steps", torch.zeros((), dtype=torch.int64))

    def approach(self, name: str, afterwards: Afterwards) -> None:
        """One step of the exponential average, if it is due; integer tensors are copied."""
        if name == "critic" and self.critic_interval > 1:
            afterwards(self._count)
        else:
            self._step(name)

    @torch.no_grad()
    def _count(self) -> None:
        if int(self.critic_steps) % self.critic_interval == 0:
            self._step("critic")
        self.critic_steps += 1

    def _step(self, name: str) -> None:
        pairs = list(zip(*self.tensors(name), strict=True))
        fractions = [pair for pair in pairs if pair[0].is_floating_point()]
        if fractions:
            torch._foreach_lerp_([copied for copied, _ in fractions], [online for _, online in fractions], self.tau)
        for copied, online in pairs:
            if not copied.is_floating_point():
                copied.copy_(online)
