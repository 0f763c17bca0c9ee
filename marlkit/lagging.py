"""Copies of networks that lag behind them, for values that do not chase themselves (Mnih et al. 2015; Lillicrap et al. 2016)."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from marlkit.component import Actor, Critic, Targets
from marlkit.spec import TeamSpec


class LaggingTargets(Targets):
    """Base of targets that are copies; a subclass says how they follow.

    Buffers (the value normaliser's averages among them) follow like parameters: a copy whose weights are from one time and whose
    units are from another would predict in neither.

    Args:
        spec: the team.
        actor: whether the policy has a lagging copy too.
    """

    def __init__(self, spec: TeamSpec, actor: bool) -> None:
        super().__init__()
        self.spec = spec
        self.copies_actor = actor
        self.copies = nn.ModuleDict()

    def track(self, actor: Actor, critic: Critic) -> None:
        """Copy the networks as they are."""
        self._online: dict[str, nn.Module] = {"actor": actor, "critic": critic}
        for name in ("critic", "actor") if self.copies_actor else ("critic",):
            self.copies[name] = copy.deepcopy(self._online[name]).requires_grad_(False)

    def actor(self) -> Actor:
        """The copy of the policy, or the policy itself where it has none."""
        found = self._copy("actor") if self.copies_actor else self._online["actor"]
        assert isinstance(found, Actor)
        return found

    def critic(self) -> Critic:
        """The copy of the critic."""
        found = self._copy("critic")
        assert isinstance(found, Critic)
        return found

    def _copy(self, name: str) -> nn.Module:
        # Not once and for all: Lightning warns of a training that starts with modules in evaluation mode.
        return self.copies[name].eval()

    @torch.no_grad()
    def follow(self, changed: Sequence[str]) -> None:
        """Let the copies of what changed follow."""
        for name in changed:
            if name in self.copies:
                self.approach(name, _pairs(self.copies[name], self._online[name]))

    @abstractmethod
    def approach(self, name: str, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Move the copy of network ``name``: pairs of a tensor of the copy and the tensor that it follows."""


def _pairs(copied: nn.Module, online: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(copied.parameters(), online.parameters(), strict=True)
    yield from zip(copied.buffers(), online.buffers(), strict=True)
