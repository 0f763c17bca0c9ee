"""What can be known of scenarios from their source files: names, options, whether agents are opposed. Imports no VMAS.

VMAS only warns of options that a scenario does not read, and only where the scenario asks for it. Reading the names from the
source turns this into an error before anything is built. No torch is imported.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlkit.contract import Code
from marlkit.envs._against import RANDOM, problem_with_player, runs_code
from marlkit.envs._vmas.scenario_source import Options, find_class, opposes_agents, options_of
from marlkit.errors import ComponentError, did_you_mean
from marlkit.recipe.source_reader import Class

MOST = 1000
"""Agents, packages and the like: what an option ``n_…`` of VMAS' scenarios counts, and ``n_agents`` of any."""

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


@functools.cache
def shipped_scenarios() -> dict[str, str]:
    """The class of every scenario that marlkit ships, as a dotted path, by its name."""
    files = sorted((Path(__file__).parent / "shipped").glob("*.py"))
    return {file.stem: f"{__package__}.shipped.{file.stem}.Scenario" for file in files if file.stem != "__init__"}


def scenario_names() -> list[str]:
    """The full names of all scenarios, VMAS' and marlkit's; empty where VMAS is not installed."""
    return [*scenario_files(), *shipped_scenarios()] if scenario_files() else []


def listing(options: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, list[str]]:
    """All scenarios with the names of the options that each is known to read."""
    found = {name: scenario_options(name, folders) for name in scenario_names()}
    return {name: sorted(known.used) if known is not None else [] for name, known in found.items()}


def full_name(name: str) -> str | None:
    """The full name of a scenario that may be called without its folder; ``None`` where there is none of that name."""
    if name in scenario_names():
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
    return f"there is no scenario `{name}`.{hint} There are: {', '.join(scenario_names())}"


def scenario_class(name: str, folders: Sequence[Path] = ()) -> Class | None:
    """The class of a scenario, by its name or its dotted path; ``None`` where only importing it would tell.

    Raises:
        ComponentError: there is none, or it is no scenario.
    """
    if is_own_class(name):
        return find_class(name, folders)
    found = full_name(name)
    if found is None:
        raise ComponentError(unknown_scenario(name))
    return find_class(shipped_scenarios().get(found, f"vmas.scenarios.{found.replace('/', '.')}.Scenario"))


def scenario_options(name: str, folders: Sequence[Path] = ()) -> Options | None:
    """The options that a scenario reads; ``None`` where its source does not tell them all.

    Raises:
        ComponentError: there is no such scenario.
    """
    cls = scenario_class(name, folders)
    return None if cls is None else options_of(cls)


def unknown_option(scenario: str, option: str, known: Options) -> str | None:
    """The message for an option that a scenario does not read, or does not use; ``None`` if it does."""
    if option in known.used:
        return None
    has = f"It has: {', '.join(sorted(known.used))}" if known.used else "It has no options"
    if option in known.ignored:
        return f"scenario `{scenario}` takes the option `{option}` and does not use it; leave it out. {has}"
    return f"scenario `{scenario}` has no option `{option}`.{did_you_mean(option, known.used)} {has}"


# --- what the contract of the environment refers to ------------------------------------------------------------------------


def check(options: Mapping[str, Any], folders: Sequence[Path] = ()) -> Iterator[tuple[str, str]]:
    """Problems of an ``env: {type: vmas, …}`` section, as ``(option, message)``, found without importing the simulator."""
    if scenario_folder() is None:
        yield "type", NOT_INSTALLED
        return
    problem = problem_with_player(options.get("against", RANDOM), options.get("train"))
    if problem is not None:
        yield "against", problem
    scenario = options["scenario"]
    try:
        known = scenario_options(scenario, folders)
    except ComponentError as error:
        yield "scenario", f"`{scenario}` is no scenario: {error}" if is_own_class(scenario) else str(error)
        return
    for option, value in (options.get("scenario_options") or {}).items():
        message = None if known is None else unknown_option(scenario, str(option), known)
        counts = option == "n_agents" or (str(option).startswith("n_") and not is_own_class(scenario))
        if message is None and counts and type(value) is int and value > MOST:
            message = f"must be at most {MOST}, got {value}: a scenario makes an object for each"
        if message is not None:
            yield f"scenario_options.{option}", message


def held_options(options: Mapping[str, Any], folders: Sequence[Path] = ()) -> frozenset[str] | None:
    """The names that ``scenario_options`` is known to take; ``None`` where its source does not tell, or there is none."""
    try:
        known = scenario_options(str(options.get("scenario")), folders)
    except ComponentError:
        return None
    return None if known is None else known.used


def traits(options: Mapping[str, Any], folders: Sequence[Path] = ()) -> tuple[str, ...] | None:
    """``opposing``, where the agents that are trained do not share one aim; ``None`` where only building tells."""
    if options.get("train") is not None:
        return ()
    try:
        cls = scenario_class(str(options.get("scenario")), folders)
    except ComponentError:
        return ()
    opposing = None if cls is None else opposes_agents(cls, options.get("scenario_options") or {})
    return None if opposing is None else ("opposing",) * opposing


def code(options: Mapping[str, Any]) -> Iterator[Code]:
    """The class of a user's own scenario, VMAS' and marlkit's are no code of a stranger; and a user's own player."""
    if options.get("train") is not None and runs_code(str(options.get("against"))):
        yield Code("against", str(options["against"]))
    if is_own_class(str(options["scenario"])):
        yield Code("scenario", options["scenario"], options.get("scenario_options") or {})
