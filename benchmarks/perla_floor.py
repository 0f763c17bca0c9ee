"""How far PERLA's critic is from the floating-point limit of the machine.

The marginalised critic values K samples of the others' actions per agent and step. Its matrix products are counted, and the
time that they take at the rate of a plain product of the same shape is the floor; the measured annotate and update steps (which
include the actor's) are compared with it.

    python -m benchmarks.perla_floor --samples 100

Each iteration evaluates every row once to annotate it, and in every epoch once forward, once more in the backward pass
because only one chunk is stored, and once backward (about two products for each one forward). ``ratio`` counts the
repeated evaluation as work, ``ratio_without_repeat`` does not. The count holds for continuous actions, whose samples never
coincide.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks import mappo_balance
from benchmarks.measure import THREADS, measure

WIDTH = 256


@dataclass(frozen=True)
class Work:
    """Floating-point operations of the critic's matrix products for one row, of all agents and samples.

    Attributes:
        forward: one evaluation.
        repeated: the part of it that is evaluated again in the backward pass, where one chunk at a time is stored.
        backward: the gradient of one evaluation.
    """

    forward: int
    repeated: int
    backward: int

    def iteration(self, rows: int, following_rows: int, epochs: int, *, repeat: bool) -> int:
        """Operations of a whole iteration of ``rows`` joint steps, for which ``following_rows`` next states are valued too."""
        trained = self.forward + self.backward + (self.repeated if repeat else 0)
        return (rows + following_rows) * self.forward + rows * epochs * trained


def critic_work(*, agents: int, action_features: int, state: int, samples: int, width: int = WIDTH) -> Work:
    """Count a critic with two hidden layers of ``width``, whose first layer is split into a state and an action part.

    A product of ``[r, i]`` and ``[i, o]`` takes ``2 r i o`` operations. The state part is evaluated once per row, and of the
    first layer only the gradient of the weights is needed. The last layer, which is linear, reads the mean over samples.
    """
    from_state = 2 * state * width
    from_actions = 2 * agents * action_features * width
    second, last = 2 * width * width, 2 * width
    evaluations = agents * samples
    return Work(
        forward=from_state + agents * last + evaluations * (from_actions + second),
        repeated=evaluations * (from_actions + second),
        backward=from_state + agents * 2 * last + evaluations * (from_actions + 2 * second),
    )


def product_rate(rows: int, *, width: int = WIDTH, device: str = "cpu", repeats: int = 50) -> float:
    """Operations per second of ``[rows, width] x [width, width]``, the median of some repeats."""
    left, right = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
    out = torch.empty(rows, width, device=device)
    seconds = []
    for _ in range(repeats):
        start = _now(device)
        torch.mm(left, right, out=out)
        seconds.append(_now(device) - start)
    return 2 * rows * width * width / median(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON line."""
    parser = mappo_balance.parser()
    parser.description = __doc__
    parser.add_argument("--samples", type=int, default=100)
    parser.set_defaults(agents=4, envs=60, steps=50, minibatch=1500, iterations=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    rate = product_rate(16384, device=options.device)
    overrides = [*mappo_balance.work(options), f"critic.samples={options.samples}"]
    measured = measure("perla_mappo_vmas", overrides, iterations=options.iterations, device=options.device)
    spec, rows = measured.spec, options.envs * options.steps
    work = critic_work(agents=spec.n_agents, action_features=spec.action_features, state=spec.state_size, samples=options.samples)
    floors = [work.iteration(rows, options.envs, options.epochs, repeat=repeat) / rate for repeat in (True, False)]
    spent = measured.seconds["annotate"] + measured.seconds["update"]
    line = {"who": "marlkit perla_mappo_vmas", "scenario": options.scenario, "samples": options.samples}
    line |= mappo_balance.entries(measured, rows) | {"gigaflops_per_s": round(rate / 1e9, 1), "floor_s": round(floors[0], 3)}
    line |= {"ratio": round(spent / floors[0], 3), "ratio_without_repeat": round(spent / floors[1], 3)}
    print(json.dumps(line))


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
