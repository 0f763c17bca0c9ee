"""Which components fit together: every combination of marlkit's own, decided by contracts alone. Imports no torch.

A combination names an actor, a critic, an opponent model, an estimator, an update and data. Where its defaults do not fit, the
options that would help are read from the conditions of the contracts (``share: none`` for separate parameters, for instance).
Combinations that fit then are *accepted*, with those options; the others are *refused*.
"""

from __future__ import annotations

import functools
import itertools
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from marlkit import keys
from marlkit.contract import KINDS, Condition, When, as_yaml
from marlkit.recipe.catalogue import Entry, components
from marlkit.recipe.fit import Member, environments, fits, members, skipped_sections, unmet, unpreferred, writers
from marlkit.recipe.located_yaml import Place

CHOSEN = ("actor", "critic", "opponents", "estimator", "update", "data")
"""The sections that a combination chooses; the others do not decide what fits."""

LEVELS = 1
"""How deep the table looks into components that hold others."""

ENVIRONMENTS = {"discrete": {"discrete", "team_reward"}, "continuous": {"continuous", "team_reward"}}
"""Traits of the environment by kind of actions: the most permissive ones, with one reward for the team."""


@dataclass(frozen=True)
class Combination:
    """Components by path (``"update"``, ``"update.step"``) for one kind of actions, and options that differ from the defaults.

    A :class:`marlkit.recipe.fit.Selection`, as recipes are.
    """

    actions: str
    entries: Mapping[str, Entry]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    built: frozenset[str] | None = None

    def options(self, path: str) -> dict[str, Any]:
        """The completed options of the component at ``path``."""
        return {**self.entries[path].defaults, **self.settings.get(path, {})}

    def place(self, path: str) -> Place:
        """The place of ``path``, which is in no file."""
        return Place(self.name)

    def accepts(self, overrides: Sequence[str]) -> bool:
        """Whether names and values stay valid after ``overrides``: they come from contracts."""
        return True

    def name_of(self, section: str) -> str:
        """The component of a section or at a path with its parts: ``sequential(ppo_clip)``."""
        parts = [path for path in self.entries if path.rpartition(".")[0] == section]
        return self.entries[section].name + (f"({', '.join(map(self.name_of, parts))})" if parts else "")

    @property
    def name(self) -> str:
        """The kind of actions and all components, joined by hyphens."""
        return "-".join([self.actions, *(self.name_of(section) for section in CHOSEN)])

    def with_settings(self, found: Iterable[tuple[str, str, Any]]) -> Combination:
        """The same with further options ``(path, option, value)``."""
        settings = {path: dict(options) for path, options in self.settings.items()}
        for path, option, value in found:
            settings.setdefault(path, {})[option] = value
        return Combination(self.actions, self.entries, settings)


def combinations() -> Iterator[Combination]:
    """Every combination, with its defaults."""
    choices = [list(_choices(section, LEVELS)) for section in CHOSEN]
    for actions in ENVIRONMENTS:
        for chosen in itertools.product(*choices):
            yield _combination(actions, chosen)


def _combination(actions: str, chosen: Iterable[Mapping[str, Entry]]) -> Combination:
    fixed = {
        section: components(section)[kind.default] for section, kind in KINDS.items() if kind.default and section not in CHOSEN
    }
    env, options = _environment(actions)
    entries = {"env": env} | fixed | {path: entry for part in chosen for path, entry in part.items()}
    return Combination(actions, entries, {"env": options})


@functools.cache
def decided() -> tuple[Combination, ...]:
    """Every combination, with the options under which it fits, where there are any."""
    return tuple(map(settled, combinations()))


@functools.cache
def accepted() -> tuple[Combination, ...]:
    """The combinations that fit."""
    return tuple(filter(fits, decided()))


