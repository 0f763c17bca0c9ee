"""Targets that are replaced at regular intervals (Mnih et al. 2015)."""

from __future__ import annotations

from typing import Any

import torch

from marlkit.component import Actor, Critic
from marlkit.contract import Contract
from marlkit.learning import Afterwards
from marlkit.options import PositiveInt
from marlkit.spec import TeamSpec
from marlkit.targets._lagging import LaggingTargets


class HardTargets(LaggingTargets):
    """The copies are made equal to the online networks every ``interval`` optimiser steps on each.

    Args:
        spec: the team.
        interval: optimiser steps between two copies; 200 in COMA, whose critic takes one for each time step of an episode, so
            that it is copied every two or three iterations.
        options: those of :class:`marlkit.targets._lagging.LaggingTargets`.
    """

    contract = Contract(traits=("lagging",))

    def __init__(self, spec: TeamSpec, *, interval: PositiveInt = 200, **options: Any) -> None:
        super().__init__(spec, **options)
        self.interval = interval
        # Counted on the host: reading a counter on the device would synchronise at every step.
        self.steps: dict[str, int] = {}

    def track(self, actor: Actor, critic: Critic) -> None:
        """Copy the networks as they are, and start counting."""
        super().track(actor, critic)
        self.steps = dict.fromkeys(self.copies, 0)

    def approach(self, name: str, afterwards: Afterwards) -> None:
        """Count the step; copy when it is due."""
        afterwards(lambda: self._count(name))

    @torch.no_grad()
    def _count(self, name: str) -> None:
        self.steps[name] += 1
        if self.steps[name] % self.interval == 0:
            torch._foreach_copy_(*self.tensors(name))

    def get_extra_state(self) -> dict[str, int]:
        """The steps counted so far, by network."""
        return dict(self.steps)

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue from :meth:`get_extra_state`."""
        self.steps = dict(state)
