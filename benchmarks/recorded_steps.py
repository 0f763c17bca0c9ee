"""Steps of VMAS environments operation by operation, recorded and, on a GPU, as CUDA graphs: milliseconds of each.

    python -m benchmarks.recorded_steps --scenarios balance transport --envs 32 600 3000
    python -m benchmarks.recorded_steps --device cuda --out benchmarks/results/recorded-steps-cuda.json

Times include resets: random actions, episodes of 100 steps. The modes take turns for several rounds, so that changes of the
machine's speed affect all of them, and the fastest round of each counts. For a scenario that cannot be recorded the reason is
given.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import THREADS
from marlkit.component import Runtime
from marlkit.envs.vmas import VmasEnvironment
from marlkit.options import CompileMode
from marlkit.run.versions import versions

SCENARIOS: dict[str, dict[str, int]] = {
    "balance": {"n_agents": 4},
    "navigation": {"n_agents": 4},
    "simple_spread": {"n_agents": 4},
    "wheel": {"n_agents": 4},
    "dispersion": {"n_agents": 4},
    "flocking": {"n_agents": 4},
    "reverse_transport": {"n_agents": 4},
    "transport": {"n_agents": 4, "n_packages": 2},
}
EPISODE = 100
ROUNDS, STEPS, WARM_UP = 3, 50, 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--envs", nargs="+", type=int, default=[32, 600, 3000])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="JSON file to keep the figures in")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lines = []
    for scenario in options.scenarios:
        for envs in options.envs:
            line = {"scenario": scenario, "envs": envs, **milliseconds(scenario, envs, torch.device(options.device))}
            print(json.dumps(line), flush=True)
            lines.append(line)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        kept = versions() | {"device": options.device, "threads": options.threads, "milliseconds": lines}
        options.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def milliseconds(scenario: str, envs: int, device: torch.device) -> dict[str, float | str]:
    """Times of a step in each mode, and the reason where steps are not recorded."""
    modes: list[CompileMode] = ["none", "record"] if device.type == "cpu" else ["none", "record", "graph"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        takers = {mode: _Taker(scenario, envs, device, mode) for mode in modes}
    best = dict.fromkeys(modes, float("inf"))
    for _ in range(ROUNDS):
        for mode, taker in takers.items():
            best[mode] = min(best[mode], taker.seconds(STEPS) / STEPS)
    found: dict[str, float | str] = {mode: round(1e3 * seconds, 3) for mode, seconds in best.items()}
    return found | ({"not recorded": str(caught[0].message)} if caught else {})


class _Taker:
    """Takes steps with random actions."""

    def __init__(self, scenario: str, envs: int, device: torch.device, mode: CompileMode) -> None:
        torch.manual_seed(0)
        self.env = VmasEnvironment(
            Runtime(device, 0, mode), scenario=scenario, num_envs=envs, max_steps=EPISODE, scenario_options=SCENARIOS[scenario]
        )
        self.env.reset()
        self.action = partial(torch.empty, envs, self.env.spec.n_agents, self.env.spec.action_features, device=device)
        self.seconds(WARM_UP)

    def seconds(self, steps: int) -> float:
        """Seconds that ``steps`` steps take."""
        actions = [self.action().uniform_(-1.0, 1.0) for _ in range(steps)]
        self._wait()
        start = time.perf_counter()
        for action in actions:
            self.env.step(action)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.env.device.type == "cuda":
            torch.cuda.synchronize(self.env.device)


if __name__ == "__main__":
    main()
