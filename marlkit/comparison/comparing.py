"""Comparing runs: from their folders to figures, tables and a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from marlkit.comparison import figures, tables
from marlkit.comparison.grouping import By, Task, tasks_of
from marlkit.comparison.loading import EVALUATION, SLACK, Absolute, Run, load_runs, refuse_single
from marlkit.comparison.marl_eval import marl_eval_data, marl_eval_notes
from marlkit.comparison.page import html_page, markdown_page
from marlkit.comparison.results import Scores, TaskResult, over_all, task_result
from marlkit.errors import MarlkitError, OptionError, RunError
from marlkit.run.files import refuse_unwritable, write_whole
from marlkit.run.metrics_file import EVALUATION_RETURN

PAGE = "index.html"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        metric: what was compared.
        results: figures of each task.
        overall: figures over all tasks; ``None`` where there is one only.
        notes: what a reader has to know: runs that were left out, missing seeds, …
    """

    metric: str
    results: Sequence[TaskResult]
    overall: Scores | None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def quantity(self) -> str:
        """The metric in words, for axes."""
        return self.metric.removeprefix(EVALUATION).replace("/", " ").replace("_", " ")

    def write(self, out: str | Path) -> Path:
        """Write page, tables, figures and marl-eval's data into the folder ``out``; returns the page.

        Raises:
            WriteError: something cannot be written.
        """
        out = Path(out)
        drawings: dict[str, dict[str, bytes]] = {}
        for name, drawn in self._figures().items():
            folder = out / _file_name(name or "all tasks")
            for kind, figure in drawn.items():
                drawing = figures.svg(figure)
                drawings.setdefault(name, {})[kind] = drawing
                write_whole(folder / f"{kind}.svg", drawing)
                write_whole(folder / f"{kind}.png", figures.png(figure))
        tasks = [result.task for result in self.results]
        texts = {
            "tables.md": markdown_page(self.results, self.overall, self.metric, self.notes),
            "scores.csv": tables.scores_csv(self.results, self.overall),
            "improvements.csv": tables.improvements_csv(self.results, self.overall),
            "profiles.csv": tables.profiles_csv(self.results, self.overall),
            "curves.csv": tables.curves_csv(self.results),
            "runs.csv": tables.runs_csv(self.results, self.metric),
            "marl-eval.json": json.dumps(marl_eval_data(tasks, self.metric), indent=1, allow_nan=False) + "\n",
            PAGE: html_page(self.results, self.overall, drawings, self.metric, self.notes),
        }
        for name, text in texts.items():
            write_whole(out / name, text.encode())
        return out / PAGE

    def _figures(self) -> dict[str, dict[str, Figure]]:
        """Figures by task and kind; those over all tasks under an empty name."""
        look = figures.styles(dict.fromkeys(label for result in self.results for label in result.task.groups))
        found: dict[str, dict[str, Figure]] = {}
        for result in self.results:
            name = result.task.name
            kind = f"{self.quantity}, {'absolute metric' if result.absolute else 'last evaluation'}"
            curves = figures.draw_curves(result.curves, look, title=name, quantity=self.quantity)
            found[name] = {"curves": curves, **_score_figures(result.best, look, name, kind)}
        if self.overall is not None:
            found[""] = _score_figures(self.overall, look, "all tasks", "normalised score")
        return found


