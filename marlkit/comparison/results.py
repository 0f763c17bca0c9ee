"""What a comparison finds: figures and intervals of each task, and over all tasks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from marlkit.comparison.grouping import Task
from marlkit.comparison.loading import Run
from marlkit.comparison.statistics import (
    Array,
    Estimate,
    align,
    curve,
    estimate,
    improvement,
    interquartile_mean,
    profile,
)

THRESHOLDS = 201
"""Points of a performance profile."""

Samples = Mapping[str, Sequence[Array]]
"""The scores of each group: one sample per task."""


@dataclass(frozen=True)
class Scores:
    """Figures of one score per run.

    Attributes:
        scores: of each run, by group; ``[runs]`` per task.
        means: interquartile mean, by group.
        improvements: probability that a run of the first group scores higher than one of the second.
        thresholds: of the profiles ``[T]``.
        profiles: share of runs above each threshold, by group.
    """

    scores: Samples
    means: dict[str, Estimate]
    improvements: dict[tuple[str, str], Estimate]
    thresholds: Array
    profiles: dict[str, Estimate]


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task.

    Attributes:
        task: its runs.
        curves: interquartile mean over frames, by group: frames ``[P]`` and the estimate ``[P]``.
        last: of the last evaluation.
        absolute: of the absolute metric; ``None`` where it was not played.
    """

    task: Task
    curves: dict[str, tuple[Array, Estimate]]
    last: Scores
    absolute: Scores | None

    @property
    def best(self) -> Scores:
        """What the protocol of the field compares: the absolute metric, or else the last evaluation."""
        return self.absolute or self.last


def task_result(task: Task, metric: str) -> TaskResult:
    """All figures of a task."""
    curves = {}
    for label, runs in task.groups.items():
        frames, values = align([(run.frames, run.values) for run in runs])
        curves[label] = (frames, curve(values))
    last = {label: [np.array([run.values[-1] for run in runs])] for label, runs in task.groups.items()}
    played = all(run.absolute for runs in task.groups.values() for run in runs)
    absolute = {label: [np.array([absolute_of(run, metric) for run in runs])] for label, runs in task.groups.items() if played}
    return TaskResult(task, curves, scores_of(last), scores_of(absolute) if played else None)


def over_all(results: Sequence[TaskResult]) -> Scores | None:
    """Figures over all tasks, of scores that are 0 at the lowest and 1 at the highest evaluation of any run on the task.

    ``None`` with fewer than two tasks, or where no two groups have runs on all of them.
    """
    labels = [label for label in results[0].task.groups if all(label in result.task.groups for result in results)]
    if len(results) < 2 or len(labels) < 2:
        return None
    scales = [_scale(result) for result in results]
    return scores_of(
        {
            label: [
                (result.best.scores[label][0] - low) / (high - low) for result, (low, high) in zip(results, scales, strict=True)
            ]
            for label in labels
        }
    )


def scores_of(samples: Samples) -> Scores:
    """All figures of scores."""
    every = np.concatenate([sample for own in samples.values() for sample in own])
    margin = 0.05 * (every.max() - every.min()) or 0.5
    thresholds = np.linspace(every.min() - margin, every.max() + margin, THRESHOLDS)
    return Scores(
        samples,
        {label: estimate(own, interquartile_mean) for label, own in samples.items()},
        {
            (x, y): estimate([*samples[x], *samples[y]], improvement, resamples=2000)
            for x, y in itertools.combinations(samples, 2)
        },
        thresholds,
        {label: profile(own, thresholds) for label, own in samples.items()},
    )


def absolute_of(run: Run, metric: str) -> float:
    """The mean over the episodes of the best policy."""
    assert run.absolute is not None
    return float(np.mean(run.absolute.episodes[metric]))


def _scale(result: TaskResult) -> tuple[float, float]:
    """The lowest and the highest mean of an evaluation, or of the absolute metric, on a task."""
    evaluations = [run.values for runs in result.task.groups.values() for run in runs]
    every = np.concatenate([*evaluations, *(sample for own in result.best.scores.values() for sample in own)])
    low, high = float(every.min()), float(every.max())
    return low, high if high > low else low + 1
