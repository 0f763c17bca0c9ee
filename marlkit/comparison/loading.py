"""The runs of a comparison as their folders hold them; what cannot be compared is named before anything is computed.

Imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from marlkit.errors import MarlkitError, RunError, did_you_mean
from marlkit.recipe.reading import Recipe
from marlkit.run.contents import EPISODES, METRICS, RECIPE, VERSIONS, flat, run_recipe
from marlkit.run.metrics_file import EVALUATION_LENGTH, FRAMES, ITERATION, episode_column, in_words, read_metrics
from marlkit.run.versions import read_versions

Array = NDArray[np.float64]
EVALUATION = "evaluation/"
"""What the names of an evaluation's metrics begin with."""
SLACK = 0.01
"""Share by which equal budgets may differ: an iteration plays a whole number of steps."""


@dataclass(frozen=True)
class Absolute:
    """The best policy of a run, played over ten times the episodes of an evaluation.

    Attributes:
        checkpoint: its file, ``best.ckpt`` or, where there is none, ``last.ckpt``.
        iteration: number of iterations that it was trained for.
        frames: number of joint steps that it was trained for.
        episodes: each episode's part in each metric of evaluations.
    """

    checkpoint: str
    iteration: int
    frames: int
    episodes: dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """A run that was trained over the whole budget.

    Attributes:
        folder: its folder.
        recipe: its completed recipe.
        leaves: the recipe's values by dotted path.
        frames: joint steps before each of its evaluations ``[E]``.
        values: the metric that is compared ``[E]``.
        episodes: each episode's part in that metric, for each evaluation; the mean alone where they were not kept.
        commit: of marlkit; empty where it is not known.
        absolute: the best policy's episodes; ``None`` where it was not played.
    """

    folder: Path
    recipe: Recipe
    leaves: dict[str, Any]
    frames: Array
    values: Array
    episodes: tuple[list[float], ...]
    commit: str = ""
    absolute: Absolute | None = None

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.recipe.seed

    @property
    def budget(self) -> int:
        """Joint steps before the last evaluation that counts."""
        return int(self.frames[-1])

    def with_absolute(self, absolute: Absolute) -> Run:
        """The same run, with its best policy's episodes."""
        return replace(self, absolute=absolute)


class LeftOutError(RunError):
    """A run that does not reach the budget; the comparison goes on without it, and says so."""


def load_runs(paths: Iterable[str | Path], metric: str, *, frames: int | None, trust: bool) -> tuple[list[Run], list[str]]:
    """The runs at ``paths``, and a note for each that was left out.

    Args:
        paths: run folders, or folders of run folders (``runs/mappo``, ``runs``).
        metric: a column of ``metrics.csv``.
        frames: the budget in joint steps; ``None``: each run's whole training.
        trust: as for :func:`marlkit.recipe.load_recipe`.

    Raises:
        RunError: something is not a run, is damaged or lacks the metric; names all of them.
    """
    runs: list[Run] = []
    notes: list[str] = []
    problems: list[str] = []
    for folder in _folders(paths, problems):
        try:
            runs.append(_load(folder, metric, frames, trust))
        except LeftOutError as error:
            notes.append(f"left out: {error}")
        except MarlkitError as error:
            problems.append(str(error))
    if problems:
        raise RunError("\n".join(problems))
    if not runs:
        raise RunError("\n".join(["no run is left to compare.", *notes]))
    return runs, notes


