"""What can be known of VMAS' scenarios from their source files: names and options. Imports neither torch nor VMAS.

A scenario reads its options from ``kwargs`` one by one (``kwargs.pop("n_agents", 4)``) and VMAS only warns of those that are
not read. Reading the names from the source turns such a warning into an error before anything is built.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marlkit.contract import Code
from marlkit.errors import did_you_mean

NOT_INSTALLED = "needs the simulator VMAS, which is not installed: `pip install marlkit[vmas]`"


def scenario_folder() -> Path | None:
    """The folder of the installed scenarios; ``None`` where VMAS is not installed."""
    found = importlib.util.find_spec("vmas")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "scenarios"


@functools.cache
def scenario_files() -> dict[str, Path]:
    """The file of every scenario by its full name: ``balance``, ``mpe/simple_spread``, ``debug/waterfall``."""
    folder = scenario_folder()
    if folder is None:
        return {}
    files = sorted(file for file in folder.rglob("*.py") if file.name != "__init__.py")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def scenario_names() -> list[str]:
    """The full names of all scenarios; empty where VMAS is not installed."""
    return list(scenario_files())


def full_name(name: str) -> str | None:
    """The full name of a scenario that may be called without its folder; ``None`` where there is none of that name."""
    if name in scenario_files():
        return name
    return next((known for known in scenario_files() if known.rpartition("/")[2] == name), None)


def is_own_class(name: str) -> bool:
    """Whether ``name`` is a dotted path to a user's own scenario class, ``my_package.my_scenario.Scenario``."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def unknown_scenario(name: str) -> str:
    """The message for a name that no scenario has."""
    if scenario_folder() is None:
        return NOT_INSTALLED
    short = {known.rpartition("/")[2]: known for known in scenario_names()}
    hint = did_you_mean(name, [*short, *scenario_names()])
    return f"VMAS has no scenario `{name}`.{hint} It has: {', '.join(scenario_names())}"


@functools.cache
def scenario_option_names(name: str) -> frozenset[str]:
    """The options that a scenario reads, by looking through its source for uses of ``kwargs``.

    Raises:
        KeyError: there is no such scenario.
    """
    found = full_name(name)
    if found is None:
        raise KeyError(name)
    tree = ast.parse(scenario_files()[found].read_text(encoding="utf-8"))
    return frozenset(filter(None, (_option_read_by(node) for node in ast.walk(tree))))


def _option_read_by(node: ast.AST) -> str | None:
    """``"n_agents"`` for ``kwargs.pop("n_agents", …)``, ``kwargs.get("n_agents", …)`` and ``kwargs["n_agents"]``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"pop", "get"} and node.args:
        owner, key = node.func.value, node.args[0]
    elif isinstance(node, ast.Subscript):
        owner, key = node.value, node.slice
    else:
        return None
    named = isinstance(owner, ast.Name) and owner.id == "kwargs"
    return key.value if named and isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def unknown_option(scenario: str, option: str) -> str | None:
    """The message for an option that a scenario does not read; ``None`` if it reads it."""
    known = scenario_option_names(scenario)
    if option in known:
        return None
    has = f"It has: {', '.join(sorted(known))}" if known else "It has no options"
    return f"scenario `{scenario}` has no option `{option}`.{did_you_mean(option, known)} {has}"


def check(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problems of an ``env: {type: vmas, …}`` section, as ``(option, message)``, found without importing the simulator."""
    if scenario_folder() is None:
        yield "type", NOT_INSTALLED
        return
    scenario = options["scenario"]
    if is_own_class(scenario):
        return
    if full_name(scenario) is None:
        yield "scenario", unknown_scenario(scenario)
        return
    for option in options.get("scenario_options") or {}:
        message = unknown_option(scenario, str(option))
        if message is not None:
            yield f"scenario_options.{option}", message


def code(options: Mapping[str, Any]) -> Iterator[Code]:
    """The class of a user's own scenario; VMAS' own are no code of a stranger."""
    if is_own_class(str(options["scenario"])):
        yield Code("scenario", options["scenario"], options.get("scenario_options") or {})
