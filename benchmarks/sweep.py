"""Growth of time and memory with environments, with agents by critic, and the recipes as shipped.

    python -m benchmarks.sweep                                     # all series
    python -m benchmarks.sweep --series environments --device cuda
    python -m benchmarks.sweep --series agents --largest 32 --limit 60
    python -m benchmarks.sweep --draw                              # only draw the existing results again

Every point is measured in its own process, for its own peak memory. A point that takes longer than ``--limit`` seconds or needs
more than ``--memory`` GiB has a note in its row, and larger points of its line are left out. Leaves ``sweep.csv``, ``sweep.md``,
``sweep.png`` and ``versions.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.mappo_balance import entries
from benchmarks.measure import THREADS, measure
from benchmarks.sweep_plot import draw
from marlkit.recipe import load_recipe, shipped
from marlkit.run.versions import versions

RESULTS = Path(__file__).parent / "results" / "sweep"
ENVIRONMENTS = (60, 300, 600, 3000, 6000, 30_000, 60_000)
AGENTS = (3, 8, 16, 32, 64, 128, 256)
CRITICS: dict[str, tuple[str, list[str]]] = {
    "local": ("mappo", ["critic=local"]),
    "centralised": ("mappo", []),
    "centralised, nothing shared": ("mappo", ["actor.share=none", "critic.share=none"]),
    "marginalised": ("perla_mappo_vmas", []),
    "counterfactual": ("mappo", ["critic=counterfactual", "env.continuous_actions=false"]),
    "transformer": ("mappo", ["critic=transformer"]),
    "attention": ("mappo", ["critic=attention", "env.continuous_actions=false"]),
    "joint, nothing shared": ("maddpg", ["data={type: replay, steps: 5, updates: 1, batch_size: 300, warm_up: 0}"]),
}
"""By the name of a line: the recipe and its overrides."""
FRAMES = 60_000
"""Joint steps per iteration, where each environment plays between 5 and 100 of them."""
WARM_UP = 2
"""Iterations that are not counted: a step that is taken once per iteration is recorded in the second."""
TABLE = "sweep.csv"
COLUMNS = (
    "series", "line", "envs", "agents", "frames_per_s", "iteration_s", "collect_s", "annotate_s", "estimate_s", "learn_s",
    "overhead_s", "peak_mib", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        series, line: where it is drawn.
        size: what grows along the line.
        recipe: a shipped one.
        overrides: what makes the work of it.
        envs, steps: joint steps of an iteration.
    """

    series: str
    line: str
    size: int
    recipe: str
    overrides: tuple[str, ...]
    envs: int
    steps: int


def points(series: str, largest: int | None) -> Iterator[Point]:
    """The points of a series, those of a line in order of size."""
    known: dict[str, tuple[int, ...]] = {"environments": ENVIRONMENTS, "agents": AGENTS}
    sizes = [size for size in known.get(series, ()) if largest is None or size <= largest]
    if series == "environments":
        yield from (_environments(envs) for envs in sizes)
    elif series == "agents":
        yield from (_agents(line, agents) for line in CRITICS for agents in sizes)
    else:
        yield from map(_as_shipped, sorted(shipped()))


