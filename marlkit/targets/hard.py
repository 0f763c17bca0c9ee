"""Targets that are replaced every so many steps (Mnih et al. 2015)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from marlkit.component import Actor, Critic
from marlkit.contract import Contract
from marlkit.lagging import LaggingTargets
from marlkit.options import PositiveInt
from marlkit.spec import TeamSpec


class HardTargets(LaggingTargets):
    """The copies are made equal to the online networks every ``interval`` optimiser steps on each.

    Args:
        spec: the team.
        interval: optimiser steps between two copies; 200 in COMA.
        actor: whether the policy has a lagging copy too.
    """

    contract = Contract()

    def __init__(self, spec: TeamSpec, *, interval: PositiveInt = 200, actor: bool = True) -> None:
        super().__init__(spec, actor)
        self.interval = interval

    def track(self, actor: Actor, critic: Critic) -> None:
        """Copy the networks as they are, and count from here."""
        super().track(actor, critic)
        for name in self.copies:
            self.register_buffer(f"steps_of_{name}", torch.zeros((), dtype=torch.int64))

    def approach(self, name: str, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Count the step; copy when it is due."""
        steps = self.get_buffer(f"steps_of_{name}")
        steps += 1
        if steps % self.interval == 0:
            for copied, online in pairs:
                copied.copy_(online)
