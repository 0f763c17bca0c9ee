"""The numbers of a comparison as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np

from marlkit.comparison.results import Scores, TaskResult, absolute_of
from marlkit.comparison.statistics import Array, Estimate

Row = Sequence[object]


def shown(value: float) -> str:
    """A number with three significant digits, and all that are before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def with_interval(found: Estimate) -> str:
    """``37.0 [32.7, 39.4]``; without an interval where there is none."""
    value, low, high = (float(part) for part in found)
    return shown(value) if math.isnan(low) else f"{shown(value)} [{shown(low)}, {shown(high)}]"


def summary_rows(result: TaskResult) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of a task: each group with its runs, last evaluation and absolute metric."""
    heads = ["group", "runs", "last evaluation", *(["absolute metric"] if result.absolute else [])]
    rows = [
        [
            label,
            str(len(runs)),
            with_interval(result.last.means[label]),
            *([with_interval(result.absolute.means[label])] if result.absolute else []),
        ]
        for label, runs in result.task.groups.items()
    ]
    return heads, rows


def improvement_rows(scores: Scores) -> list[list[str]]:
    """Each pair of groups with its probability of improvement."""
    return [[f"{x} > {y}", with_interval(found)] for (x, y), found in scores.improvements.items()]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; bars within cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def scores_csv(results: Sequence[TaskResult], overall: Scores | None) -> str:
    """A row for each task, group and kind of score."""
    rows: list[Row] = []
    for result in results:
        for kind, scores in (("last evaluation", result.last), ("absolute metric", result.absolute)):
            rows += _score_rows(result.task.name, kind, scores)
    rows += _score_rows("all tasks", "normalised", overall)
    heads = ["task", "group", "score", "runs", "interquartile_mean", "low", "high", "mean", "median", "deviation"]
    return _csv(heads, rows)


def _score_rows(task: str, kind: str, scores: Scores | None) -> list[Row]:
    rows: list[Row] = []
    for label, found in (scores.means if scores else {}).items():
        assert scores is not None
        every = np.concatenate([*scores.scores[label]])
        numbers = [*map(float, found), float(every.mean()), float(np.median(every)), _deviation(every)]
        rows.append([task, label, kind, len(every), *numbers])
    return rows


def _deviation(values: Array) -> float:
    """Sample standard deviation."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def improvements_csv(results: Sequence[TaskResult], overall: Scores | None) -> str:
    """A row for each task and pair of groups."""
    named = [*((result.task.name, result.best) for result in results), *([("all tasks", overall)] if overall else [])]
    rows = [[task, x, y, *map(float, found)] for task, scores in named for (x, y), found in scores.improvements.items()]
    return _csv(["task", "x", "y", "probability_that_x_is_higher", "low", "high"], rows)


def curves_csv(results: Sequence[TaskResult]) -> str:
    """A row for each task, group and evaluation."""
    rows = [
        [result.task.name, label, int(frame), value, low, high]
        for result in results
        for label, (frames, found) in result.curves.items()
        for frame, value, low, high in zip(frames, *found, strict=True)
    ]
    return _csv(["task", "group", "frames", "interquartile_mean", "low", "high"], rows)


def profiles_csv(results: Sequence[TaskResult], overall: Scores | None) -> str:
    """A row for each task, group and threshold."""
    named = [*((result.task.name, result.best) for result in results), *([("all tasks", overall)] if overall else [])]
    rows = [
        [task, label, threshold, value, low, high]
        for task, scores in named
        for label, found in scores.profiles.items()
        for threshold, value, low, high in zip(scores.thresholds, *found, strict=True)
    ]
    return _csv(["task", "group", "threshold", "share_above", "low", "high"], rows)


def runs_rows(results: Sequence[TaskResult], metric: str) -> tuple[list[str], list[list[str]]]:
    """Heads and a row for each run: where it lies, what it reached, and which checkpoint the absolute metric is of."""
    heads = ["task", "group", "seed", "frames", "last evaluation", "absolute metric", "of checkpoint", "commit", "folder"]
    rows = []
    for result in results:
        for label, runs in result.task.groups.items():
            for run in runs:
                played = run.absolute
                absolute = ["", ""]
                if played is not None:
                    absolute = [repr(absolute_of(run, metric)), f"{played.checkpoint} after {played.frames:,} frames"]
                last = repr(float(run.values[-1]))
                rows.append(
                    [result.task.name, label, str(run.seed), str(run.budget), last, *absolute, run.commit, str(run.folder)]
                )
    return heads, rows


def _csv(heads: Row, rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def runs_csv(results: Sequence[TaskResult], metric: str) -> str:
    """:func:`runs_rows` as CSV."""
    heads, rows = runs_rows(results, metric)
    return _csv([head.replace(" ", "_") for head in heads], rows)


def _cell(value: object) -> object:
    """Numbers so that they read back exactly; empty where there is none."""
    if isinstance(value, (float, np.floating)):
        return "" if math.isnan(value) else repr(float(value))
    return value