def _environments(envs: int) -> Point:
    steps = max(5, min(100, FRAMES // envs))
    overrides = [*_balance(3, envs, steps), f"update.minibatch_size={max(1, envs * steps // 10)}"]
    return Point("environments", "mappo", envs, "mappo", tuple(overrides), envs, steps)


def _agents(line: str, agents: int) -> Point:
    recipe, changes = CRITICS[line]
    overrides = _balance(agents, 60, 5)
    overrides += [] if recipe == "maddpg" else ["update.minibatch_size=100"]
    return Point("agents", line, agents, recipe, (*overrides, *changes), 60, 5)


def _balance(agents: int, envs: int, steps: int) -> list[str]:
    return [
        "env.scenario=balance",
        "env.scenario_options=null",
        f"env.scenario_options={{n_agents: {agents}}}",
        f"env.num_envs={envs}",
        f"env.max_steps={steps}",
        f"data.steps={steps}",
    ]


def _as_shipped(recipe: str) -> Point:
    config = load_recipe(recipe).config
    at_once = ("data.warm_up=0",) if "warm_up" in config.data else ()
    return Point("recipes", recipe, 0, recipe, at_once, config.env.num_envs, config.data.steps)


# --- one point, in its own process -------------------------------------------------------------------------------------------


def take(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a point in this process."""
    if options.device == "cpu":
        most = int(options.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    measured = measure(
        point.recipe,
        point.overrides,
        iterations=options.iterations,
        warm_up=WARM_UP,
        device=options.device,
        threads=options.threads,
    )
    learn = round(measured.seconds["update"], 4)
    return entries(measured, point.envs * point.steps, digits=4) | {"learn_s": learn, "peak_mib": _peak(options.device)}


def _peak(device: str) -> int:
    """Peak memory of this process, resident on a CPU and allocated on a GPU, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _elsewhere(series: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a point in another process; where it fails, the row holds a note instead of figures."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--take", series, str(number)]
    for name in ("device", "iterations", "threads", "memory", "largest"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"note": f"longer than {options.limit:g} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    last = (done.stderr.strip().splitlines() or [""])[-1]
    short = "memory" in done.stderr.lower() or done.returncode == -9
    return {"note": f"more than {options.memory:g} GiB" if short and options.device == "cpu" else f"failed: {last[:200]}"}


# --- all of them ------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, save, draw."""
    options = _parser().parse_args(arguments)
    if options.take:
        series, number = options.take
        print(json.dumps(take(list(points(series, options.largest))[int(number)], options)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for series in [] if options.draw else options.series:
        _sweep(series, options)
    rows = _read(options.out / TABLE)
    (options.out / "sweep.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, options.out / "sweep.png")


def _sweep(series: str, options: argparse.Namespace) -> None:
    """Measure a series; every row is saved as soon as it is measured, and rows of other series are kept."""
    noted = options.out / "versions.json"
    made = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    made[series] = versions() | {"device": options.device, "threads": options.threads, "load": os.getloadavg()[0]}
    noted.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    rows: list[dict[str, Any]] = [dict(row) for row in _read(options.out / TABLE) if row["series"] != series]
    ended: set[str] = set()
    for number, point in enumerate(points(series, options.largest)):
        if point.line in ended:
            continue
        found = _elsewhere(series, number, options)
        if "note" in found:
            ended.add(point.line)
        size = {"envs": point.envs, **({"agents": point.size} if series == "agents" else {})}
        rows.append({"series": series, "line": point.line, **size, **found})
        print(json.dumps(rows[-1]), flush=True)
        _write(options.out / TABLE, rows)


def _parser() -> argparse.ArgumentParser:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["environments", "agents", "recipes"]
    made.add_argument("--series", nargs="+", default=every, choices=every)
    made.add_argument("--largest", type=int, help="largest number of environments or agents")
    made.add_argument("--iterations", type=int, default=4, help=f"of each point; the first {WARM_UP} do not count")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=THREADS)
    made.add_argument("--limit", type=float, default=300.0, help="seconds that a point may take")
    made.add_argument("--memory", type=float, default=round(0.75 * physical, 1), help="GiB that a point may take on a CPU")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--draw", action="store_true", help="only recreate table and plot")
    made.add_argument("--take", nargs=2, metavar=("SERIES", "NUMBER"), help=argparse.SUPPRESS)
    return made


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table per series."""
    parts = []
    for series in dict.fromkeys(row["series"] for row in rows):
        lines = [f"## {series}", "", f"| {' | '.join(COLUMNS[1:])} |", "|" + "---|" * (len(COLUMNS) - 1)]
        lines += [f"| {' | '.join(row[column] for column in COLUMNS[1:])} |" for row in rows if row["series"] == series]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
