"""The rules that a component is held to: each is a small function, whose docstring is the rule."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlkit import rng
from marlkit.component import BASES, Actor, Component, Critic, Opponents
from marlkit.contract import KINDS

"""The class that every component of a section extends."""


class BrokenRule(Exception):
    """A rule is not kept.

    Attributes:
        problem: what the component does instead, after its name.
        remedy: what to do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True)
class Rule:
    """What components of some kinds have to do.

    Attributes:
        name: in words.
        text: the rule.
        sections: the kinds that it is for.
        trait: only for components with this trait.
        without: only for components without this trait.
        runs: whether it runs the component, which is left out where the team lacks a trait that the component needs.
        function: raises :class:`BrokenRule` where a component breaks it.
    """

    name: str
    text: str
    sections: tuple[str, ...]
    trait: str | None
    without: str | None
    runs: bool
    function: Callable[[Any], None]

    def concerns(self, component: Component) -> bool:
        """Whether it is a rule for this component."""
        if section_of(component) not in self.sections or (self.runs and lacking(component)):
            return False
        has = self.trait is None or self.trait in component.traits
        return has and (self.without is None or self.without not in component.traits)

    def hold(self, component: Component) -> None:
        """Hold a copy of a component to the rule, with random generators of its own.

        Raises:
            AssertionError: it breaks the rule; names class and rule, and says what to do.
        """
        who = type(component).__name__
        with rng.isolated(0):
            try:
                self.function(_enlivened(copy.deepcopy(component)) if self.runs else component)
            except BrokenRule as broken:
                raise AssertionError(f"{who} {broken.problem}. Rule `{self.name}`: {self.text} {broken.remedy}") from None
            except Exception as error:  # whatever a component does
                message = f"{who} failed with {type(error).__name__}: {error}. Rule `{self.name}`: {self.text}"
                raise AssertionError(f"{message} Mend what the traceback above names.") from error


RULES: list[Rule] = []
"""All rules, the fundamental ones first."""


def rule(
    *sections: str, trait: str | None = None, without: str | None = None, runs: bool = True
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a function of a component a rule for these sections, by default all."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        text = " ".join((inspect.getdoc(function) or "").split())
        name = function.__name__.replace("_", " ")
        RULES.append(Rule(name, text, sections or tuple(KINDS), trait, without, runs, function))
        return function

    return register


def document() -> str:
    """The rules as a part of a Markdown page: those for several kinds, then those of each."""
    several = [rule for rule in RULES if len(rule.sections) > 1]
    lines = ["# Rules", "", "`marlkit.testing.check_component` holds a component to them.", "", "## Several kinds", ""]
    lines += [f"- {_of(rule)}{rule.text}" for rule in several]
    for section in KINDS:
        own = [rule for rule in RULES if rule.sections == (section,)]
        lines += ["", f"## {section}", "", *(f"- {rule.text}" for rule in own)] if own else []
    return "\n".join(lines) + "\n"


def _of(rule: Rule) -> str:
    return "" if len(rule.sections) == len(KINDS) else f"({', '.join(rule.sections)}) "


def _enlivened(component: Component) -> Component:
    """A component with parameters as after some training: at first, last layers may be so small that nothing shows."""
    if isinstance(component, (Actor, Critic, Opponents)):
        with torch.no_grad():
            for parameter in component.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return component


def section_of(component: Component) -> str:
    """The section of a recipe that a component fills."""
    return next(section for section, base in BASES.items() if isinstance(component, base))


def rules_for(component: Component) -> Iterator[Rule]:
    """The rules that concern a component, in the order in which they are tried."""
    return (rule for rule in RULES if rule.concerns(component))


def with_parts(component: Component) -> Iterator[Component]:
    """A component and the components that it holds in options."""
    yield component
    for part in component.options.values():
        if isinstance(part, Component):
            yield from with_parts(part)


def needs_of(component: Component) -> dict[str, set[str]]:
    """The traits that a component and its parts need, by section."""
    found: dict[str, set[str]] = {}
    for member in with_parts(component):
        for section, wanted in member.contract.needed(member.options, member.spec.traits).items():
            if section in KINDS:
                found.setdefault(section, set()).update(wanted)
    return found


def lacking(component: Component) -> set[str]:
    """Traits that a component needs of the environment and that its team lacks."""
    return needs_of(component).get("env", set()) - component.spec.traits


def require(kept: bool | Tensor, problem: str, remedy: str) -> None:
    """Raise :class:`BrokenRule` unless something, a truth value or a tensor ``[]`` of one, is so."""
    if not kept:
        raise BrokenRule(problem, remedy)


def close(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors ``[*]`` are equal but for rounding; one product rounds otherwise than another of another size."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.is_floating_point():
        return torch.equal(first, second)
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters and buffers, ``[*]`` each."""
    held = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in held}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """The parameters and buffers, ``[*]`` each, that differ from :func:`tensors_of` before."""
    now = tensors_of(module)
    names = [name for name in now if name in before]
    return [name for name in names if not torch.equal(now[name].nan_to_num(), before[name].nan_to_num())]