@functools.cache
def tried() -> tuple[Combination, ...]:
    """Of the accepted combinations so many that any three choices that fit together are in one of them.

    An opponent model whose keys no component reads does not run and is left out, unless it is the default.
    """
    able = [found for found in accepted() if found.entries["opponents"].name == KINDS["opponents"].default or not _unread(found)]
    rows = [dict(zip(COLUMNS[:-1], _row(found), strict=False)).items() for found in able]
    triples = [set(itertools.combinations(row, 3)) for row in rows]
    left = set().union(*triples)
    chosen: list[int] = []
    while left:
        chosen.append(max(range(len(able)), key=lambda index: len(triples[index] & left)))
        left -= triples[chosen[-1]]
    return tuple(able[index] for index in sorted(chosen))


def _unread(found: Combination) -> bool:
    """Whether nothing reads the keys of the opponent model."""
    return bool(skipped_sections(members(found, environments(found)[0])))


@functools.cache
def deeper() -> tuple[Combination, ...]:
    """One level deeper than the table: for each component that holds one with a part, the first combination that fits."""
    found = []
    for section in CHOSEN:
        shallow = {section: list(_choices(section, 0)) for section in CHOSEN}
        for choice in _choices(section, LEVELS + 1):
            if max(path.count(".") for path in choice) > LEVELS:
                others = itertools.product(*(shallow[other] for other in CHOSEN if other != section))
                able = (settled(_combination("discrete", (choice, *rest))) for rest in others)
                found += list(itertools.islice(filter(fits, able), 1))
    return tuple(found)


@functools.cache
def _environment(actions: str) -> tuple[Entry, dict[str, Any]]:
    """The first environment for a kind of actions under some options, and these options."""
    wanted = ENVIRONMENTS[actions]
    for entry in components("env").values():
        options = {
            part.name: _value(value)
            for part in _conditions(entry.contract.traits, wanted)
            for value in part.settings((), hold=True)
        }
        if wanted <= set(entry.contract.resolve("traits", entry.defaults | options, ())):
            return entry, options
    raise LookupError(f"no environment of marlkit has the traits {', '.join(sorted(wanted))}")


def _conditions(entries: Iterable[Any], wanted: set[Any]) -> Iterator[Condition]:
    """What decides whether any of ``wanted`` is among the entries of a contract."""
    yield from (part for entry in entries if isinstance(entry, When) and wanted & set(entry.then) for part in entry.parts)


def _value(text: str) -> Any:
    return OmegaConf.create(f"value: {text}").value


def _choices(section: str, levels: int, path: str = "") -> Iterator[dict[str, Entry]]:
    """The components of a section, each with every choice of its required parts, so many levels deep.

    Those with other required options are left out: nothing says which value to try.
    """
    path = path or section
    for entry in components(section).values():
        if any(option.required and option.part is None for option in entry.options.values()):
            continue
        parts = {name: option.part for name, option in entry.options.items() if option.part is not None and option.required}
        if not parts:
            yield {path: entry}
        elif levels:
            inner = [
                list(_choices(kind.section, levels - 1, f"{path}.{name}")) for name, kind in parts.items() if kind is not None
            ]
            for chosen in itertools.product(*inner):
                yield {path: entry} | {inside: other for part in chosen for inside, other in part.items()}


def settled(combination: Combination) -> Combination:
    """The combination with options under which it fits, without a warning if possible; unchanged where there are none."""
    tried = combination
    for _ in range(len(CHOSEN)):
        if fits(tried):
            return _advised(tried)
        changes = list(_changes(tried))
        if not changes:
            return combination
        tried = tried.with_settings(changes)
    return tried if fits(tried) else combination


def _advised(combination: Combination) -> Combination:
    """A combination that fits, with the options that give the traits that its components prefer, if it then still fits."""
    by_path = {member.path: member for member in members(combination, environments(combination)[0])}
    missing = [(path, trait) for member in by_path.values() for path, trait, _ in unpreferred(member, by_path)]
    better = combination.with_settings(found for path, trait in missing for found in _giving(by_path[path], "traits", {trait}))
    return better if fits(better) else combination


