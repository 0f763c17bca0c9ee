"""What a bare loop is told, and the JSON line of how long it took, with the entries of the other measuring sticks.

Each loop says in a dataclass what its work is: the defaults are those of the recipe, and every field knows the recipe's option
that it stands for, so that marlkit can be given the same work. ``iterations`` of the class are enough to measure, the first
``warm_up`` of which do not count, because they are not like those that follow. A ``turn`` is so many iterations that the
caches are warm for most of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.turns import pass_on

THREADS = 2
"""CPU threads, as many as the other measuring sticks use."""


class Loop(Protocol):
    """The two halves of an iteration."""

    agents: int

    def collect(self) -> None:
        """Play."""

    def update(self) -> None:
        """Learn from what was played: all that follows playing."""


def option(default: int, overrides: str) -> Any:
    """A field of a work: its default, and what sets the same in the recipe, ``{0}`` standing for the value."""
    return field(default=default, metadata={"overrides": overrides})


W = TypeVar("W")


def parser(work: type[Any]) -> argparse.ArgumentParser:
    """One option per field of ``work``, and how often and where to run."""
    made = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for entry in fields(work):
        made.add_argument(f"--{entry.name}", type=int, default=entry.default, help=entry.metadata["overrides"])
    made.add_argument("--iterations", type=int, default=work.iterations, help="warm-up included")
    made.add_argument("--warm-up", type=int, default=work.warm_up, help="iterations that are not counted")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=THREADS)
    made.add_argument("--turns", action="store_true", help="let another program work now and then, see benchmarks.turns")
    made.add_argument("--turn", type=int, default=work.turn, help="iterations after which another program works")
    return made


def work_of(work: type[W], options: argparse.Namespace) -> W:
    """The work that the options describe."""
    return work(**{entry.name: getattr(options, entry.name) for entry in fields(work)})  # type: ignore[arg-type]


def overrides(work: Any) -> list[str]:
    """What to tell a recipe so that it does the same work."""
    return [text.format(getattr(work, entry.name)) for entry in fields(work) for text in entry.metadata["overrides"].split()]


def run(recipe: str, work: type[W], loop: Callable[[W, torch.device], Loop], arguments: Sequence[str] | None = None) -> None:
    """Run a loop and print its line.

    Args:
        recipe: whose mathematics it is.
        work: the dataclass of its work.
        loop: makes it.
        arguments: of the command line.

    Raises:
        SystemExit: the warm-up leaves no iteration to count.
    """
    told = parser(work)
    options = told.parse_args(arguments)
    if options.turn < 1:
        told.error(f"--turn {options.turn}: must be at least one iteration")
    if options.iterations <= options.warm_up:
        told.error(f"--iterations {options.iterations} leaves nothing to count after a warm-up of {options.warm_up}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    chosen = work_of(work, options)
    running = loop(chosen, device)
    marks = []
    for iteration in range(options.iterations):
        if options.turns and iteration % options.turn == 0:
            pass_on()
        marks.append(_timed(running, device))
    marks = marks[options.warm_up :]
    collect, update = (sum(times) / len(marks) for times in zip(*marks, strict=True))
    frames = options.envs * options.steps
    print(json.dumps({"who": "bare loop", "recipe": recipe, "agents": running.agents, **entries(collect, update, frames)}))


def entries(collect: float, update: float, frames: int) -> dict[str, float]:
    """Seconds per iteration and of its halves, and joint steps per second."""
    whole = collect + update
    return {
        "iteration_s": round(whole, 4),
        "collect_s": round(collect, 4),
        "update_s": round(update, 4),
        "frames_per_s": round(frames / whole),
    }


def _timed(loop: Loop, device: torch.device) -> tuple[float, float]:
    start = _now(device)
    loop.collect()
    middle = _now(device)
    loop.update()
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
