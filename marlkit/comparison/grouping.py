"""Which runs are of one task, and which are repetitions of one another with other seeds. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from marlkit.comparison.loading import SLACK, Run
from marlkit.contract import as_yaml
from marlkit.errors import RunError

By = Literal["override", "recipe"]
ENVIRONMENT = "env"
NOT_THE_TASK: Mapping[str, tuple[str, ...] | None] = {"num_envs": None, "reward": ("individual", "mean")}
"""Options of environments that leave the task and its returns as they are; ``None``: whatever their value. A return is a mean
over the agents, which their rewards have in common with the mean that a recipe may give to each of them."""
PRECISION = "trainer.precision"
"""The one option of the trainer, beside the budget, that decides what is learnt."""
ABSENT = object()

Groups = Mapping[str, Sequence[Run]]


@dataclass(frozen=True)
class Task:
    """What is learnt: an environment with its options.

    Attributes:
        name: short, unique among the tasks that are compared.
        environment: the type of the environment.
        options: of the environment, as words.
        groups: the runs by the label of their group, in order of seeds.
    """

    name: str
    environment: str
    options: str
    groups: Groups

    @property
    def budget(self) -> int:
        """Joint steps of its runs; the least, where the last iterations differ in length."""
        return min(run.budget for runs in self.groups.values() for run in runs)


def tasks_of(runs: Sequence[Run], by: By) -> tuple[list[Task], list[str]]:
    """The runs by task and by group, and notes on what a reader has to know.

    Args:
        runs: of any tasks.
        by: ``"override"``: a group has one recipe and one value of everything that its runs differ in, but the seed;
            ``"recipe"``: it has one recipe.

    Raises:
        RunError: budgets differ within a task, or a run is there twice; names all of them.
    """
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(json.dumps(_task_options(run), sort_keys=True, default=str), []).append(run)
    problems = [problem for own in by_task.values() for problem in (*_other_budgets(own), *_duplicates(own))]
    if problems:
        raise RunError("\n".join(problems))
    differing = _differing(by_task.values())
    labels = {id(run): _label(run, differing.get(run.recipe.name, ()), by) for run in runs}
    order = sorted(set(labels.values()), key=_naturally)
    tasks = []
    for name, own in zip(_names(list(by_task.values())), by_task.values(), strict=True):
        groups = {label: sorted((run for run in own if labels[id(run)] == label), key=lambda run: run.seed) for label in order}
        options = ", ".join(f"{key.removeprefix('env.')}={as_yaml(value)}" for key, value in _task_options(own[0]).items())
        kind = str(own[0].leaves[f"{ENVIRONMENT}.type"])
        tasks.append(Task(name, kind.rpartition(".")[2], options, {label: found for label, found in groups.items() if found}))
    tasks.sort(key=lambda task: _naturally(task.name))
    return tasks, [*(_pooled(differing) if by == "recipe" else []), *_notes(tasks)]


# --- what differs -------------------------------------------------------------------------------------------------------------


def _task_options(run: Run) -> dict[str, Any]:
    inside = f"{ENVIRONMENT}."
    return {
        key: value for key, value in run.leaves.items() if key.startswith(inside) and not _is_setting(key[len(inside) :], value)
    }


def _is_setting(option: str, value: Any) -> bool:
    values = NOT_THE_TASK.get(option, ())
    return values is None or value in values


def _settings(run: Run) -> dict[str, Any]:
    """What decides how a run learns, but for its seed, its task and its budget."""
    other = {"name", "seed", *_task_options(run)}
    leaves = run.leaves.items()
    return {key: value for key, value in leaves if key not in other and (key == PRECISION or not key.startswith("trainer."))}


def _differing(by_task: Iterable[Sequence[Run]]) -> dict[str, list[str]]:
    """By recipe, the settings that its runs on one task do not share.

    Options of components of different types do not count: the type says it.
    """
    found: dict[str, dict[str, None]] = {}
    for runs in by_task:
        for recipe in {run.recipe.name for run in runs}:
            own = [_settings(run) for run in runs if run.recipe.name == recipe]
            for key in dict.fromkeys(key for settings in own for key in settings):
                alike: dict[str, set[str]] = {}
                for settings in own:
                    alike.setdefault(_types_above(key, settings), set()).add(_text(settings.get(key, ABSENT)))
                if any(len(values) > 1 for values in alike.values()):
                    found.setdefault(recipe, {})[key] = None
    return {recipe: list(keys) for recipe, keys in found.items()}


def _types_above(key: str, settings: Mapping[str, Any]) -> str:
    """The types of the components that a setting is in; for a type itself, of those around it."""
    path = key.removesuffix(".type").split(".")[:-1] if key.endswith(".type") else key.split(".")[:-1]
    types = [settings.get(".".join([*path[: depth + 1], "type"])) for depth in range(len(path))]
    return json.dumps(types, default=str)


def _text(value: Any) -> str:
    return "absent" if value is ABSENT else as_yaml(value)


def _label(run: Run, differing: Sequence[str], by: By) -> str:
    """The recipe, and the overrides that make it the group; ``critic.type`` is written as on the command line."""
    settings = _settings(run)
    shown = [f"{key.removesuffix('.type')}={as_yaml(settings[key])}" for key in differing if key in settings]
    return " ".join([run.recipe.name, *(shown if by == "override" else [])])


def _naturally(text: str) -> list[tuple[bool, float, str]]:
    """A key by which ``samples=20`` comes before ``samples=100``."""
    parts = re.findall(r"\d+(?:\.\d+)?|\D+", text)
    return [(True, float(part), "") if part[0].isdigit() else (False, 0.0, part) for part in parts]


def _names(by_task: Sequence[Sequence[Run]]) -> list[str]:
    """Short names: the first option that is a word, such as a scenario, and what else tells the tasks apart."""
    options = [_task_options(runs[0]) for runs in by_task]
    short = [_word(own) for own in options]
    keys = dict.fromkeys(key for own in options for key in own)
    names = []
    for own, name in zip(options, short, strict=True):
        alike = [other for other, word in zip(options, short, strict=True) if word == name]
        telling = [key for key in keys if len({_text(other.get(key, ABSENT)) for other in alike}) > 1]
        shown = [f"{key.removeprefix('env.')}={as_yaml(own[key])}" for key in telling if key in own]
        names.append(" ".join([name, *shown]))
    return names


def _word(options: Mapping[str, Any]) -> str:
    words = [value for key, value in options.items() if isinstance(value, str) and not key.endswith(".type")]
    return (words[0] if words else str(options.get(f"{ENVIRONMENT}.type", ""))).rpartition(".")[2]


# --- what cannot be compared, and what has to be told ---------------------------------------------------------------------------


def _other_budgets(runs: Sequence[Run]) -> list[str]:
    budgets = {run.budget for run in runs}
    if max(budgets) - min(budgets) <= SLACK * max(budgets):
        return []
    told = [f"    {run.folder}: {run.budget:,} frames" for run in sorted(runs, key=lambda run: run.budget)]
    remedy = (
        f"Compare the first frames of all with --frames {min(budgets)}, or train the shorter ones on: set trainer.iterations in "
        "their recipe.yaml and `marlkit resume` them."
    )
    return ["\n".join([f"{_names([runs])[0]}: the last evaluations do not come after equal budgets. {remedy}", *told])]


def _duplicates(runs: Sequence[Run]) -> list[str]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps([run.recipe.name, run.seed, _settings(run)], default=str), []).append(run)
    return [
        f"seed {same[0].seed} of {same[0].recipe.name} on {_names([runs])[0]} is there {len(same)} times, and would count as "
        f"often: {', '.join(str(run.folder) for run in same)}. Name one of them."
        for same in found.values()
        if len(same) > 1
    ]


def _pooled(differing: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{recipe}: runs that differ in {', '.join(keys)} are pooled, as --by recipe asks; --by override keeps them apart."
        for recipe, keys in differing.items()
    ]


def _notes(tasks: Sequence[Task]) -> list[str]:
    notes = []
    for task in tasks:
        seeds = {label: {run.seed for run in runs} for label, runs in task.groups.items()}
        every = set().union(*seeds.values())
        for label, own in seeds.items():
            if missing := sorted(every - own):
                listed = ", ".join(map(str, missing))
                notes.append(f"{task.name}: {label} lacks seeds {listed}, which others have; train them for equal numbers.")
            if len(task.groups[label]) == 1:
                notes.append(f"{task.name}: {label} has one run only, and so no interval; train more seeds.")
        episodes = {run.leaves.get("trainer.evaluation_episodes") for runs in task.groups.values() for run in runs}
        if len(episodes) > 1:
            counts = ", ".join(map(str, sorted(episodes, key=str)))
            notes.append(f"{task.name}: evaluations have different numbers of episodes ({counts}), so that some are noisier.")
    labels = list(dict.fromkeys(label for task in tasks for label in task.groups))
    for label in labels:
        if absent := [task.name for task in tasks if label not in task.groups]:
            notes.append(f"{label} has no run on {', '.join(absent)}, so that it is left out of the figures over all tasks.")
    commits = {run.commit for task in tasks for runs in task.groups.values() for run in runs} - {""}
    if len(commits) > 1:
        shown = ", ".join(sorted(commit[:10] + ("-dirty" if commit.endswith("-dirty") else "") for commit in commits))
        notes.append(f"the runs were trained with {len(commits)} commits of marlkit ({shown}), whose results may differ.")
    return notes
