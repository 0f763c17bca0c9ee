"""Rules for components of every kind: what their contract and their constructor say."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from marlkit import keys
from marlkit.component import Component, option_parameters
from marlkit.contract import KINDS, TRAITS, Condition, Contract, When
from marlkit.errors import MarlkitError, did_you_mean
from marlkit.options import problem_with
from marlkit.recipe import docstrings
from marlkit.recipe.catalogue import find
from marlkit.spec import TeamSpec
from marlkit.testing.rules import BrokenRule, require, rule, section_of


@rule(runs=False)
def is_built_for_a_team(component: Component) -> None:
    """A component keeps the team spec that it was built for as `spec`, from which it takes all sizes."""
    found = getattr(component, "spec", None)
    require(isinstance(found, TeamSpec), f"has no `spec`, but {found!r}", "Set `self.spec = spec` in the constructor.")


@rule(runs=False)
def names_keys_of_the_table(component: Component) -> None:
    """Every key of a contract stands in the key table."""
    contract = component.contract
    for key in (*_entries(contract.reads), *_entries(contract.writes), *_entries(contract.predictions)):
        if keys.current(key) not in keys.TABLE:
            names = {keys.name(known): known for known in keys.TABLE}
            hint = did_you_mean(keys.name(key), names)
            require(False, f"names the key {key!r}, which is not in the table", f"Take a key of marlkit/keys.py.{hint}")


@rule(runs=False)
def names_known_traits(component: Component) -> None:
    """A trait of marlkit is written as in the list, for a kind that may have it; own traits have names of their own."""
    section, contract = section_of(component), component.contract
    for trait in _entries(contract.traits):
        _require_known(trait, section, "declares")
    for verb, table in (("needs", contract.needs), ("prefers", contract.prefers)):
        for target, wanted in table.items():
            for trait in _entries(tuple(wanted)):
                _require_known(trait, target if target in KINDS else None, f"{verb} of {target}")
    for condition in _conditions(component):
        if condition.value is None:
            known = condition.name in TRAITS and "env" in TRAITS[condition.name].sections
            hint = did_you_mean(condition.name, [name for name, trait in TRAITS.items() if "env" in trait.sections])
            problem = f"has the condition `{condition}`, which is no trait of an environment, and so never holds"
            require(known, problem, f"Write a trait of the environment, or `option=value`.{hint}")


def _require_known(trait: str, section: str | None, verb: str) -> None:
    if trait not in TRAITS:
        hint = did_you_mean(trait, TRAITS)
        require(not hint, f"{verb} the trait `{trait}`, which marlkit does not know", f"Give an own trait another name.{hint}")
    elif section is not None:
        sections = TRAITS[trait].sections
        problem = f"{verb} the trait `{trait}`, which only {' and '.join(sections)} may have"
        require(section in sections, problem, "Remove it, or give an own trait another name.")


@rule(runs=False)
def has_conditions_that_can_hold(component: Component) -> None:
    """A condition of a contract names an own option and a value that it may have, or a trait of the environment."""
    options = option_parameters(type(component))
    # A class may inherit a contract with options that its own constructor does not take.
    for condition in _conditions(component) if "contract" in vars(type(component)) else ():
        if condition.value is None:
            continue
        hint = did_you_mean(condition.name, options)
        problem = f"has the condition `{condition}`, but no option `{condition.name}`"
        require(condition.name in options, problem, f"Name a keyword-only argument of the constructor.{hint}")
        wrong = problem_with(yaml.safe_load(condition.value), options[condition.name].annotation)
        require(wrong is None, f"has the condition `{condition}`, but the option {wrong}", "Write a value that it may have.")


@rule(runs=False)
def has_a_contract_of_what_exists(component: Component) -> None:
    """A contract needs or prefers traits of sections or parts, inherits from parts, bounds own options, predicts own keys."""
    contract, options = component.contract, option_parameters(type(component))
    for field, named in (
        ("inherits", contract.inherits),
        ("at_most", tuple(contract.at_most)),
        ("formerly", tuple(contract.formerly)),
    ):
        for option in named:
            problem = f"names `{option}` under `{field}`, which is no option"
            require(option in options, problem, f"Name a keyword-only argument.{did_you_mean(option, options)}")
    for target in (*contract.needs, *contract.prefers):
        problem = f"needs traits of `{target}`, which is neither a section nor an option"
        require(target in KINDS or target in options, problem, f"Name a section.{did_you_mean(target, [*KINDS, *options])}")
    predicted = contract.predicted(component.options, component.spec.traits)
    if predicted is not None:
        problem = f"predicts `{keys.name(predicted)}`, which it does not write"
        require(predicted in component.writes, problem, "Add it to `writes`.")


@rule(runs=False)
def has_parts_that_it_can_use(component: Component) -> None:
    """A component that an option holds has the traits that the contract needs of it."""
    for target, wanted in component.contract.needed(component.options, component.spec.traits).items():
        part = component.options.get(target)
        if isinstance(part, Component):
            missing = ", ".join(sorted(set(wanted) - part.traits))
            require(not missing, f"holds a {type(part).__name__} that lacks {missing}", f"Give `{target}` another component.")


@rule(runs=False)
def takes_options_by_keyword(component: Component) -> None:
    """Options are keyword-only arguments of the constructor, annotated, and their defaults are what the annotation allows."""
    first, *others = inspect.signature(type(component)).parameters.values()
    by_keyword = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    for parameter in others:
        problem = f"takes `{parameter.name}` by position"
        require(parameter.kind in by_keyword, problem, f"Write `*` behind `{first.name}` in its constructor.")
    for name, parameter in option_parameters(type(component)).items():
        problem = f"has the option `{name}` without an annotation"
        require(
            parameter.annotation is not Any or "Any" in str(_written(component, name)),
            problem,
            "Annotate it (marlkit/options.py).",
        )
        if parameter.default is not inspect.Parameter.empty:
            wrong = problem_with(parameter.default, parameter.annotation)
            require(wrong is None, f"has a default that its option `{name}` refuses: it {wrong}", "Change default or annotation.")


def _written(component: Component, option: str) -> Any:
    """The annotation of an option as its constructor writes it."""
    for cls in type(component).__mro__:
        constructor = vars(cls).get("__init__")
        if constructor is not None and option in inspect.signature(constructor).parameters:
            return constructor.__annotations__.get(option)
    return None


@rule(runs=False)
def describes_its_options(component: Component) -> None:
    """Each option is described under `Args:` of the class's docstring, which `marlkit list` prints."""
    described: set[str] = set()
    for cls in type(component).__mro__:
        described |= set(docstrings.arguments(inspect.cleandoc(cls.__doc__ or "")))
    for name in option_parameters(type(component)):
        require(name in described, f"does not describe its option `{name}`", "Describe it under `Args:`.")


