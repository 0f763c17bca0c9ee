"""Speed of MAPPO on a VMAS scenario: one JSON line with the same options and entries as the reference programs.

``update_s`` is the time after collecting: annotate, estimate and update; ``iteration_s`` also includes the time between the
steps. A frame is one joint step of one environment.

    python -m benchmarks.mappo_balance balance --agents 4
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from benchmarks.measure import Measured, measure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parser().parse_args(arguments)
    measured = measure("mappo", work(options), iterations=options.iterations, device=options.device)
    print(json.dumps({"who": "marlkit", "scenario": options.scenario, **entries(measured, options.envs * options.steps)}))


def parser() -> argparse.ArgumentParser:
    """The options of the reference programs."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("scenario", nargs="?", default="balance")
    made.add_argument("--envs", type=int, default=600)
    made.add_argument("--steps", type=int, default=100)
    made.add_argument("--epochs", type=int, default=4)
    made.add_argument("--minibatch", type=int, default=6000)
    made.add_argument("--iterations", type=int, default=4)
    made.add_argument("--device", default="cpu")
    made.add_argument("--agents", type=int, default=None, help="default: the scenario's own")
    return made


def work(options: argparse.Namespace) -> list[str]:
    """The overrides that give a recipe the work of the reference programs."""
    agents = "null" if options.agents is None else f"{{n_agents: {options.agents}}}"
    return [
        f"env.scenario={options.scenario}",
        "env.scenario_options=null",
        f"env.scenario_options={agents}",
        f"env.num_envs={options.envs}",
        f"env.max_steps={options.steps}",
        f"data.steps={options.steps}",
        "actor.hidden=[256,256]",
        "critic.hidden=[256,256]",
        f"update.epochs={options.epochs}",
        f"update.minibatch_size={options.minibatch}",
    ]


def entries(measured: Measured, frames: int, digits: int = 3) -> dict[str, float]:
    """The entries of a reference program's line, and the parts of ``update_s``."""
    seconds = measured.seconds
    following = seconds["annotate"] + seconds["estimate"] + seconds["update"]
    iteration = seconds["collect"] + following + seconds["overhead"]
    return {
        "agents": measured.spec.n_agents,
        "iteration_s": round(iteration, digits),
        "collect_s": round(seconds["collect"], digits),
        "update_s": round(following, digits),
        "frames_per_s": round(frames / iteration),
        "annotate_s": round(seconds["annotate"], digits),
        "estimate_s": round(seconds["estimate"], digits),
        "overhead_s": round(seconds["overhead"], digits),
    }


if __name__ == "__main__":
    main()
