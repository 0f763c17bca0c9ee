"""Compare marlkit with the measuring sticks in one run: the bare loop, and the nearest peer in an environment of its own.

    python -m benchmarks.compare --sticks ../shared/bench --peer-python .venv-benchmarl/bin/python

The programs run one after the other, several rounds if asked, and every one does the same work. Prints their JSON lines and
then the ratios of the medians: how much longer than the bare loop, and how many times faster than the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import mappo_balance

ENTRIES = ("iteration_s", "collect_s", "update_s")
PEER_AGENTS = 4
"""The peer's own configuration of `balance`, which has no option for it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and print."""
    parser = mappo_balance.parser()
    parser.description = __doc__
    parser.add_argument("--sticks", type=Path, required=True, help="folder of limit_plain_loop.py and peer_benchmarl.py")
    parser.add_argument(
        "--peer-python", type=Path, help="Python of the environment with BenchMARL; without it the peer is left out"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.set_defaults(agents=PEER_AGENTS)
    options = parser.parse_args(arguments)
    lines: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for name, command in commands(options).items():
            line = _last_line(command)
            print(json.dumps(line), flush=True)
            lines.setdefault(name, []).append(line)
    print(json.dumps(ratios(lines)))


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of each program."""
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


def ratios(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Ratios of the medians: marlkit over the bare loop, and the peer over marlkit."""
    middle = {name: {entry: median(line[entry] for line in of) for entry in ENTRIES} for name, of in lines.items()}
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
