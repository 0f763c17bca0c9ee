"""Compare marlkit with measuring sticks in one run: bare loops of the same mathematics, and the nearest peer.

    python -m benchmarks.compare --recipes happo perla_mappo maddpg f2a2_ddpg --rounds 3
    python -m benchmarks.compare --recipes happo --sizes envs=600 hidden=256 minibatch=6000
    python -m benchmarks.compare --sticks ../shared/bench --peer-python .venv-benchmarl/bin/python

The programs run one after the other, several rounds if asked, and every one does the same work. Prints their JSON lines and
then the ratios of the medians: how much longer than the bare loop, and how many times faster than the peer. With ``--out`` the
medians and ratios are kept, with versions, machine and the load that it was under when the run began.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import mappo_balance
from benchmarks.recipe_speed import WORKS
from marlkit.outputs.versions import versions

ENTRIES = ("iteration_s", "collect_s", "update_s")
PEER_AGENTS = 4
"""The peer's own configuration of `balance`, which has no option for it."""

Lines = dict[str, list[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and print."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.recipes and options.sticks is None:
        parser.error("give --recipes, --sticks, or both")
    kept: dict[str, Any] = versions() | {"device": options.device, "load": os.getloadavg()[0], "rounds": options.rounds}
    jobs = {recipe: recipe_commands(recipe, options) for recipe in options.recipes}
    if options.sticks is not None:
        jobs["mappo"] = commands(options)
    for job, (lines, found) in _measured(jobs, options.rounds).items():
        print(json.dumps({"recipe": job, **found}))
        kept[job] = {"medians": medians(lines), "ratios": found}
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = mappo_balance.parser()
    parser.description = __doc__
    parser.add_argument("--recipes", nargs="+", default=[], choices=list(WORKS), help="compare these with their bare loops")
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        help="such as envs=600 or iterations=10: changes to a recipe's own work, where it has it",
    )
    parser.add_argument("--sticks", type=Path, help="folder of limit_plain_loop.py and peer_benchmarl.py, to compare MAPPO with")
    parser.add_argument(
        "--peer-python", type=Path, help="Python of the environment with BenchMARL; without it the peer is left out"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to keep medians and ratios in")
    parser.set_defaults(agents=PEER_AGENTS)
    return parser


def _measured(jobs: Mapping[str, Mapping[str, list[str]]], rounds: int) -> dict[str, tuple[Lines, dict[str, float]]]:
    """Lines and ratios of each job; each round runs every program once, so that a machine's moods meet them all."""
    lines: dict[str, Lines] = {job: {} for job in jobs}
    for _ in range(rounds):
        for job, programs in jobs.items():
            for name, command in programs.items():
                line = _last_line(command)
                print(json.dumps(line), flush=True)
                lines[job].setdefault(name, []).append(line)
    return {job: (found, ratios(found)) for job, found in lines.items()}


def recipe_commands(recipe: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """The command lines of a recipe's bare loop and of marlkit.

    Raises:
        SystemExit: an entry of ``sizes`` is not ``name=number``.
    """
    known = {entry.name for entry in fields(WORKS[recipe])} | {"iterations", "warm_up", "threads"}
    shared = ["--device", options.device]
    for size in options.sizes:
        name, equals, value = size.partition("=")
        if not equals or not value.isdigit():
            sys.exit(f"--sizes {size}: must be name=number, such as envs=600")
        if name in known:
            shared += [f"--{name.replace('_', '-')}", value]
    return {
        "plain": [sys.executable, "-m", f"benchmarks.bare.{recipe}", *shared],
        "marlkit": [sys.executable, "-m", "benchmarks.recipe_speed", recipe, *shared],
    }


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of each program that does the work of MAPPO's measuring sticks."""
    shared = [options.scenario]
    for name in ("envs", "steps", "epochs", "minibatch", "iterations", "device"):
        shared += [f"--{name}", str(getattr(options, name))]
    agents = ["--agents", str(options.agents)]
    sticks = options.sticks.absolute()
    found = {
        "plain": [sys.executable, str(sticks / "limit_plain_loop.py"), *shared, *agents],
        "marlkit": [sys.executable, "-m", "benchmarks.mappo_balance", *shared, *agents],
    }
    if options.peer_python:
        found["peer"] = [str(options.peer_python.absolute()), str(sticks / "peer_benchmarl.py"), *shared]
    return found


def medians(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """The median of each entry, by program."""
    return {name: {entry: median(line[entry] for line in of) for entry in ENTRIES} for name, of in lines.items()}


def ratios(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Ratios of the medians: marlkit over the bare loop, and the peer over marlkit."""
    middle = medians(lines)
    found = {f"{entry[:-2]}_over_plain": middle["marlkit"][entry] / middle["plain"][entry] for entry in ENTRIES}
    if "peer" in middle:
        found |= {f"{entry[:-2]}_faster_than_peer": middle["peer"][entry] / middle["marlkit"][entry] for entry in ENTRIES}
    return {name: round(value, 3) for name, value in found.items()}


def _last_line(command: Sequence[str]) -> dict[str, Any]:
    # The peer leaves a folder wherever it runs.
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


if __name__ == "__main__":
    main()
