"""The figures of a comparison, each of one task: curves, scores, probabilities of improvement and performance profiles."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from marlkit.comparison.results import Scores
from marlkit.comparison.statistics import Array, Estimate
from marlkit.run.curve import COLOURS, GREY, tidy

LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 7.2
"""Inches."""
BAND, EDGE = 0.08, 0.45
"""Opacity of an interval around a line, and of its bounds, by which intervals that overlap are told apart."""
MOST_IN_A_ROW = 88
"""Characters of a row of a legend."""

Styles = Mapping[str, tuple[str, str, str]]
"""Colour, line and marker of each group, the same in all figures."""


def styles(labels: Iterable[str]) -> Styles:
    """Okabe and Ito's colours, each with a marker of its own for print without colours; other lines where these are used up."""
    return {
        label: (COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)], MARKERS[index % len(MARKERS)])
        for index, label in enumerate(labels)
    }


def draw_curves(
    curves: Mapping[str, tuple[Array, Estimate]],
    look: Styles,
    *,
    title: str,
    quantity: str,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Sample efficiency: each group's interquartile mean over frames, within its interval.

    Args:
        curves: frames ``[P]`` and estimate ``[P]`` by group.
        look: of each group.
        title: of the figure.
        quantity: what the values are.
        levels: horizontal lines, by label.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for label, (frames, found) in curves.items():
        colour, line, marker = look[label]
        # Markers where the evaluations are few enough to be told apart.
        shown = marker if len(frames) <= 30 else ""
        axes.plot(frames, found.value, line, color=colour, label=label, linewidth=1.6, marker=shown, markersize=3.5)
        _band(axes, frames, found, colour)
    for label, level in (levels or {}).items():
        axes.axhline(level, color=GREY, label=label, linestyle=":", linewidth=1.2)
    axes.set_xlabel("environment frames")
    axes.set_ylabel(quantity)
    axes.set_title(title, fontsize=12, loc="left")
    tidy(axes, label_size=9)
    _legend(figure, [*curves, *(levels or {})])
    return figure


def draw_scores(found: Scores, look: Styles, *, title: str, quantity: str) -> Figure:
    """Each group's interquartile mean and interval, with a dot for every run."""
    labels = list(found.means)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.42 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    for row, label in enumerate(labels):
        colour, _, marker = look[label]
        value, low, high = (float(part) for part in found.means[label])
        axes.plot([low, high], [row, row], color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt")
        axes.plot([value, value], [row - 0.22, row + 0.22], color=colour, linewidth=2.4)
        scores = np.concatenate([*found.scores[label]])
        axes.plot(scores, np.full(len(scores), row), marker, color=colour, markersize=4, markerfacecolor="white", linestyle="")
    _rows(figure, labels, title=title, quantity=quantity)
    return figure


def draw_improvements(found: Scores, *, title: str) -> Figure:
    """For each pair of groups the probability that a run of the upper one scores higher, and its interval."""
    pairs = list(found.improvements)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.34 * len(pairs)), layout="constrained")
    axes = figure.add_subplot()
    for row, pair in enumerate(pairs):
        value, low, high = (float(part) for part in found.improvements[pair])
        axes.plot([low, high], [row, row], color=COLOURS[0], linewidth=7, alpha=0.3, solid_capstyle="butt")
        axes.plot(value, row, "o", color=COLOURS[0], markersize=5)
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set_xlim(-0.02, 1.02)
    _rows(figure, [f"{x}  >  {y}" for x, y in pairs], title=title, quantity="probability of improvement")
    axes.xaxis.set_major_formatter("{x:g}")
    return figure


def draw_profiles(found: Scores, look: Styles, *, title: str, quantity: str) -> Figure:
    """The share of each group's runs above every threshold."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for label, share in found.profiles.items():
        colour, line, _ = look[label]
        axes.plot(found.thresholds, share.value, line, color=colour, label=label, linewidth=1.8, drawstyle="steps-mid")
        _band(axes, found.thresholds, share, colour, steps=True)
    axes.set_xlabel(f"threshold: {quantity}")
    axes.set_ylabel("runs above the threshold")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(title, fontsize=12, loc="left")
    tidy(axes, label_size=9)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(figure, list(found.profiles))
    return figure


def png(figure: Figure) -> bytes:
    """A figure as a picture."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    return content.getvalue()


def svg(figure: Figure) -> bytes:
    """A figure as a drawing, the same bytes for the same figure."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "marlkit"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _band(axes: Axes, x: Array, found: Estimate, colour: str, *, steps: bool = False) -> None:
    axes.fill_between(x, found.low, found.high, color=colour, alpha=BAND, linewidth=0, step="mid" if steps else None)
    for bound in (found.low, found.high):
        axes.plot(x, bound, color=colour, alpha=EDGE, linewidth=0.7, drawstyle="steps-mid" if steps else "default")


def _rows(figure: Figure, labels: Sequence[str], *, title: str, quantity: str) -> None:
    axes = figure.axes[0]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(quantity)
    axes.set_title(title, fontsize=12, loc="left")
    tidy(axes, label_size=9)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    """Below the axes, where it covers nothing, in as many columns as its labels allow."""
    most = max(1, min(len(labels), MOST_IN_A_ROW // (max(map(len, labels)) + 8)))
    rows = math.ceil(len(labels) / most)
    figure.legend(loc="outside lower center", ncols=math.ceil(len(labels) / rows), frameon=False, fontsize=9)
