"""Compare marlkit with reference programs in one run: bare loops of the same mathematics, and BenchMARL, the nearest peer.

    python -m benchmarks.compare --recipes happo perla_mappo_vmas maddpg f2a2_ddpg qmix --rounds 3
    python -m benchmarks.compare --recipes happo --sizes envs=600 hidden=256 minibatch=6000
    python -m benchmarks.compare --sticks ../shared/bench --peer-python .venv-benchmarl/bin/python

Every program does the same work. A recipe and its bare loop take turns of some iterations; the reference programs of MAPPO
(``--sticks``), which cannot take turns, run one after the other. Prints their JSON lines and then the medians over the rounds of
the ratios: how much longer than the bare loop, and how many times faster than the peer. With ``--out`` medians, ratios and the
ratios of each round are saved, with versions, machine and the machine's load at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import mappo_balance, turns
from benchmarks.recipe_speed import WORKS
from marlkit.run.versions import versions

ENTRIES = ("iteration_s", "collect_s", "update_s")
PEER_AGENTS = 4
"""The peer's own configuration of `balance`, which has no option for it."""

Lines = dict[str, dict[str, Any]]
"""The last line of each program."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all programs and print the results."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.recipes and options.sticks is None:
        parser.error("give --recipes, --sticks, or both")
    kept: dict[str, Any] = versions() | {"device": options.device, "load": os.getloadavg()[0]}
    jobs = {recipe: recipe_commands(recipe, options) for recipe in options.recipes}
    if options.sticks is not None:
        jobs["mappo"] = commands(options)
    for job, rounds in _measured(jobs, options.rounds).items():
        each = [ratios(lines) for lines in rounds]
        found = {name: round(median(of[name] for of in each), 3) for name in each[0]}
        print(json.dumps({"recipe": job, **found}))
        kept[job] = {"medians": medians(rounds), "ratios": found, "rounds": each}
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
        help="such as envs=600 or iterations=10: changes of a recipe's own sizes, where it has them",
    )
    parser.add_argument("--sticks", type=Path, help="folder of limit_plain_loop.py and peer_benchmarl.py, to compare MAPPO with")
    parser.add_argument(
        "--peer-python", type=Path, help="Python of the environment with BenchMARL; without it the peer is left out"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to keep medians and ratios in")
    parser.set_defaults(agents=PEER_AGENTS)
    return parser


def _measured(jobs: Mapping[str, Mapping[str, list[str]]], rounds: int) -> dict[str, list[Lines]]:
    """The lines of each job in each round; a round runs every program once, so that changes of the machine's speed affect all."""
    found: dict[str, list[Lines]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for job, programs in jobs.items():
            lines = turns.last_lines(programs)
            print(*map(json.dumps, lines.values()), sep="\n", flush=True)
            found[job].append(lines)
    return found


def recipe_commands(recipe: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """The command lines of a recipe's bare loop and of marlkit.

    Raises:
        SystemExit: an entry of ``sizes`` is not ``name=number``.
    """
    known = {entry.name for entry in fields(WORKS[recipe])} | {"iterations", "warm_up", "threads", "turn"}
    shared = ["--turns", "--device", options.device]
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
    """The command line of each program that does the work of MAPPO's reference programs."""
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


def medians(rounds: Sequence[Lines]) -> dict[str, dict[str, float]]:
    """The median of each entry, by program."""
    return {name: {entry: median(lines[name][entry] for lines in rounds) for entry in ENTRIES} for name in rounds[0]}


def ratios(lines: Lines) -> dict[str, float]:
    """The ratios of a round: marlkit over the bare loop, and the peer over marlkit."""
    ours, plain, peer = lines["marlkit"], lines["plain"], lines.get("peer")
    found = {f"{entry[:-2]}_over_plain": ours[entry] / plain[entry] for entry in ENTRIES}
    if peer is not None:
        found |= {f"{entry[:-2]}_faster_than_peer": peer[entry] / ours[entry] for entry in ENTRIES}
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
