"""What a built scenario says of its agents: their groups, and whether there are as many as its options ask for."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from marlkit.envs._vmas.scenarios import scenario_files
from marlkit.errors import OptionError

GROUPS = {False: "good_agents", True: "adversaries"}
"""The groups of agents by VMAS' mark ``Agent.adversary``, in its scenarios' own words."""

NUMBER = re.compile(r"(?:n|nb|num|number_of)_(?:(?P<which>\w+)_)?(?P<what>agents|adversaries)")
"""Names of options that are a number of agents: ``n_agents``, ``num_good_agents``, ``n_blue_agents``, ``num_adversaries``."""


def groups_of(scenario: Any, agents: Sequence[Any]) -> tuple[str, ...] | None:
    """The group of each of ``agents``; ``None`` where all of them share one aim.

    A scenario's own method ``agent_group(agent)`` decides; without it the two teams of `football`, or ``Agent.adversary``.

    Raises:
        OptionError: ``agent_group`` returned something else than a name.
    """
    own: Callable[[Any], Any] | None = getattr(scenario, "agent_group", None)
    names = tuple(own(agent) if callable(own) else _group(scenario, agent) for agent in agents)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise OptionError("scenario", f"`agent_group` must return the name of a group, got {wrong[0]!r}")
    return names if len(set(names)) > 1 else None


def _group(scenario: Any, agent: Any) -> str:
    if _is_football(type(scenario)):
        return "blue" if agent in scenario.blue_agents else "red"
    return GROUPS[bool(agent.adversary)]


def _is_football(scenario: type) -> bool:
    # VMAS loads a scenario anew from its file, so that its class is not the one that can be imported.
    methods = [vars(cls)["make_world"] for cls in scenario.__mro__ if "make_world" in vars(cls)]
    return str(scenario_files().get("football")) in {inspect.unwrap(method).__code__.co_filename for method in methods}


def refuse_other_numbers(scenario: str, options: Mapping[str, Any], agents: Sequence[Any]) -> None:
    """Check that a scenario was built with as many agents as its options ask for.

    Raises:
        OptionError: it has another number of them, so that the recipe would say something wrong.
    """
    for option, wanted in options.items():
        match = NUMBER.fullmatch(option)
        if match is None or type(wanted) is not int:
            continue
        counts = _all_counts(agents) if not match["which"] and match["what"] == "agents" else _counts(match, agents)
        if counts and wanted not in counts:
            built = counts[0]
            message = f"the scenario `{scenario}` was given `{option}: {wanted}` and has built {built} of them"
            raise OptionError(f"scenario_options.{option}", f"{message}; leave `{option}` out, or set it to {built}")


def _all_counts(agents: Sequence[Any]) -> list[int]:
    """All agents, those that a policy controls, those that are no adversaries, those of one name (``agent_0``, ``agent_1``)."""
    names = Counter(re.sub(r"[\W_]*\d+$", "", agent.name) for agent in agents)
    controlled = sum(agent.action_script is None for agent in agents)
    return [controlled, len(agents), sum(not agent.adversary for agent in agents), *names.values()]


def _counts(match: re.Match[str], agents: Sequence[Any]) -> list[int]:
    """The agents of a kind, by VMAS' mark or by a word of their names; empty where nothing tells which they are."""
    kind = match["which"] or match["what"]
    marks = {"adversaries": True, "good": False}
    if kind in marks and any(agent.adversary for agent in agents):
        return [sum(bool(agent.adversary) == marks[kind] for agent in agents)]
    named = sum(kind in re.split(r"[\W_]+", agent.name) for agent in agents)
    return [named] if named else []
