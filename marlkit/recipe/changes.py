"""Changes of a recipe that an error message may suggest, tried out before they are. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from marlkit.options import problem_with
from marlkit.recipe.catalogue import Entry, components
from marlkit.recipe.scalars import scalar_node, value_of

if TYPE_CHECKING:
    from pathlib import Path

    from marlkit.recipe.fit import Selection
    from marlkit.recipe.located_yaml import Place


@dataclass(frozen=True)
class Change:
    """One override.

    Attributes:
        path: what it sets: a component (``"update"``) or an option (``"actor.share"``).
        value: the text behind the equals sign.
        entries: for a component, it and its parts by path.
    """

    path: str
    value: str
    entries: Mapping[str, Entry] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.path}={self.value}"

    @property
    def on_command_line(self) -> str:
        """The override as a shell takes it."""
        return f"'{self}'" if " " in self.value else str(self)


@dataclass(frozen=True)
class Changed:
    """A selection after some changes."""

    before: Selection
    entries: Mapping[str, Entry]
    completed: Mapping[str, Mapping[str, Any]]
    built: frozenset[str] | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where dotted paths are looked up."""
        return self.before.folders

    def options(self, path: str) -> dict[str, Any]:
        """The completed options of the component at ``path``."""
        return dict(self.completed[path])

    def place(self, path: str) -> Place:
        """Where ``path`` is written."""
        return self.before.place(path)

    def accepts(self, overrides: Sequence[str]) -> bool:
        """Whether the names and values of the recipe behind it allow ``overrides``."""
        return self.before.accepts(overrides)


def changed(selection: Selection, change: Change) -> Changed:
    """A selection after a change; another component keeps the options that it takes too, as in :mod:`marlkit.recipe.merging`."""
    options: dict[str, Mapping[str, Any]] = {path: selection.options(path) for path in selection.entries}
    # Another environment has not been built.
    built = None if change.path.partition(".")[0] == "env" else selection.built
    if not change.entries:
        component, _, name = change.path.rpartition(".")
        options[component] = {**options[component], name: value_of(scalar_node(change.value))}
        return Changed(selection, selection.entries, options, built)
    kept = {path: entry for path, entry in selection.entries.items() if not f"{path}.".startswith(f"{change.path}.")}
    for path, entry in change.entries.items():
        before = options.get(path, {})
        options[path] = entry.defaults | {n: v for n, v in before.items() if n in entry.options and _takes(entry, n, v)}
    return Changed(selection, {**kept, **change.entries}, options, built)


def _takes(entry: Entry, name: str, value: Any) -> bool:
    option = entry.options[name]
    return option.part is None and problem_with(value, option.annotation) is None


def swaps(selection: Selection, path: str, name: str) -> Iterator[Change]:
    """The ways to put the component `name` at `path`: with the parts that are there, or with parts of marlkit's.

    None where it has an option that must be given and nothing says what to give.
    """
    entry = components(selection.entries[path].kind)[name]
    present = {f"{path}.{option}" for option in entry.options if entry.options[option].part is not None} & set(selection.entries)
    required = {option.name: option.part for option in entry.options.values() if option.required}
    if any(part is None for part in required.values()):
        return
    absent = [option for option in required if f"{path}.{option}" not in present]
    if not absent:
        within = {p: e for p, e in selection.entries.items() if any(f"{p}.".startswith(f"{kept}.") for kept in present)}
        yield Change(path, name, {path: entry, **within})
        return
    choices = [[e for e in components(part).values() if not _demands(e)] for o, part in required.items() if o in absent and part]
    for chosen in itertools.product(*choices):
        parts = dict(zip(absent, chosen, strict=True))
        text = ", ".join(f"{option}: {part.name}" for option, part in parts.items())
        entries = {path: entry} | {f"{path}.{option}": part for option, part in parts.items()}
        yield Change(path, f"{{type: {name}, {text}}}", entries)


def _demands(entry: Entry) -> bool:
    return any(option.required for option in entry.options.values())
