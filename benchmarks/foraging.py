"""Steps per second of level-based foraging: marlkit's batch of grids, and the package `lbforaging` where it is installed.

    python -m benchmarks.foraging --out benchmarks/results/foraging-cpu.json
    python -m benchmarks.foraging --maps 8x8-2p-2f-coop --envs 1024 16384 --device cuda

One step is one joint step of one grid. Actions are uniformly random, unavailable ones among them, and episodes that end start
anew; both play the rules of the ids `-v3`. On a CPU one thread is used and its processor time is counted, which leaves out what
other programs take; on a GPU the time that passes. Marlkit and the package take turns, and the fastest of several short rounds
counts.

The package is measured where `import lbforaging` finds version 2 (`pip install lbforaging==2.0.0`), without any wrapper.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from marlkit.component import Runtime
from marlkit.envs._foraging.maps import PAPER
from marlkit.envs.foraging import ForagingEnvironment
from marlkit.run.versions import versions

STEPS, PACKAGE_STEPS, WARM_UP = 60, 400, 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", nargs="+", default=list(PAPER))
    parser.add_argument("--envs", nargs="+", type=int, default=[1024])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to keep the figures in")
    options = parser.parse_args(arguments)
    lines, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for name in options.maps:
        for envs in options.envs:
            line = {"map": name, "envs": envs, **rates(name, envs, torch.device(options.device), options.rounds)}
            print(json.dumps(line), flush=True)
            lines.append(line)
    machine = versions() | _package() | {"device": options.device, "load_average": round(os.getloadavg()[0], 1)}
    torch.set_num_threads(threads)
    if options.out is not None:
        told = {key: value for key, value in vars(options).items() if key != "out"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        kept = {"command": "python -m benchmarks.foraging", "options": told, **machine, "steps_per_second": lines}
        options.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def rates(name: str, envs: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Steps per second of marlkit and of the package, and their ratio."""
    players = {"marlkit": _grids(f"{name}-v3", envs, device)}
    if _package():
        players["lbforaging"] = _one_grid(name)
    best = dict.fromkeys(players, 0.0)
    for _ in range(rounds):
        for program, play in players.items():
            best[program] = max(best[program], play())
    found = {program: float(round(rate)) for program, rate in best.items()}
    return found | ({"ratio": round(best["marlkit"] / best["lbforaging"], 1)} if "lbforaging" in best else {})


def _grids(name: str, envs: int, device: torch.device) -> Callable[[], float]:
    torch.manual_seed(0)
    env = ForagingEnvironment(Runtime(device, 0), map=name, num_envs=envs)
    env.reset()

    def play(steps: int = STEPS) -> float:
        actions = torch.randint(6, (steps, envs, env.spec.n_agents), device=device)
        start = _now(device)
        for action in actions:
            env.step(action)
        return steps * envs / (_now(device) - start)

    play(WARM_UP)
    return play


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _package() -> dict[str, Any]:
    return {"lbforaging": metadata.version("lbforaging")} if importlib.util.find_spec("lbforaging") else {}


def _one_grid(name: str) -> Callable[[], float]:
    from lbforaging.foraging.environment import ForagingEnv

    rows, columns, players, food = map(int, re.findall(r"\d+", name))
    levels = {"min_player_level": 1, "max_player_level": 2, "min_food_level": 1, "max_food_level": None}
    common = {"sight": max(rows, columns), "max_episode_steps": 50, "force_coop": "coop" in name}
    env = ForagingEnv(players=players, field_size=(rows, columns), max_num_food=food, **levels, **common)
    env.reset(seed=0)

    def play() -> float:
        actions = torch.randint(6, (PACKAGE_STEPS, players)).tolist()
        start = time.process_time()
        for action in actions:
            if env.step(action)[2]:
                env.reset()
        return PACKAGE_STEPS / (time.process_time() - start)

    return play


if __name__ == "__main__":
    main()
