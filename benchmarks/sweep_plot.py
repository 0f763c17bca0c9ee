"""The plot of a sweep: frames per second over environments, seconds and memory over agents, and the time of recipes by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from marlkit.run.curve import COLOURS, GREY

Row = dict[str, str]
SPLIT = {"collect_s": "collect", "annotate_s": "annotate", "estimate_s": "estimate", "learn_s": "update", "overhead_s": "between"}


def draw(rows: Sequence[Row], png: Path) -> None:
    """Draw the series that ``rows`` hold; points without figures are left out."""
    counted = [row for row in rows if row["iteration_s"]]
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    _environments(panels[0], [row for row in counted if row["series"] == "environments"])
    by_agents = [row for row in counted if row["series"] == "agents"]
    _lines(panels[1], by_agents, "learn_s", "seconds of an update")
    _lines(panels[2], by_agents, "peak_mib", "peak memory, MiB")
    _recipes(panels[3], [row for row in counted if row["series"] == "recipes"])
    figure.savefig(png, dpi=150, format="png")


def _environments(axes: Axes, rows: Sequence[Row]) -> None:
    frames = [float(row["frames_per_s"]) * float(row["iteration_s"]) for row in rows]
    envs = [float(row["envs"]) for row in rows]
    for column, label, colour in (("iteration_s", "whole iteration", COLOURS[0]), ("collect_s", "collecting", COLOURS[1])):
        rates = [many / max(float(row[column]), 1e-9) for many, row in zip(frames, rows, strict=True)]
        axes.plot(envs, rates, color=colour, marker="o", label=label)
    _finish(axes, "mappo", "environments", "frames/s", logarithmic=bool(rows))


def _lines(axes: Axes, rows: Sequence[Row], column: str, quantity: str) -> None:
    for index, line in enumerate(dict.fromkeys(row["line"] for row in rows)):
        own = [row for row in rows if row["line"] == line]
        sizes = [float(row["agents"]) for row in own]
        colour, dashes = COLOURS[index % len(COLOURS)], ("-", "--")[index // len(COLOURS) % 2]
        axes.plot(
            sizes, [float(row[column]) for row in own], color=colour, linestyle=dashes, marker="o", markersize=4, label=line
        )
    _finish(axes, "critics", "agents", quantity, logarithmic=bool(rows))


def _recipes(axes: Axes, rows: Sequence[Row]) -> None:
    left = [0.0] * len(rows)
    for (column, label), colour in zip(SPLIT.items(), (*COLOURS[:4], GREY), strict=True):
        shares = [float(row[column]) / float(row["iteration_s"]) for row in rows]
        axes.barh([row["line"] for row in rows], shares, left=left, color=colour, label=label)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    _finish(axes, "recipes as shipped", "share of an iteration", "", logarithmic=False)
    if rows:
        # Bars fill the whole field.
        axes.legend(frameon=False, fontsize=7, ncols=len(SPLIT), loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _finish(axes: Axes, title: str, x: str, y: str, *, logarithmic: bool) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if axes.has_data():
        axes.legend(frameon=False, fontsize=7)
