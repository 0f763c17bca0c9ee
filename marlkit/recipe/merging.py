"""Building one recipe on another: the rules of `extends` and of command-line overrides.

The rule: sections are merged option by option; where the `type` changes, the options that the new component also takes are
kept and the others are dropped, with a note. The same rule holds for a component inside another, such as ``update.step``, and
for a mapping of options that belong to what another option names: where `scenario` changes, those `scenario_options` are kept
that the new scenario also takes. What an override sets itself is never dropped so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from marlkit.contract import KINDS, Kind
from marlkit.errors import ComponentError, Problem, RecipeError
from marlkit.options import problem_with
from marlkit.recipe.catalogue import Entry, Option, find
from marlkit.recipe.located_yaml import DEEPEST, Located, Place, read_value
from marlkit.recipe.scalars import shown


def as_section(value: Located) -> Mapping[str, Located] | None:
    """The entries of a section; a bare word is its ``type``. ``None`` for any other value."""
    if isinstance(value.value, str):
        return {"type": value}
    return value.mapping


@dataclass
class Merge:
    """Merges recipes and records which options a change of `type` dropped.

    Attributes:
        folders: where dotted paths are looked up.
        notes: one sentence per dropped set of options, for the user.
    """

    folders: Sequence[Path] = ()
    notes: list[str] = field(default_factory=list)

    def recipes(self, base: Located, new: Located) -> Located:
        """The recipe ``base`` with the changes of ``new``."""
        merged = dict(base.value)
        for name, value in new.value.items():
            kind = KINDS.get(name)
            merged[name] = value if kind is None or name not in merged else self.section(kind, merged[name], value, name)
        return Located(merged, base.place if new.partial else new.place)

    def section(self, kind: Kind, base: Located, new: Located, path: str) -> Located:
        """The section ``base`` with the changes of ``new``."""
        old, change = as_section(base), as_section(new)
        if old is None or change is None:
            return new
        before, after = _type(old, kind), _type({**old, **change}, kind)
        entry = self._find(kind, after)
        kept = dict(old)
        if before != after and entry is not None:
            kept = {name: value for name, value in old.items() if name == "type" or _takes(entry, name, value)}
            self._note(path, str(before), entry, [name for name in old if name not in kept and name not in change])
        options: Mapping[str, Option] = {} if entry is None else entry.options
        for name, value in change.items():
            kept[name] = self._option(options.get(name), kept.get(name), value, f"{path}.{name}")
        if entry is not None:
            self._drop_held(entry, old, kept, path)
        return Located(kept, new.place if "type" in change else base.place)

    def _drop_held(self, entry: Entry, old: Mapping[str, Located], kept: dict[str, Located], path: str) -> None:
        """Drop the options of what ``old`` names that what is named now does not take; those that an override sets stay."""
        for option, (chooser, _) in entry.contract.holds.items():
            before, now = old.get(chooser), kept.get(chooser)
            entries = kept[option].mapping if option in kept else None
            if before is None or now is None or before.plain() == now.plain() or not entries:
                continue
            held = entry.held(option, {name: value.plain() for name, value in kept.items()}, self.folders)
            if held is None:
                continue  # what it takes is not known, or there is nothing of that name: checking or building tells
            inherited = (old[option].mapping or {}) if option in old else {}
            stale = [name for name in inherited if name not in held and entries.get(name) is inherited[name]]
            stale = [name for name in stale if not entries[name].place.override]
            if stale:
                kept[option] = replace(kept[option], value={n: v for n, v in entries.items() if n not in stale})
                named = ", ".join(f"`{path}.{option}.{name}`" for name in stale)
                became = f"`{before.plain()}` became `{now.plain()}`"
                self.notes.append(f"{path}.{chooser}: {became}, which does not take {named}: dropped.")

    def _option(self, option: Option | None, base: Located | None, new: Located, path: str) -> Located:
        if base is None:
            return new
        if option is not None and option.part is not None:
            return self.section(option.part, base, new, path)
        if new.partial and base.mapping is not None and new.mapping is not None:
            entries = dict(base.mapping)
            for name, value in new.mapping.items():
                entries[name] = self._option(None, entries.get(name), value, f"{path}.{name}")
            # What a file has written does not become the user's own by what he adds.
            return Located(entries, base.place)
        return new

    def _find(self, kind: Kind, name: Any) -> Entry | None:
        try:
            return find(kind, name, self.folders) if isinstance(name, str) else None
        except ComponentError:
            return None  # the check of the merged recipe reports it

    def _note(self, path: str, before: str, entry: Entry, dropped: Sequence[str]) -> None:
        if dropped:
            options = ", ".join(f"`{name}`" for name in dropped)
            self.notes.append(f"{path}: `{before}` became `{entry.name}`, which does not take {options}: dropped.")


def _type(section: Mapping[str, Located], kind: Kind) -> Any:
    return section["type"].value if "type" in section else kind.default


def _takes(entry: Entry, name: str, value: Located) -> bool:
    option = entry.options.get(name)
    if option is None:
        return False
    plain = value.plain()
    interpolated = isinstance(plain, str) and "${" in plain
    return interpolated or option.part is not None or problem_with(plain, option.annotation) is None


def read_override(text: str) -> Located:
    """Read ``critic.samples=100`` as the recipe ``{critic: {samples: 100}}``; the value as :func:`read_value` has it.

    Raises:
        RecipeError: the text does not have this form.
    """
    place = Place(f"override `{shown(text, 200)}`", override=True)
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise RecipeError([place.problem("", "has no value.", "Write `section.option=value` or `section=component`.")])
    if value.strip() in ("", "~"):
        raise RecipeError([place.problem(name, "has no value.", "Write `null` for none.")])
    if len(path) > DEEPEST:
        raise RecipeError([place.problem("", f"is deeper than {DEEPEST} levels.", "Write `section.option=value`.")])
    located = read_value(value, place, name.strip())
    for key in reversed(path):
        located = Located({key: located}, place, partial=True)
    return located


def read_overrides(overrides: Sequence[str]) -> tuple[list[Located], list[Problem]]:
    """Read all overrides, and the problems of those that cannot be read."""
    located: list[Located] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            located.append(read_override(text))
        except RecipeError as error:
            problems.extend(error.problems)
    return located, problems
