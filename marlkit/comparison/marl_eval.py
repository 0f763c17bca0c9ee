"""Results in the format of marl-eval, whose reporting protocol is the field's.

Gorsane et al. 2022, "Towards a Standardised Performance Evaluation Protocol for Cooperative MARL";
https://github.com/instadeepai/marl-eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from marlkit.comparison.grouping import Task
from marlkit.comparison.loading import EVALUATION, Run

Tree = dict[str, Any]


def marl_eval_data(tasks: Sequence[Task], metric: str) -> Tree:
    """Environment, task, algorithm, run, and then ``step_1``, ``step_2``, … and ``absolute_metrics``.

    A step holds ``step_count``, the joint steps before it, and a list with one number per episode. A list of one number is a
    mean. Names hold no comma, which marl-eval refuses.
    """
    name = metric.removeprefix(EVALUATION).replace("/", "_")
    tree: Tree = {}
    for task in tasks:
        algorithms = tree.setdefault(task.environment, {}).setdefault(_plain(task.name), {})
        for label, runs in task.groups.items():
            algorithms[_plain(label)] = dict(zip(_run_names(runs), (_run(run, metric, name) for run in runs), strict=True))
    return tree


def marl_eval_notes(tasks: Sequence[Task]) -> list[str]:
    """Why marl-eval will not read the data; empty if it will."""
    environments: dict[str, list[Task]] = {}
    for task in tasks:
        environments.setdefault(task.environment, []).append(task)
    return [
        f"marl-eval.json: marl-eval will not read the environment {name}, because {reason}."
        for name, own in environments.items()
        for reason in _refusals(own)
    ]


def _refusals(tasks: Sequence[Task]) -> Iterator[str]:
    runs = [run for task in tasks for group in task.groups.values() for run in group]
    if not all(run.absolute for run in runs):
        yield "it needs the absolute metric: leave out --no-absolute, and compare a metric of evaluations"
    if len({tuple(sorted(map(str.lower, task.groups))) for task in tasks}) > 1:
        yield "its tasks have not the same groups"
    if len({tuple(_run_names(group)) for task in tasks for group in task.groups.values()}) > 1:
        yield "its groups have not the same seeds"
    if len({len(run.values) for run in runs}) > 1:
        yield "its runs have not the same number of evaluations"


def _run(run: Run, metric: str, name: str) -> Tree:
    steps: Tree = {
        f"step_{number}": {"step_count": int(frames), name: episodes}
        for number, (frames, episodes) in enumerate(zip(run.frames, run.episodes, strict=True), start=1)
    }
    if run.absolute is not None:
        steps["absolute_metrics"] = {name: run.absolute.episodes[metric]}
    return steps


def _run_names(runs: Sequence[Run]) -> list[str]:
    """Names by seed; runs that are pooled may share one."""
    seeds = [run.seed for run in runs]
    return [f"seed_{seed}" + (f"_{seeds[:at].count(seed) + 1}" if seed in seeds[:at] else "") for at, seed in enumerate(seeds)]


def _plain(name: str) -> str:
    return name.replace(", ", " ").replace(",", " ")
