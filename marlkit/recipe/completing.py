"""Checking a recipe's names and values, and filling in defaults. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from marlkit.contract import KINDS, Kind
from marlkit.errors import ComponentError, Problem, did_you_mean, nearest
from marlkit.options import Range, describe_type, problem_with
from marlkit.recipe.catalogue import Entry, Option, components, find
from marlkit.recipe.interpolation import Sizes, entries, escape_missing, interpolated, leaves, literals
from marlkit.recipe.located_yaml import MOST_VALUES, Located, Place
from marlkit.recipe.merging import as_section
from marlkit.recipe.scalars import refuse_unfit, shown
from marlkit.recipe.variables import HIDDEN, Variables, as_written

Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
TOP_LEVEL = ("name", "seed", "extends")
MOST_TEXT = 100_000
"""Characters of all texts of a completed recipe."""
MISSING = "???"  # OmegaConf's mark for a mandatory value that is not set


@dataclass
class Completion:
    """A recipe that is being completed.

    Attributes:
        root: the merged recipe.
        folders: where dotted paths are looked up.
        config: the sections completed so far.
        entries: the component at each path, such as ``"update"`` and ``"update.step"``.
        places: where each path is written; defaults have none.
        problems: the problems found so far.
        unresolved: paths of interpolations that are not resolved, because a problem says why.
        variables: the environment variables found so far.
    """

    root: Located
    folders: Sequence[Path]
    config: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unresolved: set[str] = field(default_factory=set)
    variables: Variables = field(init=False)

    def __post_init__(self) -> None:
        self.variables = Variables(self.report, self._takes_text)

    def place(self, path: str) -> Place:
        """Where ``path`` is written, or the nearest enclosing entry that is."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places.get(path, self.root.place)

    def report(self, path: str, message: str, remedy: str = "", at: Place | None = None) -> None:
        """Add a problem with ``path``."""
        self.problems.append((at or self.place(path)).problem(path, message, remedy))

    def run(self, name: str) -> DictConfig:
        """Complete and check everything; problems are added to :attr:`problems`."""
        given = self.root.mapping or {}
        misspelt = {key: value for key, value in given.items() if key not in KINDS and key not in TOP_LEVEL}
        for key, default in (("name", name), ("seed", 0)):
            self.config[key] = given[key].value if key in given else default
            if key in given:
                self.places[key] = given[key].place
        for section, kind in KINDS.items():
            if section in given or kind.default is not None:
                self.config[section] = self._component(kind, given.get(section), section)
            elif not any(f"`{section}`" in did_you_mean(key, KINDS) for key in misspelt):
                remedy = f"Add `{section}: {{type: …}}`; `marlkit list {section}` shows the types."
                self.report(section, "is missing.", remedy)
        no_sections = [
            value.place.problem(key, "is no section.", self._with_option(key) or _sections(key))
            for key, value in misspelt.items()
        ]
        self.problems[:0] = no_sections
        config = self._resolved()
        self._check_top_level(config)
        self._check_values(config)
        if not self.variables.names:
            return config
        return OmegaConf.create(as_written(escape_missing(OmegaConf.to_container(config)), self.config))

    def _component(self, kind: Kind, value: Located | None, path: str) -> dict[str, Any] | None:
        given = {} if value is None else as_section(value)
        if value is not None:
            self.places[path] = value.place
        if value is not None and given is None:
            key = path.rpartition(".")[2]
            form = f"Write `{key}: component` or `{key}: {{type: component, …}}`."
            self.report(path, f"must name a component, got {value.plain()!r}.", form, value.place)
        entry = None if given is None else self._entry(kind, given, path)
        if entry is None or given is None:
            return None
        self.entries[path] = entry
        if "type" in given:
            self.places[f"{path}.type"] = given["type"].place
        for name, option in given.items():
            if name != "type" and name not in entry.options:
                remedy = self._inside(name, entry, given, path) or _options(name, entry)
                self.report(f"{path}.{name}", f"`{entry.name}` has no such option.", remedy, option.place)
        completed: dict[str, Any] = {"type": entry.name}
        for option_name, definition in entry.options.items():
            self._option(definition, given.get(option_name), f"{path}.{option_name}", entry, completed)
        return completed

    def _with_option(self, name: str) -> str:
        """The remedy for an option that stands where a section should."""
        owner = next((path for path, entry in self.entries.items() if name in entry.options), None)
        return "" if owner is None else f"Did you mean `{owner}.{name}`?"

    def _inside(self, name: str, entry: Entry, given: Mapping[str, Located], path: str) -> str:
        """The remedy for an option that belongs into a mapping of options, such as `scenario_options`."""
        plain = {option: value.plain() for option, value in given.items()}
        for option in entry.contract.holds:
            held = entry.held(option, plain, self.folders) or ()
            near = name if name in held else None if nearest(name, entry.options) else nearest(name, held, 0.75)
            if near:
                return f"Did you mean `{path}.{option}.{near}`?"
        for option, kind in ((option.name, option.part) for option in entry.options.values() if option.part is not None):
            part = as_section(given[option]) if option in given else None
            chosen = part["type"].value if part is not None and "type" in part else None
            try:
                inner = find(kind, chosen, self.folders) if isinstance(chosen, str) else None
            except ComponentError:
                continue  # told where it stands
            if inner is not None and name in inner.options:
                return f"`{inner.name}` has it: `{path}.{option}.{name}`."
        return ""

    def _entry(self, kind: Kind, given: Mapping[str, Located], path: str) -> Entry | None:
        named = given.get("type")
        if named is None and kind.default is None:
            self.report(path, "has no `type`.", f"`marlkit list {kind.section}` shows the types.")
            return None
        name = kind.default if named is None else named.value
        at = None if named is None else named.place
        if not isinstance(name, str):
            self.report(f"{path}.type", f"must be the name of a component, got {name!r}.", at=at)
            return None
        try:
            return find(kind, name, self.folders)
        except ComponentError as error:
            remedy = "" if "." in name else self._chosen_by(kind, name, path)
            self.report(f"{path}.type", f"{str(error).rstrip('.')}.".replace("?.", "?"), remedy, at)
            return None

    def _chosen_by(self, kind: Kind, name: str, path: str) -> str:
        """The remedy for a value of an option, such as the name of a scenario, in place of a component."""
        for entry in components(kind).values():
            for option, (chooser, _) in entry.contract.holds.items():
                if entry.held(option, {chooser: name}, self.folders) is not None:
                    return f"To have it as {chooser} of `{entry.name}`: `{path}.{chooser}={name}`."
        return ""

    def _option(self, option: Option, given: Located | None, path: str, entry: Entry, completed: dict[str, Any]) -> None:
        if given is None or given.value == MISSING:
            if option.required:
                self.report(path, f"`{entry.name}` needs this option.", _wanted(option), None if given is None else given.place)
            else:
                completed[option.name] = literals(_plain(option.default))
        elif option.part is not None and given.value is not None:
            completed[option.name] = self._component(option.part, given, path)
        else:
            self._note_places(given, path)
            completed[option.name] = given.plain()

    def _note_places(self, given: Located, path: str) -> None:
        self.places[path] = given.place
        for name, value in (given.mapping or {}).items():
            self._note_places(value, f"{path}.{name}")

    def _resolved(self) -> DictConfig:
        """The configuration with every ``${section.option}`` replaced by its value; environment variables are hidden."""
        hidden = self.variables.hide(self.config)
        problem = Sizes(as_written(hidden, self.config)).problem()
        if problem:
            path, message, remedy = problem
            self.report(".".join(path), message, remedy)
            self.unresolved = {".".join(found) for found in interpolated(self.config)}
        config = OmegaConf.create(hidden) if interpolated(hidden) else None
        resolved = {key: self._resolve(value, (key,), config) for key, value in hidden.items()}
        self._check_size(resolved)
        return OmegaConf.create(resolved)

    def _takes_text(self, path: str) -> bool:
        """Whether ``path`` is an option of a component that may be text, or is inside of one."""
        component, option, inner = path, "", ""
        while component and component not in self.entries:
            component, _, last = component.rpartition(".")
            option, inner = last, option
        found = self.entries[component].options.get(option) if component else None
        return found is not None and (inner != "" or problem_with(HIDDEN, found.annotation) is None)

    def _resolve(self, value: Any, path: tuple[str, ...], config: Any) -> Any:
        """The value at `path` of a configuration without interpolations, text in it as OmegaConf is to be given it."""
        if isinstance(value, (dict, list)):
            items = {name: self._resolve(entry, (*path, name), config) for name, entry in entries(value)}
            return items if isinstance(value, dict) else list(items.values())
        where = ".".join(path)
        if value == MISSING and isinstance(value, str):
            self.report(where, "has no value.", "Replace `???` by one.")
            return None
        if isinstance(value, str) and "${" in value:
            return None if where in self.unresolved else self._resolved_text(config, path, where)
        return value

    def _resolved_text(self, config: Any, path: tuple[str, ...], where: str) -> Any:
        try:
            found = config
            for key in path:
                found = found[int(key) if isinstance(found, ListConfig) else key]
            plain = OmegaConf.to_container(found, resolve=True) if isinstance(found, (DictConfig, ListConfig)) else found
            made = literals(plain)
            for leaf in leaves(made):
                refuse_unfit(leaf)
        except (OmegaConfBaseException, RecursionError) as error:
            self.report(where, f"cannot be resolved: {str(error).splitlines()[0]}.")
        except ValueError as error:
            self.report(where, *error.args)
        else:
            return made
        return None

    def _check_size(self, completed: Any) -> None:
        """Refuse a recipe that could be written, but not read again."""
        values, characters = _size(completed)
        if values > MOST_VALUES or characters > MOST_TEXT:
            message = f"holds {values} values and {characters} characters of text when completed."
            remedy = f"At most {MOST_VALUES} and {MOST_TEXT} fit into a recipe; larger tables belong into a component."
            self.report("", message, remedy)

    def _check_top_level(self, config: DictConfig) -> None:
        reported = {problem.where for problem in self.problems}
        problem = problem_with(config.seed, Seed)
        if problem and "seed" not in reported:
            self.report("seed", f"{problem}.")
        name = config.name
        fits = isinstance(name, str) and _FOLDER_NAME.fullmatch(name) and not _RESERVED.match(name.lower())
        if not fits and "name" not in reported:
            remedy = f"Use at most {LONGEST_NAME} letters, digits, `-`, `_` and `.`, a letter or digit first: `name: my_team`."
            quote = "" if isinstance(name, str) else " Quote a word that reads as another value."
            self.report("name", f"must be a word that can name a folder, got {shown(repr(name))}.", remedy + quote)

    def _check_values(self, config: DictConfig) -> None:
        plain = OmegaConf.to_container(config, resolve=True)
        for path, entry in self.entries.items():
            options = _get(plain, path)
            reported = {problem.where for problem in self.problems} | self.unresolved
            for name, option in entry.options.items():
                here = f"{path}.{name}"
                if name not in options or here in self.entries or not reported.isdisjoint({here, f"{here}.type"}):
                    continue
                problem = problem_with(options[name], option.annotation)
                if problem:
                    mistaken = "a word" in problem and isinstance(options[name], (bool, int, float))
                    self.report(here, f"{problem}.", "Quote a word that reads as another value." if mistaken else "")
            for name, limits in entry.contract.at_most.items():
                for limit in limits:
                    self._check_limit(plain, path, name, limit.split(" * "))
            broken = any(problem.where.startswith(f"{path}.") for problem in self.problems)
            if entry.contract.check and entry.trusted and not broken:
                for name, message in entry.ask(entry.contract.check, options, self.folders):
                    self.report(f"{path}.{name}", f"{message}.".replace("..", "."))

    def _check_limit(self, plain: Any, path: str, name: str, options: Sequence[str]) -> None:
        value = _get(plain, f"{path}.{name}")
        factors = [_get(plain, option) for option in options]
        if not all(type(number) is int and number >= 1 for number in (value, *factors)):
            return  # absent, or invalid and reported as that
        product = math.prod(factors)
        if value > product:
            shown = " * ".join(f"{option} ({factor})" for option, factor in zip(options, factors, strict=True))
            remedy = f"Set {path}.{name}={product} or less."
            self.report(f"{path}.{name}", f"must be at most {shown} = {product}, got {value}.", remedy)


