"""Rover-Tower and Cooperative Treasure Collection: returns of scripted play, and steps per second.

    python -m benchmarks.particle_games --out benchmarks/results/particle-games-cpu.json

Returns are means per agent and episode, with standard errors over episodes, and stand beside those of an independent
program (one environment in NumPy; 20,000 episodes of Rover-Tower, 400 of Cooperative Treasure Collection). What its greedy banks
do is not told; here they go to the middle of the field. One step is one joint step of one environment. On a CPU one thread is
used and its processor time is counted; the fastest of several short rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlkit import rng
from marlkit.component import Runtime
from marlkit.envs._vmas.particles import positions
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs.vmas import VmasEnvironment
from marlkit.run.versions import versions

STEPS = {"rover_tower": 25, "treasure_collection": 100}
"""Steps per episode, by the sources."""
PLAYS = ("no-op", "random", "greedy")
INDEPENDENT = {
    "rover_tower": {"no-op": -4.9, "random": -7.6, "greedy": 132.0},
    "treasure_collection": {"no-op": -4.9, "random": -2.0, "greedy": 123.0},
}
"""Returns by the independent program."""
ROUND, WARM_UP = 20, 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--episodes", nargs=2, type=int, default=[20_000, 4_000], help="of Rover-Tower and of the other (20000 4000)"
    )
    parser.add_argument("--envs", nargs="+", type=int, default=[1, 32, 1024])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file to keep the figures in")
    options = parser.parse_args(arguments)
    device, threads = torch.device(options.device), torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    for name, episodes in zip(STEPS, options.episodes, strict=True):
        found.append({"scenario": name, "returns": _measured(name, episodes, device)})
        found[-1]["steps_per_second"] = {str(envs): rate(name, envs, device, options.rounds) for envs in options.envs}
        print(json.dumps(found[-1]), flush=True)
    torch.set_num_threads(threads)
    if options.out is not None:
        told = {key: value for key, value in vars(options).items() if key != "out"}
        machine = versions() | {"device": options.device, "load_average": round(os.getloadavg()[0], 1)}
        kept = {"command": "python -m benchmarks.particle_games", "options": told, **machine, "scenarios": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _measured(name: str, episodes: int, device: torch.device) -> dict[str, dict[str, float]]:
    found = {}
    for play in PLAYS:
        with rng.isolated(0), torch.no_grad():
            batch = Simulation(name, episodes, device, continuous=False, options={})
            per_episode = returns(batch, play).mean(1)
        figures = {"mean": per_episode.mean(), "error": per_episode.std() / episodes**0.5}
        found[play] = {key: round(float(value), 2) for key, value in figures.items()} | {"independent": INDEPENDENT[name][play]}
    return found


def returns(batch: Simulation, play: str) -> Tensor:
    """The return of each agent ``[B, N]`` in an episode of every environment, played as ``PLAYS`` says."""
    batch.reset()
    shape, scenario = (batch.num_envs, len(batch.agents)), batch.scenario
    towers = hasattr(scenario, "towers")
    total = torch.zeros(shape, device=batch.device)
    for _ in range(STEPS["rover_tower" if towers else "treasure_collection"]):
        action = torch.randint(5, shape, device=batch.device)
        if play != "random":
            action = torch.zeros_like(action)
        if play == "greedy":
            chosen = greedy_rovers(scenario) if towers else greedy_hunters_and_banks(scenario)
            action[:, : chosen.shape[1]] = chosen
        total += batch.advance(action)[1]
    return total


def greedy_rovers(scenario: Any) -> Tensor:
    """Rovers that know their goals go there; towers say the first word. ``[B, P]``."""
    rovers, goals = positions(scenario.rovers), positions(scenario.goals)
    return _towards(goals.gather(1, scenario.goal_of.unsqueeze(-1).expand(-1, -1, 2)) - rovers)


def greedy_hunters_and_banks(scenario: Any) -> Tensor:
    """Greedy hunters, and banks that go to the middle of the field. ``[B, N]``."""
    return torch.cat([greedy_hunters(scenario), _towards(-positions(scenario.banks))], 1)


def greedy_hunters(scenario: Any) -> Tensor:
    """Empty hunters go to the nearest treasure, others to their bank. ``[B, H]``."""
    hunters, banks, treasures = (positions(kind) for kind in (scenario.hunters, scenario.banks, scenario.treasures))
    nearest = torch.cdist(hunters, treasures).argmin(-1, keepdim=True).expand(-1, -1, 2)
    own = scenario.holds.clamp(min=0).unsqueeze(-1).expand(-1, -1, 2)
    empty = (scenario.holds < 0).unsqueeze(-1)
    return _towards(torch.where(empty, treasures.gather(1, nearest), banks.gather(1, own)) - hunters)


def _towards(way: Tensor) -> Tensor:
    """The action along the longer axis of ``[B, M, 2]``."""
    axis = way.abs().argmax(-1)
    backwards = way.gather(-1, axis.unsqueeze(-1)).squeeze(-1) < 0
    return 1 + 2 * axis + backwards.long()


def rate(name: str, envs: int, device: torch.device, rounds: int) -> float:
    """Steps per second of random play."""
    with rng.isolated(0):
        env = VmasEnvironment(Runtime(device, 0), scenario=name, num_envs=envs, max_steps=STEPS[name], continuous_actions=False)
        env.reset()
        best = 0.0
        for repeat in range(rounds + 1):
            actions = torch.randint(5, (ROUND if repeat else WARM_UP, envs, env.spec.n_agents), device=device)
            start = _now(device)
            for action in actions:
                env.step(action)
            if repeat:
                best = max(best, ROUND * envs / (_now(device) - start))
    return float(round(best))


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