def _changes(combination: Combination) -> Iterator[tuple[str, str, Any]]:
    """The options that would give an unmet trait, write a missing key, or avoid reading it."""
    environment = environments(combination)[0]
    team = members(combination, environment)
    by_path = {member.path: member for member in team}
    for member, found in writers(team):
        for path, missing in unmet(member, by_path, environment):
            if path != "env":
                yield from _giving(by_path[path], "traits", set(missing))
        unread: set[Any] = set(member.reads) - set(found)
        for writer in team:
            yield from _giving(writer, "writes", unread | {keys.current(key) for key in unread})
        yield from _without(member, unread)


def _giving(member: Member, what: str, wanted: set[Any]) -> Iterator[tuple[str, str, Any]]:
    for part in _conditions(getattr(member.entry.contract, what), wanted):
        if part.value is not None and not part.allows(member.options.get(part.name)):
            values = part.settings(typing.get_args(_annotation(member, part.name)), hold=True)
            yield from ((member.path, part.name, _value(value)) for value in values[:1])


def _without(member: Member, unread: set[Any]) -> Iterator[tuple[str, str, Any]]:
    for part in _conditions(member.entry.contract.reads, unread):
        if part.value is not None:
            others = part.settings(typing.get_args(_annotation(member, part.name)), hold=False)
            yield from ((member.path, part.name, _value(other)) for other in others[:1])


def _annotation(member: Member, option: str) -> Any:
    return member.entry.options[option].annotation


INTRODUCTION = """# What fits together

Every combination of marlkit's actors, critics, opponent models, estimators, updates and data that can be trained; a row is the
product of what its cells list. The options in the last column are needed, or a component prefers what they give and `marlkit
check` warns without them; the others are at their defaults. Any other combination of these components, with these options, is
refused by `marlkit check` before anything is built, with the reason and with what would fit.

Left out are components with an option that has no default, such as the path of a network of your own, and components inside
components inside components. The same contracts decide these, and `marlkit check` says whether they fit. So deep these fit:
{deeper}.

Made by `make combinations`. The table has {accepted} combinations. A test trains {tried} of them for two iterations and resumes
them (`make exhaustive`; `make test` takes every third), so that any three choices in different columns that fit together are in
one of them; and one with each of those named above.
The rest is decided by contracts alone.

"""

COLUMNS = ("update", "critic", "actor", "data", "estimator", "opponents", "actions", "options")


def document() -> str:
    """All that fits, as a Markdown page."""
    rows = [_row(found) for found in accepted()]
    cells = [tuple(frozenset([value]) for value in row) for row in rows]
    for axis in (4, 5, 6, 3, 2, 1):
        cells = _merged(cells, axis)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += sorted(f"| {' | '.join(', '.join(sorted(cell)) for cell in row)} |" for row in cells)
    names = ", ".join(f"`{found.name_of(section)}`" for found in deeper() for section in _deepest(found))
    return INTRODUCTION.format(accepted=len(accepted()), tried=len(tried()), deeper=names) + "\n".join(lines) + "\n"


def _deepest(found: Combination) -> list[str]:
    return [path.partition(".")[0] for path in found.entries if path.count(".") > LEVELS]


def _row(found: Combination) -> tuple[str, ...]:
    named = {section: found.name_of(section) for section in CHOSEN} | {"actions": found.actions}
    options = [f"{path}.{name}={as_yaml(v)}" for path, own in found.settings.items() if path != "env" for name, v in own.items()]
    return tuple((named | {"options": " ".join(sorted(options))})[column] for column in COLUMNS)


def _merged(rows: list[tuple[frozenset[str], ...]], axis: int) -> list[tuple[frozenset[str], ...]]:
    """Rows that differ in one column only, as one row."""
    found: dict[tuple[frozenset[str], ...], frozenset[str]] = {}
    for row in rows:
        rest = (*row[:axis], *row[axis + 1 :])
        found[rest] = found.get(rest, frozenset()) | row[axis]
    return [(*rest[:axis], values, *rest[axis:]) for rest, values in found.items()]