LONGEST_NAME = 100
_FOLDER_NAME = re.compile(rf"(?=.{{1,{LONGEST_NAME}}}\Z)[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)")
"""Names that Windows keeps for devices."""


def _size(value: Any) -> tuple[int, int]:
    """The number of values, and that of the characters of texts and keys."""
    if isinstance(value, (dict, list)):
        keys = sum(map(len, value)) if isinstance(value, dict) else 0
        sizes = [_size(entry) for entry in (value.values() if isinstance(value, dict) else value)]
        return 1 + sum(size[0] for size in sizes), keys + sum(size[1] for size in sizes)
    return 1, len(value) if isinstance(value, str) else 0


def _wanted(option: Option) -> str:
    what = describe_type(option.annotation) if option.part is None else f"a component of the kind {option.part.section}"
    return f"Give {what}{': ' + option.description if option.description else '.'}"


ELSEWHERE = {"task": "env.scenario", "environment": "env", "policy": "actor", "value": "critic", "buffer": "data"}
"""Words that other libraries use, and what a recipe has in their place."""


def _sections(word: str) -> str:
    if word in ELSEWHERE:
        return f"Write `{ELSEWHERE[word]}`."
    known = [*KINDS, *TOP_LEVEL]
    return f"{did_you_mean(word, known)} A recipe has the sections {', '.join(KINDS)}, and {', '.join(TOP_LEVEL)}.".strip()


def _options(word: str, entry: Entry) -> str:
    taken = f"It takes: {', '.join(entry.options)}." if entry.options else "It takes no options."
    return f"{did_you_mean(word, ['type', *entry.options])} {taken}".strip()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _get(plain: Any, path: str) -> Any:
    for key in path.split("."):
        plain = plain.get(key) if isinstance(plain, dict) else None
    return plain
