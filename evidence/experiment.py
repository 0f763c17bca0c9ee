"""Trainings that put a claim to the test: every arm on every task with the same budget and the same seeds.

An experiment is a file in ``evidence/experiments``::

    frames: 400_000           # joint steps of each training
    seeds: 5
    evaluations: 20           # points of a curve
    settings: [env.max_steps=50]   # of all trainings; optional
    failed_below: 0.1         # the last evaluation of a training that has failed; optional
    columns: [critic/loss]    # of metrics.csv to keep, and to tell at the end, beside the evaluation's return; optional
    tasks:
      5x5-2p-1f: [env.type=foraging, env.map=5x5-2p-1f]
    arms:
      IPPO: [perla_ippo, critic=local]            # a recipe, and what is changed in it
      PERLA: [perla_ippo]
    compare: [[PERLA, IPPO]]  # pairs whose probability of improvement is told

What is kept of a training is a CSV of its evaluations, and beside it a JSON with overrides, commit, versions and seconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.random_play import random_return
from benchmarks.training import CODE, draw, train, uncommitted
from marlkit import load_recipe
from marlkit.comparison.statistics import estimate, improvement, interquartile_mean
from marlkit.comparison.tables import markdown_table, with_interval
from marlkit.errors import MarlkitError
from marlkit.run.files import write_whole
from marlkit.run.metrics_file import EVALUATION_RETURN, read_metrics

HERE = Path(__file__).parent / "experiments"
RESULTS = Path(__file__).parent / "results"


LEAST = 3
"""Trainings of each arm from which the probability of improvement is told."""


@dataclass(frozen=True)
class Experiment:
    """See the module.

    Attributes:
        name: of its file.
        frames, seeds, evaluations: of each training.
        tasks: overrides, by task.
        arms: a recipe and overrides, by arm.
        compare: pairs of arms.
        columns: what else is kept.
        settings: overrides of all trainings.
        failed_below: a training whose last evaluation is lower has failed; how many do is told.
    """

    name: str
    frames: int
    seeds: int
    evaluations: int
    tasks: Mapping[str, Sequence[str]]
    arms: Mapping[str, Sequence[str]]
    compare: Sequence[Sequence[str]] = ()
    columns: Sequence[str] = ()
    settings: Sequence[str] = ()
    failed_below: float | None = None

    def overrides(self, task: str, arm: str) -> list[str]:
        """What is set in an arm's recipe on a task, but for the seed."""
        recipe, *changes = self.arms[arm]
        own = [*self.settings, *self.tasks[task], *changes]
        config = load_recipe(recipe, own).config
        iterations = max(1, self.frames // (config.env.num_envs * config.data.steps))
        interval = max(1, iterations // self.evaluations)
        return [*own, f"trainer.iterations={iterations}", f"trainer.evaluation_interval={interval}"]

    def notes(self, task: str, arm: str, seed: int) -> Path:
        """Where the notes of a training are kept; its curve has the same name with another ending."""
        return RESULTS / self.name / _file_name(task) / f"{_file_name(arm)}-seed{seed}.json"

    def kept(self, task: str, arm: str) -> list[Path]:
        """The curves of an arm on a task, in the order of the seeds."""
        notes = [self.notes(task, arm, seed) for seed in range(self.seeds)]
        return [note.with_suffix(".csv") for note in notes if note.exists()]


def _file_name(words: str) -> str:
    return re.sub(r"[^\w-]+", "_", words)


def load(name: str) -> Experiment:
    """Read an experiment.

    Raises:
        MarlkitError: there is none of this name, or an entry is missing or unknown.
    """
    path = HERE / f"{name}.yaml"
    if not path.exists():
        raise MarlkitError(f"there is no experiment `{name}` in {HERE}")
    try:
        found = Experiment(name, **yaml.safe_load(path.read_text(encoding="utf-8")))
    except TypeError as error:
        raise MarlkitError(f"{path}: {error}") from error
    unknown = {arm for pair in found.compare for arm in pair} - found.arms.keys()
    if unknown:
        raise MarlkitError(f"{path}: compares {', '.join(sorted(unknown))}, which are no arms")
    return found


# --- training --------------------------------------------------------------------------------------------------------------


def run(experiment: Experiment, *, seeds: int | None = None, jobs: int = 1) -> None:
    """Train what is missing, seed after seed, and summarise.

    Args:
        experiment: it.
        seeds: only the first so many.
        jobs: trainings side by side, one thread each.
    """
    work = [
        (task, arm, seed)
        for seed in range(min(experiment.seeds, seeds or experiment.seeds))
        for task in experiment.tasks
        for arm in experiment.arms
        if not _is_present(experiment, task, arm, seed)
    ]
    if work and uncommitted(*CODE, "evidence/experiments"):
        raise MarlkitError("There are changes that are not committed: their results could not be made again. Commit them first.")
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: _train(experiment, *job), work))
    summarise(experiment)


