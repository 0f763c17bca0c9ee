"""The learning curve of one run, with its losses; several runs are compared by :mod:`marlkit.comparison`."""

from __future__ import annotations

import io
import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from marlkit.errors import RunError
from marlkit.run.files import write_whole
from marlkit.run.metrics_file import EPISODE_RETURN, EVALUATION_RETURN, FRAMES, read_metrics, returns_of

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
        tidy(small, label_size=7)
    _save(figure, png)


def _finite(x: Array, y: Array) -> tuple[Array, Array]:
    """The finite points; rows of iterations without an evaluation hold NaN."""
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def _finish(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set_xlabel("environment frames")
    axes.set_ylabel(quantity)
    tidy(axes, label_size=9)
    if axes.lines:
        axes.legend(frameon=False, loc="best")


def tidy(axes: Axes, *, label_size: int) -> None:
    """Marlkit's style of axes: frames with units along x, no frame above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=label_size)


def _save(figure: Figure, png: FilePath) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_whole(png, content.getvalue())