def compare(
    folders: Sequence[str | Path],
    *,
    metric: str = EVALUATION_RETURN,
    by: By = "override",
    frames: int | None = None,
    absolute: bool = True,
    trust: bool = False,
    tell: Tell | None = None,
) -> Comparison:
    """Compare runs; see ``docs/comparing.md``.

    Args:
        folders: runs, or folders of runs such as ``runs/mappo``.
        metric: a column of ``metrics.csv``.
        by: ``"override"``: a group has one recipe and the same settings but for the seed; ``"recipe"``: it has one recipe.
        frames: compare what was reached within so many joint steps; ``None``: whole trainings, which must be equally long.
        absolute: whether to play the best policy of each run over ten times the episodes of an evaluation.
        trust: as in :func:`marlkit.run.evaluate`.
        tell: is told what is being done, where that takes a while.

    Raises:
        RunError: a folder is no run, damaged or lacks the metric, budgets differ, or a run is there twice.
        OptionError: ``by`` or ``frames`` is none of its values.
        TrustError: a run names code outside of marlkit that would have to run, and the user has not trusted it.
    """
    if by not in ("override", "recipe"):
        raise OptionError("by", f"must be override or recipe, got {by!r}")
    if frames is not None and frames < 1:
        raise OptionError("frames", f"must be at least 1, got {frames}")
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    runs, notes = load_runs(folders, metric, frames=frames, trust=trust)
    refuse_single(runs)
    tasks, told = tasks_of(runs, by)
    notes += told
    if absolute and metric.startswith(EVALUATION):
        played, told = _with_absolute(runs, metric, frames, trust, tell)
        notes += told
        tasks = [_replaced(task, played) for task in tasks]
    results = [task_result(task, metric) for task in tasks]
    return Comparison(metric, results, over_all(results), (*notes, *marl_eval_notes(tasks)))


def refuse_unwritable_folder(out: Path) -> None:
    """Check that results can be written, before the work that they take.

    Raises:
        WriteError: they cannot.
    """
    refuse_unwritable(out / PAGE)
    with suppress(OSError):  # where it was made for the trial, it is empty
        out.rmdir()


def _with_absolute(
    runs: Sequence[Run], metric: str, limit: int | None, trust: bool, tell: Tell | None
) -> tuple[dict[Path, Run], list[str]]:
    """The runs with their absolute metric, by folder; none where the metric has none, or a best policy lies beyond the budget."""
    from marlkit.comparison.absolute import absolute_metric  # here, so that bad input is refused without torch

    played: dict[Path, Run] = {}
    problems = []
    for number, run in enumerate(runs, start=1):
        if tell is not None:
            tell(f"{number} of {len(runs)}: plays the best policy of {run.folder}")
        try:
            played[run.folder] = run.with_absolute(absolute_metric(run.folder, trust=trust))
        except MarlkitError as error:
            problems.append(f"{error} --no-absolute compares the last evaluations, without playing.")
            continue
        if metric not in _absolute(played[run.folder]).episodes:
            return {}, [f"`{metric}` is no mean over episodes and has no absolute metric: last evaluations are compared."]
    if problems:
        raise RunError("\n".join(problems))
    found = {folder: _absolute(run) for folder, run in played.items()}
    late = [folder for folder, own in found.items() if limit is not None and own.frames > limit * (1 + SLACK)]
    if late:
        listed = ", ".join(map(str, late))
        return {}, [f"the best policy of {listed} was found after {limit:,} frames: last evaluations are compared instead."]
    return played, [
        f"{folder}: has no best.ckpt; its absolute metric is of {own.checkpoint}, after {own.frames:,} frames."
        for folder, own in found.items()
        if own.checkpoint != "best.ckpt"
    ]


def _absolute(run: Run) -> Absolute:
    assert run.absolute is not None
    return run.absolute


def _replaced(task: Task, runs: dict[Path, Run]) -> Task:
    groups = {label: [runs.get(run.folder, run) for run in own] for label, own in task.groups.items()}
    return Task(task.name, task.environment, task.options, groups)


def _score_figures(scores: Scores, look: figures.Styles, title: str, quantity: str) -> dict[str, Figure]:
    found = {"scores": figures.draw_scores(scores, look, title=title, quantity=quantity)}
    if scores.improvements:
        found["improvement"] = figures.draw_improvements(scores, title=title)
    return found | {"profile": figures.draw_profiles(scores, look, title=title, quantity=quantity)}


def _file_name(task: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", task)[:100].strip("-.") or "task"