def _is_present(experiment: Experiment, task: str, arm: str, seed: int) -> bool:
    notes = experiment.notes(task, arm, seed)
    return notes.exists() and json.loads(notes.read_text())["overrides"] == experiment.overrides(task, arm)


def _train(experiment: Experiment, task: str, arm: str, seed: int) -> None:
    notes = experiment.notes(task, arm, seed)
    found = train(experiment.arms[arm][0], experiment.overrides(task, arm), seed, notes, experiment.columns)
    print(f"{experiment.name} {task} {arm} seed {seed}: {found:.3f}", flush=True)


# --- what it shows -----------------------------------------------------------------------------------------------------------


def summarise(experiment: Experiment) -> None:
    """Draw each task's panel, and write the tables."""
    parts = []
    for task in experiment.tasks:
        files = {arm: found for arm in experiment.arms if (found := experiment.kept(task, arm))}
        if files:
            parts.append(_task_table(experiment, task, files))
            _draw(experiment, task, files)
    folder = RESULTS / experiment.name
    if parts:
        write_whole(folder / "summary.md", "\n".join(parts).encode())


def _draw(experiment: Experiment, task: str, files: Mapping[str, Sequence[Path]]) -> None:
    arm = next(iter(files))
    random = random_return(experiment.arms[arm][0], experiment.overrides(task, arm))
    draw(files, RESULTS / experiment.name / f"{_file_name(task)}.png", title=task, random=random)


def _task_table(experiment: Experiment, task: str, files: Mapping[str, Sequence[Path]]) -> str:
    """Interquartile means of the last evaluation, of the whole curve and of the last entries of other columns; who improves."""
    curves = {arm: [read_metrics(file) for file in found] for arm, found in files.items()}
    last = {arm: np.array([curve[EVALUATION_RETURN][-1] for curve in found]) for arm, found in curves.items()}
    whole = {arm: np.array([np.mean(curve[EVALUATION_RETURN]) for curve in found]) for arm, found in curves.items()}
    others = [{arm: np.array([curve[name][-1] for curve in curves[arm]]) for arm in files} for name in experiment.columns]
    rows = [
        [arm, str(len(found)), *(with_interval(estimate([of[arm]], interquartile_mean)) for of in (last, whole, *others))]
        for arm, found in files.items()
    ]
    named = [f"`{name}` at the end" for name in experiment.columns]
    text = [f"**{task}**", "", markdown_table(["", "seeds", "last evaluation", "mean over the training", *named], rows)]
    if experiment.failed_below is not None:
        failed = ", ".join(f"{(last[arm] < experiment.failed_below).sum()} of {len(last[arm])} of {arm}" for arm in files)
        text.append(f"Trainings that end below {experiment.failed_below:g}: {failed}.\n")
    for one, other in experiment.compare:
        if one in files and other in files and min(len(files[one]), len(files[other])) >= LEAST:
            ends, means = (with_interval(estimate([of[one], of[other]], improvement)) for of in (last, whole))
            text.append(f"Probability that {one} is above {other}: {ends} at the end, {means} over the training.\n")
    return "\n".join(text)


def commits(experiment: Experiment) -> list[str]:
    """The commits that its trainings were made with."""
    notes = (RESULTS / experiment.name).glob("*/*.json")
    return sorted({json.loads(note.read_text()).get("commit", "unknown")[:10] for note in notes})
