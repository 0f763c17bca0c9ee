"""What a component is tried with: other components, chosen by their contracts, and what an update is given to learn with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import yaml
from tensordict import TensorDict
from torch import Tensor, nn

from marlkit import keys
from marlkit.component import Actor, Component, Critic, Opponents, Update
from marlkit.contract import When
from marlkit.keys import Key
from marlkit.learning import Adjust, Learning, Metrics
from marlkit.recipe.catalogue import Entry, components, load_class
from marlkit.spec import TeamSpec
from marlkit.testing.batches import batch_for, fake_batch
from marlkit.testing.rules import BrokenRule, changed, needs_of, require

SMALL: dict[str, Any] = {"hidden": [4], "embedding": 4, "heads": 2, "samples": 2}
"""Options that keep a component small, where it has them."""


def partner(section: str, spec: TeamSpec, traits: Iterable[str] = (), written: Iterable[Key] = ()) -> Any:
    """A small component of marlkit that has these traits, writes these keys and works in this team.

    Raises:
        BrokenRule: there is none.
    """
    for entry in components(section).values():
        wanted = {*traits, *written}
        options = _options_for(entry, wanted, spec)
        decided = entry.defaults | options
        has = {found for field in ("traits", "writes") for found in entry.contract.resolve(field, decided, spec.traits)}
        works = set(entry.contract.needed(decided, spec.traits).get("env", ())) <= spec.traits
        if wanted <= has and works and not any(option.required for option in entry.options.values()):
            return load_class(entry)(spec, **options)
    names = ", ".join(sorted(map(str, {*traits, *written})))
    remedy = "Need what a component of marlkit has; what needs more is tried in a recipe, by `marlkit check --run`."
    raise BrokenRule(f"needs a {section} with {names}, which none of marlkit's has here", remedy)


def _options_for(entry: Entry, wanted: set[Any], spec: TeamSpec) -> dict[str, Any]:
    """Small sizes, and the settings of options that give a trait or a key that is wanted."""
    options = {name: value for name, value in SMALL.items() if name in entry.options}
    for item in (*entry.contract.traits, *entry.contract.writes):
        if isinstance(item, When) and wanted & set(item.then):
            options |= {part.name: yaml.safe_load(value) for part in item.parts for value in part.settings((), hold=True)}
    return options


class Team:
    """Actor, critic and opponent model that a component is tried with, an optimiser over them, and what was done with it.

    Args:
        component: an update, targets or an opponent model, which decide what the others have to be.
    """

    def __init__(self, component: Component) -> None:
        self.spec = component.spec
        needs = needs_of(component)
        written = set(component.reads) & {keys.ACTION_VALUE, keys.STATE_VALUE}
        self.critic: Critic = partner("critic", self.spec, needs.get("critic", set()), written)
        needs_of_actor = needs.get("actor", set()) | needs_of(self.critic).get("actor", set())
        self.actor: Actor = partner("actor", self.spec, needs_of_actor)
        own = component if isinstance(component, Opponents) else None
        self.opponents: Opponents = own or partner("opponents", self.spec, needs.get("opponents", {"true_policies"}))
        self.update = component if isinstance(component, Update) else None
        self.steps: list[Metrics] = []
        self.outside: list[str] = []
        self.moved: list[str] = []

    def prepare(self) -> Team:
        """Attach the update, and make the optimiser."""
        if self.update is not None:
            self.update.attach(self.actor, self.critic)
        learnt = {id(p): p for module in self.modules().values() for p in module.parameters()}
        self.optimizer = torch.optim.Adam(learnt.values(), lr=5e-3) if learnt else None
        self._last = self._tensors()
        return self

    def modules(self) -> dict[str, nn.Module]:
        """What may be trained."""
        found: dict[str, nn.Module] = {"actor": self.actor, "critic": self.critic, "opponents": self.opponents}
        return found | ({"update": self.update} if self.update is not None else {})

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {name: {n: p.detach().clone() for n, p in m.named_parameters()} for name, m in self.modules().items()}

    def learning(self) -> Learning:
        """What an update works on; steps are counted, and changes outside of them noted."""
        return Learning(self.actor, self.critic, self.opponents, self.minimise, 0.5, moved=self._note_moved)

    def _note_moved(self, names: Sequence[str]) -> None:
        self.moved += names
        self._last |= {name: found for name, found in self._tensors().items() if name in names}

    def note_changes(self) -> None:
        """Note the components that have changed since the last step, but for those that were said to have moved."""
        self.outside += [name for name, module in self.modules().items() if changed(module, self._last[name])]

    def minimise(self, loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        """One optimiser step on a scalar ``[]``; see :class:`marlkit.learning.Minimise`."""
        self.note_changes()
        require(loss.dim() == 0, f"minimises a loss of shape {list(loss.shape)}", "Reduce it to a scalar.")
        require(loss.isfinite(), "minimises a loss that is NaN or infinite", "Look for a division or logarithm of zero.")
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = {}
        for name, module in self.modules().items():
            reached = [parameter for parameter in module.parameters() if parameter.grad is not None]
            if reached:
                norms[f"{name}/grad_norm"] = nn.utils.clip_grad_norm_(reached, max_grad_norm or float("inf"))
        if adjust is not None:
            adjust()
        self.optimizer.step()
        self._last = self._tensors()
        self.steps.append(norms)
        return norms

    def batch(self, size: tuple[int, int] = (4, 4), seed: int = 0) -> TensorDict:
        """What the update, and the components that it works on, read, ``[B, T]``: played by the actor and annotated."""
        batch_size = (size[0] * size[1],)
        wanted = {*self.actor.reads, *self.critic.reads, *self.opponents.reads, *(self.update.reads if self.update else ())}
        written = {*self.actor.writes, *self.critic.writes, *self.opponents.writes}
        rows = fake_batch(self.spec, batch_size, sorted(wanted - written, key=str), seed)
        for key in self.actor.carried:
            rows.set(key, batch_for(self.actor, batch_size, seed)[key])
        with torch.no_grad():
            self.actor(rows)
            self.opponents(rows)
            self.critic(rows)
        if keys.VALUE_TARGET in wanted:
            # The same for all agents, so that also those who agree on one critic can fit it.
            rows[keys.VALUE_TARGET] = rows[keys.VALUE_TARGET][:, :1].expand_as(rows[keys.VALUE_TARGET]).clone()
        return rows.unflatten(0, (size[1], size[0])).transpose(0, 1).clone()
