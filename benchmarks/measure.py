"""Seconds of each step of an iteration, taken from the folder of a real run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import marlkit
from marlkit.outputs.metrics_file import read_metrics
from marlkit.spec import TeamSpec

STEPS = ("collect", "annotate", "estimate", "update")
THREADS = 2
"""CPU threads, as many as the measuring sticks use."""

# What happens around the four steps and not in every iteration: saving, evaluating, drawing.
QUIET = ("evaluation_interval=0", "evaluation_episodes=1", "checkpoint_seconds=1e9", "video=false")


@dataclass(frozen=True)
class Measured:
    """Averages over the iterations of a run.

    Attributes:
        seconds: per iteration, of each of :data:`STEPS`, and ``overhead`` for what is spent between them (logging, Lightning).
        spec: the team that was trained.
    """

    seconds: dict[str, float]
    spec: TeamSpec


def measure(
    recipe: str, overrides: Sequence[str], *, iterations: int, device: str, warm_up: int = 1, threads: int = THREADS
) -> Measured:
    """Train ``recipe`` for a few iterations and average its times over all but the first.

    Args:
        recipe: name or path.
        overrides: as on the command line.
        iterations: how many to train.
        device: ``cpu`` or ``cuda``.
        warm_up: how many of them, from the first on, do not count.
        threads: CPU threads.

    Raises:
        ValueError: fewer than two iterations after the warm-up; the last one also evaluates, so that its overhead does not count.
    """
    if iterations < warm_up + 2:
        raise ValueError(
            f"measuring takes at least {warm_up + 2} iterations: {warm_up} to warm up, one to count, and the last, which also "
            "evaluates"
        )
    torch.set_num_threads(threads)
    trainer = [
        f"trainer.{option}" for option in (*QUIET, f"iterations={iterations}", f"accelerator={device}", f"threads={threads}")
    ]
    with tempfile.TemporaryDirectory() as root:
        folder = marlkit.train(marlkit.load_recipe(recipe, [*overrides, *trainer]), root, progress=False)
        metrics = read_metrics(folder / "metrics.csv")
        moments = _moments(folder / "tensorboard")
        spec = marlkit.load_policy(folder, "last").spec
    steps = {name: metrics[f"time/{name}"] for name in STEPS}
    whole = [later - earlier for earlier, later in pairwise(moments)]
    overheads = [between - sum(steps[name][i] for name in STEPS) for i, between in enumerate(whole, start=1)]
    averages = {name: fmean(seconds[warm_up:]) for name, seconds in steps.items()}
    return Measured(averages | {"overhead": fmean(overheads[warm_up - 1 : -1])}, spec)


def _moments(folder: Path) -> list[float]:
    """When each iteration was logged, in seconds."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.wall_time for event in events.Scalars("frames")]
