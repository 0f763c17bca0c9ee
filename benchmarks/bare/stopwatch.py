"""The options of a bare loop, and the JSON line of its times, with the entries of the other reference programs.

Each loop describes its work in a dataclass: the defaults are those of the recipe, and every field names the recipe's option that
it corresponds to, so that marlkit can be given the same work. ``iterations`` of the class are enough to measure, the first
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
"""CPU threads, as many as the other reference programs use."""


class Loop(Protocol):
    """The two halves of an iteration."""

    agents: int

    def collect(self) -> None:
        """Play."""

    def update(self) -> None:
        """Learn from the played steps: everything after playing."""


def option(default: int, overrides: str) -> Any:
    """A field of a work: its default, and the recipe's overrides that set the same, with ``{0}`` for the value."""
    return field(default=default, metadata={"overrides": overrides})


W = TypeVar("W")


def parser(work: type[Any]) -> argparse.ArgumentParser:
    """One option per field of ``work``, and options for iterations, device and threads."""
    made = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for entry in fields(work):
        made.add_argument(f"--{entry.name}", type=int, default=entry.default, help=entry.metadata["overrides"])
    made.add_argument("--iterations", type=int, default=work.iterations, help="warm-up included")
    made.add_argument("--warm-up", type=int, default=work.warm_up, help="iterations that are not counted")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=THREADS)
    made.add_argument("--turns", action="store_true", help="take turns with another program, see benchmarks.turns")
    made.add_argument("--turn", type=int, default=work.turn, help="iterations after which another program runs")
    return made


def work_of(work: type[W], options: argparse.Namespace) -> W:
    """The work that the options describe."""
    return work(**{entry.name: getattr(options, entry.name) for entry in fields(work)})  # type: ignore[arg-type]


def overrides(work: Any) -> list[str]:
    """The overrides that give a recipe the same work."""
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
    command_line = parser(work)
    options = command_line.parse_args(arguments)
    if options.turn < 1:
        command_line.error(f"--turn {options.turn}: must be at least one iteration")
    if options.iterations <= options.warm_up:
        command_line.error(f"--iterations {options.iterations} leaves nothing to count after a warm-up of {options.warm_up}")
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
