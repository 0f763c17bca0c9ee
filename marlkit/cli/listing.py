"""``marlkit list``: recipes, components, and the full description of one component. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marlkit import keys
from marlkit.cli import report
from marlkit.contract import KINDS, When, as_yaml
from marlkit.errors import ComponentError, MarlkitError, did_you_mean
from marlkit.options import describe_type
from marlkit.recipe import combinations, shipped, vocabulary
from marlkit.recipe.catalogue import Entry, Option, components, find

COLUMNS = ("option", "default", "takes", "description")


def print_list(what: str | None) -> None:
    """Print recipes and components.

    Args:
        what: ``None`` for everything, ``"recipes"`` or one of them, ``"scenarios"`` of VMAS, ``"combinations"`` for the table of
            what fits together, ``"traits"``, ``"keys"`` or ``"rules"`` for what contracts are made of and components are held to,
            a section (``"critic"`` or ``"critics"``), or one component (``"critic.local"``, ``"local"``,
            ``"my_package.MyCritic"``).

    Raises:
        MarlkitError: there is no recipe, section or component of that name.
    """
    if what is None:
        _print_recipes()
        for section in KINDS:
            _print_section(section)
    elif what in ("recipe", "recipes"):
        _print_recipes()
    elif what == "combinations":
        print(combinations.document(), end="")
    elif what in ("scenario", "scenarios"):
        _print_scenarios()
    elif what in ("traits", "keys", "rules"):
        print(_document(what), end="")
    elif (section := what if what in KINDS else what.removesuffix("s")) in KINDS:
        _print_section(section, options=True)
    elif what in shipped():
        report.console().print(shipped()[what].read_text(encoding="utf-8").rstrip(), soft_wrap=True)
    else:
        _print_component(_component(what))


def _document(what: str) -> str:
    if what == "rules":
        # With torch, which nothing else here needs.
        from marlkit.testing.rules import document

        return document()
    return vocabulary.traits() if what == "traits" else vocabulary.keys()


def describe_recipe(file: Path) -> str:
    """The description of a recipe in its first line, a comment."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _print_recipes() -> None:
    rows = [(name, describe_recipe(file)) for name, file in shipped().items()]
    report.print_sections("recipes", rows, ("name", "description"))


def _print_section(section: str, options: bool = False) -> None:
    found = components(section)
    if not options:
        rows = [(name, entry.summary) for name, entry in found.items()]
        report.print_sections(section, rows, ("name", "description"))
        return
    for entry in found.values():
        report.print_sections(f"{section}.{entry.name}: {entry.summary}", _options(entry), COLUMNS)


def _component(what: str) -> Entry:
    section, _, name = what.partition(".")
    if section in KINDS and name:
        return find(section, name, [Path.cwd()])
    if "." in what:
        return _dotted(what)
    everywhere = {name: entry for kind in KINDS for name, entry in components(kind).items()}
    if what not in everywhere:
        known = ["recipes", "scenarios", "combinations", "traits", "keys", "rules", *shipped(), *KINDS, *everywhere]
        raise MarlkitError(f"nothing is called `{what}`.{did_you_mean(what, known)} `marlkit list` shows everything.")
    return everywhere[what]


def _dotted(what: str) -> Entry:
    """The component at a dotted path, of whatever kind.

    Raises:
        ComponentError: it is none.
    """
    problems: list[ComponentError] = []
    for kind in KINDS:
        try:
            return find(kind, what, [Path.cwd()])
        except ComponentError as error:
            problems.append(error)
    raise problems[0]


def _print_scenarios() -> None:
    """The scenarios of VMAS and the options that each reads."""
    vmas = components("env")["vmas"]
    known = vmas.ask(f"{str(vmas.contract.check).partition(':')[0]}:listing", {}, ())
    rows = [(name, ", ".join(options)) for name, options in known.items()]
    report.print_sections("env.scenario", rows, ("scenario", "scenario_options"))


def _print_component(entry: Entry) -> None:
    out = report.console()
    out.print(f"{entry.kind.section}.{entry.name}\n{entry.dotted} ({entry.file}:{entry.line})\n", soft_wrap=True)
    out.print(f"{entry.docstring.partition(chr(10) + 'Args:')[0].strip()}\n", soft_wrap=True)
    report.print_sections("options", _options(entry), COLUMNS)
    contract = entry.contract
    fields = {"reads": contract.reads, "writes": contract.writes, "traits": contract.traits}
    rows = [(field, _condition(item)) for field, items in fields.items() for item in items]
    rows += [("needs", f"{target}: {_condition(item)}") for target, items in contract.needs.items() for item in items]
    rows += [("prefers", f"{target}: {', '.join(wanted)}") for target, wanted in contract.prefers.items()]
    rows += [("predicts", _condition(item)) for item in contract.predictions]
    report.print_sections("contract", rows, ("", ""))


def _options(entry: Entry) -> list[tuple[str, str, str, str]]:
    return [(option.name, _default(option), _takes(option), option.description) for option in entry.options.values()]


def _default(option: Option) -> str:
    if option.required:
        return "required"
    return as_yaml(list(option.default) if isinstance(option.default, tuple) else option.default)


def _takes(option: Option) -> str:
    return f"a component of the kind {option.part.section}" if option.part else describe_type(option.annotation)


def _condition(item: Any) -> str:
    if not isinstance(item, When):
        return _word(item)
    return f"{', '.join(map(_word, item.then))} (when {item.condition})"


def _word(item: Any) -> str:
    return keys.name(item)