@rule(runs=False)
def is_read_without_running_it(component: Component) -> None:
    """A contract is made of literals, so that `marlkit check` reads it from the source, and finds what it is when it runs."""
    cls = type(component)
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is None or getattr(module, cls.__name__, None) is not cls or "." in cls.__qualname__:
        return  # made while running: there is no place that a recipe could name
    remedy = "Write its contract with literals, keys and When(...) only."
    try:
        # A file that is run has another name in recipes.
        name = Path(file).stem if cls.__module__ == "__main__" else cls.__module__
        read = _read(section_of(component), f"{name}.{cls.__name__}", Path(file).parent)
    except MarlkitError as error:
        raise BrokenRule(f"cannot be read by `marlkit check`: {error}", remedy) from None
    require(read == cls.contract, "has another contract when it runs than in its source", remedy)


@functools.lru_cache
def _read(section: str, dotted: str, folder: Path) -> Contract:
    return find(section, dotted, [folder]).contract


@rule("actor", "opponents", "critic", "targets", "estimator", "update", runs=False)
def holds_tensors_as_parameters_and_buffers(component: nn.Module) -> None:
    """Tensors are parameters, buffers or saved by `get_extra_state`; others stay behind when the component moves."""
    for name, _, remedy in loose_tensors(component):
        problem = f"keeps the tensor `{name}` as an attribute, so that `to(device)` leaves it behind"
        require(False, problem, f"{remedy[0].upper()}{remedy[1:]}.")


def loose_tensors(component: nn.Module) -> Iterator[tuple[str, torch.Tensor, str]]:
    """The tensors that a module holds in attributes, neither parameters nor buffers nor saved otherwise.

    Yields:
        Name, tensor ``[*]`` and remedy.
    """
    own = {id(tensor) for tensor in (*component.parameters(), *component.buffers())}
    for path, module in component.named_modules():
        saves = type(module).get_extra_state is not nn.Module.get_extra_state
        for name, value in vars(module).items():
            if saves or name in ("_parameters", "_buffers", "_modules"):
                continue
            for tensor in _held(value):
                if id(tensor) not in own and not tensor.is_meta:
                    yield f"{path}.{name}".lstrip("."), tensor, _registered(name, value, tensor)


def _registered(name: str, value: Any, tensor: torch.Tensor) -> str:
    """How the attribute ``name`` is to hold a tensor."""
    if isinstance(value, (list, tuple, dict)) and tensor.requires_grad:
        return f"use `nn.ModuleList`, `nn.ModuleDict` or `nn.ParameterList` for `{name}`"
    if tensor.requires_grad and tensor.is_leaf:
        return f"use `self.{name} = nn.Parameter(…)`"
    return f'use `self.register_buffer("{name}", …)`'


def _held(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _held(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _held(inner)


def _entries(items: tuple[Any, ...]) -> Iterator[Any]:
    """What a field of a contract holds under any condition."""
    for item in items:
        yield from item.then if isinstance(item, When) else (item,)


def _conditions(component: Component) -> Iterator[Condition]:
    contract = component.contract
    for items in (contract.reads, contract.writes, contract.traits, contract.predictions, *contract.needs.values()):
        yield from (part for item in items if isinstance(item, When) for part in item.parts)
