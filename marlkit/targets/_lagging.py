"""Lagging copies of networks, for bootstrap targets that change slowly (Mnih et al. 2015; Lillicrap et al. 2016)."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from marlkit import keys
from marlkit.component import Actor, Critic, Targets
from marlkit.learning import Afterwards, at_once
from marlkit.spec import TeamSpec


class LaggingTargets(Targets):
    """Base of targets that are copies; a subclass defines how they follow.

    Buffers, such as the value normaliser's averages, follow like parameters: a copy with weights of one iteration and units of
    another would predict wrong values.

    Args:
        spec: the team.
        actor: whether the policy has a lagging copy too.
        double: off policy, let the policy that learns choose the actions that the copies value (double Q-learning, van Hasselt et
            al. 2016); `null`: where the actor owns action values.
    """

    def __init__(self, spec: TeamSpec, *, actor: bool = True, double: bool | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.copies_actor = actor
        self.lets_online_choose = double
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

    def chooser(self) -> Actor:
        """With `double` the policy that learns, else :meth:`actor`."""
        online = self._online["actor"]
        assert isinstance(online, Actor)
        double = keys.ACTION_VALUES in online.writes if self.lets_online_choose is None else self.lets_online_choose
        return online if double else self.actor()

    def _copy(self, name: str) -> nn.Module:
        # Set at each call: Lightning warns if a training starts with modules in evaluation mode.
        return self.copies[name].eval()

    @torch.no_grad()
    def follow(self, changed: Sequence[str], afterwards: Afterwards = at_once) -> None:
        """Let the copies of the networks that ``changed`` follow."""
        for name in changed:
            if self._places.get(name):
                self.approach(name, afterwards)

    @abstractmethod
    def approach(self, name: str, afterwards: Afterwards) -> None:
        """Move the copy of network ``name`` towards the network (:meth:`tensors`)."""

    def tensors(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the copy of network ``name``, and the network's own, in the same order and of equal shapes ``[*]``."""
        places = self._places[name]
        return [getattr(copied, own) for copied, _, own in places], [getattr(online, own) for _, online, own in places]


def _places(copied: nn.Module, online: nn.Module) -> list[tuple[nn.Module, nn.Module, str]]:
    """The modules that hold each tensor, and its name there, found once because the search takes longer than moving the tensors.

    Modules and names instead of tensors, because a move to another device replaces buffers.
    """
    twins, modules = dict(copied.named_modules()), dict(online.named_modules())
    # Not by splitting names at their last dot: a module of tensordict holds parameters whose own names have dots.
    owners = {
        f"{path}.{own}".removeprefix("."): (path, own)
        for path, module in modules.items()
        for own in (*module._parameters, *module._buffers)
    }
    found = [owners[name] for name, _ in (*online.named_parameters(), *online.named_buffers())]
    return [(twins[path], modules[path], own) for path, own in found]
