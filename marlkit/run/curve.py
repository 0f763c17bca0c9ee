"""Plots of learning curves: one run with its losses, or several algorithms compared over seeds."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from marlkit.errors import RunError
from marlkit.run.files import write_whole
from marlkit.run.metrics_file import EPISODE_RETURN, EVALUATION_RETURN, FRAMES, read_metrics, returns_of
from marlkit.run.statistics import bootstrap_interval, interquartile_mean

PANEL_WORDS = ("loss", "entropy", "explained_variance")
MOST_PANELS = 4
# Okabe and Ito's palette, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
RETURNS = (
    (EPISODE_RETURN, "training episodes", 0, ""),
    (EVALUATION_RETURN, "evaluation, deterministic", 1, "o"),
)

FilePath = str | os.PathLike[str]
Array = NDArray[np.float64]


def draw_curve(metrics_csv: FilePath, png: FilePath, title: str) -> None:
    """Draw the returns of one run against environment frames, with small panels for losses, entropy and explained variance.

    Where agents are opposed to each other, each group has its own lines.

    Raises:
        RunError: the file is not a metrics file, or it holds no ``frames``.
        WriteError: the picture cannot be written.
    """
    metrics = {name: np.asarray(values) for name, values in read_metrics(metrics_csv).items()}
    if FRAMES not in metrics:
        raise RunError(f"{metrics_csv}: has no column `{FRAMES}` to draw a curve against.")
    panels = [name for word in PANEL_WORDS for name in metrics if word in name][:MOST_PANELS]
    figure = Figure(figsize=(8, 6.2 if panels else 4.5), layout="constrained")
    grid = figure.add_gridspec(2 if panels else 1, max(1, len(panels)), height_ratios=[2.4, 1] if panels else [1])
    axes = figure.add_subplot(grid[0, :])
    for name, label, first_colour, marker in RETURNS:
        found = returns_of(name, metrics)
        for index, (group, metric) in enumerate(found.items()):
            colour = COLOURS[(len(RETURNS) * index + first_colour) % len(COLOURS)]
            points = _finite(metrics[FRAMES], metrics[metric])
            named = f"{group}: {label}" if group else label
            axes.plot(*points, color=colour, label=named, linewidth=1.4, marker=marker, markersize=4)
    _finish(axes, title, "return")
    for column, name in enumerate(panels):
        small = figure.add_subplot(grid[1, column])
        small.plot(*_finite(metrics[FRAMES], metrics[name]), color=GREY, linewidth=1)
        small.set_title(name, fontsize=8, loc="left")
        _tidy(small, label_size=7)
    _save(figure, png)


def draw_comparison(
    csv_by_label: Mapping[str, Sequence[FilePath]],
    png: FilePath,
    *,
    title: str = "",
    column: str = EVALUATION_RETURN,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draw one line per label: the interquartile mean over its files, one file per seed, and its 95 % bootstrap interval.

    ``levels`` are drawn as horizontal lines, by label.

    Raises:
        RunError: a file is not a metrics file, or it lacks ``frames`` or ``column``.
        WriteError: the picture cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (label, files) in enumerate(csv_by_label.items()):
        frames, values = align([_series(file, column) for file in files])
        colour = COLOURS[index % len(COLOURS)]
        low, high = bootstrap_interval(values)
        axes.plot(frames, interquartile_mean(values), color=colour, label=label, linestyle=("-", "--")[index // len(COLOURS) % 2])
        axes.fill_between(frames, low, high, color=colour, alpha=0.18, linewidth=0)
    for label, level in (levels or {}).items():
        axes.axhline(level, color=GREY, label=label, linestyle=":", linewidth=1.2)
    _finish(axes, title, column)
    _save(figure, png)


def align(series: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Interpolate the curves of several seeds at the frames of the first, within the range that all of them cover.

    Args:
        series: per seed, frames and values, in order of frames.

    Returns:
        Frames ``[P]`` and values ``[seeds, P]``, linearly interpolated between a seed's own points.
    """
    start = max(frames[0] for frames, _ in series)
    end = min(frames[-1] for frames, _ in series)
    grid = series[0][0]
    grid = grid[(grid >= start) & (grid <= end)]
    return grid, np.stack([np.interp(grid, frames, values) for frames, values in series])


def _series(file: FilePath, column: str) -> tuple[Array, Array]:
    metrics = read_metrics(file)
    absent = [name for name in (FRAMES, column) if not any(map(math.isfinite, metrics.get(name, [])))]
    if absent:
        raise RunError(f"{file}: has no values of {' or '.join(absent)} to compare.")
    return _finite(np.asarray(metrics[FRAMES]), np.asarray(metrics[column]))


def _finite(x: Array, y: Array) -> tuple[Array, Array]:
    """The finite points; rows of iterations without an evaluation hold NaN."""
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def _finish(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel("environment frames")
    axes.set_ylabel(quantity)
    _tidy(axes, label_size=9)
    if axes.lines:
        axes.legend(frameon=False, loc="best")


def _tidy(axes: Axes, *, label_size: int) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=label_size)


def _save(figure: Figure, png: FilePath) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_whole(png, content.getvalue())