def _folders(paths: Iterable[str | Path], problems: list[str]) -> list[Path]:
    """Each run folder once."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        runs = _runs_in(path)
        if not runs:
            what = "is not a run and holds none" if os.path.isdir(path) else "there is no such folder"
            problems.append(f"{path}: {what}. Runs stand under runs/<recipe>/<time>-seed<k>/ and hold a {RECIPE}.")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(path: Path) -> list[Path]:
    with suppress(OSError, ValueError):  # a name that no folder can have
        for depth in (RECIPE, f"*/{RECIPE}", f"*/*/{RECIPE}"):
            if runs := sorted(file.parent for file in path.glob(depth) if file.is_file()):
                return runs
    return []


def _load(folder: Path, metric: str, limit: int | None, trust: bool) -> Run:
    recipe = run_recipe(folder, trust=trust)
    metrics = {name: np.asarray(values) for name, values in read_metrics(folder / METRICS).items()}
    _refuse_damaged(folder / METRICS, metrics)
    _refuse_unfinished(folder, recipe, metrics, limit)
    _refuse_missing(folder / METRICS, metrics, metric)
    told = np.isfinite(metrics[metric])
    if limit is not None:
        told &= metrics[FRAMES] <= limit * (1 + SLACK)
        if not told.any():
            raise RunError(f"{folder / METRICS}: has no {metric} within {limit:,} frames. Choose more with --frames.")
    iterations, frames, values = (metrics[name][told] for name in (ITERATION, FRAMES, metric))
    config = OmegaConf.to_container(recipe.config)
    assert isinstance(config, dict)
    episodes = _episodes(folder / EPISODES, metric, iterations, values)
    commit = read_versions(folder / VERSIONS).get("commit", "")
    return Run(folder, recipe, dict(flat(config)), frames, values, episodes, commit if isinstance(commit, str) else "")


def _refuse_unfinished(folder: Path, recipe: Recipe, metrics: dict[str, Array], limit: int | None) -> None:
    """Check that a run was trained to its end, or over the frames that are asked for.

    Raises:
        LeftOutError: it was not.
    """
    done, planned = len(metrics[ITERATION]), recipe.config.trainer.iterations
    if limit is not None:
        reached = np.nanmax(metrics.get(FRAMES, np.array([0.0])), initial=0)
        if reached < limit * (1 - SLACK):
            raise LeftOutError(f"{folder}: was trained for {reached:,.0f} frames, fewer than the {limit:,} of --frames.")
    elif done < planned:
        raise LeftOutError(
            f"{folder}: has {done} of {planned} iterations; it was stopped, or trains still. `marlkit resume {folder}` ends it, "
            "and --frames N compares what all runs have."
        )


def _refuse_damaged(path: Path, metrics: dict[str, Array]) -> None:
    """Check that no row is missing, repeated or out of order.

    Raises:
        RunError: one is.
    """
    found = metrics[ITERATION].astype(int).tolist()
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing or found != sorted(set(found)):
        what = f"lacks the rows of iterations {in_words(missing)}" if missing else "has rows that are repeated or out of order"
        raise RunError(f"{path}: is damaged; it {what}. Put a copy of it back, or leave this run out.")
    if found and not np.all(np.diff(metrics.get(FRAMES, np.array([math.nan])), prepend=0) > 0):
        raise RunError(f"{path}: is damaged; its column `{FRAMES}` does not rise. Put a copy of it back, or leave this run out.")


def _refuse_missing(path: Path, metrics: dict[str, Array], metric: str) -> None:
    """Check that a run has the metric, in every evaluation.

    Raises:
        RunError: it has not.
    """
    values = metrics.get(metric, np.array([math.nan]))
    if not np.isfinite(values).any():
        known = [name for name in metrics if np.isfinite(metrics[name]).any() and name.startswith((EVALUATION, "episode/"))]
        listed = f"It has {', '.join(known)}." if known else "It has no evaluation."
        raise RunError(f"{path}: has no values of `{metric}`. {did_you_mean(metric, known).strip()} {listed}".replace("  ", " "))
    expected = np.isfinite(metrics.get(EVALUATION_LENGTH, values)) if metric.startswith(EVALUATION) else np.isfinite(values)
    holes = metrics[ITERATION][(expected & ~np.isfinite(values)) | np.isinf(values)].astype(int).tolist()
    if holes:
        raise RunError(f"{path}: is damaged; `{metric}` is no number at iterations {in_words(holes)}. Leave this run out.")


def _episodes(path: Path, metric: str, iterations: Array, values: Array) -> tuple[list[float], ...]:
    """Each evaluation's episodes; its mean alone where no episodes were kept.

    Raises:
        RunError: they are not those of the metrics.
    """
    kept = read_metrics(path) if path.exists() else {ITERATION: []}
    rows = {int(iteration): row for row, iteration in enumerate(kept[ITERATION])}
    columns: list[list[float]] = []
    while (column := episode_column(metric, len(columns))) in kept:
        columns.append(kept[column])
    found: list[list[float]] = []
    for iteration, value in zip(iterations.astype(int).tolist(), values.tolist(), strict=True):
        row = rows.get(iteration)
        each = [column[row] for column in columns if math.isfinite(column[row])] if row is not None else []
        if each and not math.isclose(float(np.mean(each)), value, rel_tol=1e-3, abs_tol=1e-3):
            raise RunError(
                f"{path}: is damaged; the mean of `{metric}` over the episodes of iteration {iteration} is {np.mean(each):g}, "
                f"but {value:g} in {METRICS}. Put copies of both back, or leave this run out."
            )
        found.append(each or [value])
    return tuple(found)


def refuse_single(runs: Sequence[Run]) -> None:
    """Check that there is something to compare.

    Raises:
        RunError: there is one run only.
    """
    if len(runs) == 1:
        run = runs[0]
        raise RunError(
            f"{run.folder}: is one run only, which tells nothing of other seeds or recipes. Train more seeds "
            f"(`marlkit train {run.recipe.name} seed={run.seed + 1}`); `marlkit evaluate {run.folder}` tells its return."
        )
