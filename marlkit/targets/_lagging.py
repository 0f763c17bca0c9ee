"""Copies of networks that lag behind them, for values that do not chase themselves (Mnih et al. 2015; Lillicrap et al. 2016)."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marlkit.component import Actor, Critic, Targets
from marlkit.learning import Afterwards, at_once
from marlkit.spec import TeamSpec


class LaggingTargets(Targets):
    """Base of targets that are copies; a subclass says how they follow.

    Buffers (the value normaliser's averages among them) follow like parameters: a copy whose weights are from one time and whose
    units are from another would predict in neither.

    Args:
        spec: the team.
        actor: whether the policy has a lagging copy too.
    """

    def __init__(self, spec: TeamSpec, *, actor: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.copies_actor = actor
        self.copies = nn.ModuleDict()
        self._places: dict[str, list[tuple[nn.Module, nn.Module, str]]] = {}

    def track(self, actor: Actor, critic: Critic) -> None:
        """Copy the networks as they are."""
        self._online: dict[str, nn.Module] = {"actor": actor, "critic": critic}
        for name in ("critic", "actor") if self.copies_actor else ("critic",):
            self.copies[name] = copy.deepcopy(self._online[name]).requires_grad_(False)
            self._places[name] = _places(self.copies[name], self._online[name])

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
    def follow(self, changed: Sequence[str], afterwards: Afterwards = at_once) -> None:
        """Let the copies of what changed follow."""
        for name in changed:
            if self._places.get(name):
                self.approach(name, afterwards)

    @abstractmethod
    def approach(self, name: str, afterwards: Afterwards) -> None:
        """Move the copy of network ``name`` towards what :meth:`tensors` says that it follows."""

    def tensors(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the copy of network ``name``, and those that they follow."""
        places = self._places[name]
        return [getattr(copied, own) for copied, _, own in places], [getattr(online, own) for _, online, own in places]


def _places(copied: nn.Module, online: nn.Module) -> list[tuple[nn.Module, nn.Module, str]]:
    """The modules that hold each tensor, and its name there; walking them takes longer than moving the tensors.

    Places and not tensors, because a move to another device replaces buffers.
    """
    names = [name for name, _ in (*online.named_parameters(), *online.named_buffers())]
    paths = [(path, own) for path, _, own in (name.rpartition(".") for name in names)]
    return [(copied.get_submodule(path), online.get_submodule(path), own) for path, own in paths]
