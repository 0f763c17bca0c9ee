"""Seconds of each step of an iteration, taken from the folder of a real run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import marlkit
from benchmarks.turns import pass_on
from marlkit.run.metrics_file import read_metrics
from marlkit.spec import TeamSpec

STEPS = ("collect", "annotate", "estimate", "update")
THREADS = 2
"""CPU threads, as many as the reference programs use."""

# Without saving, evaluating and drawing, which do not belong to every iteration.
QUIET = ("evaluation_interval=0", "evaluation_episodes=1", "checkpoint_seconds=1e9", "video=false")


@dataclass(frozen=True)
class Measured:
    """Averages over the iterations of a run.

    Attributes:
        seconds: per iteration, of each of :data:`STEPS`, and ``overhead`` for the time outside them (logging, Lightning).
        spec: the team that was trained.
    """

    seconds: dict[str, float]
    spec: TeamSpec


class Iterations(Callback):
    """Seconds from the start of each iteration to that of the next, without the last, which also evaluates.

    Args:
        turn: iterations after which another program runs; 0: never.
    """

    def __init__(self, turn: int = 0) -> None:
        self.seconds: list[float] = []
        self._turn = turn
        self._begun: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Record the time since the start of the last iteration."""
        if self._begun is not None:
            self.seconds.append(time.perf_counter() - self._begun)
        if self._turn and trainer.current_epoch % self._turn == 0:
            pass_on()
        self._begun = time.perf_counter()


def measure(
    recipe: str,
    overrides: Sequence[str],
    *,
    iterations: int,
    device: str,
    warm_up: int = 1,
    threads: int = THREADS,
    turn: int = 0,
) -> Measured:
    """Train ``recipe`` for a few iterations and average its times over all but the first and the last.

    Args:
        recipe: name or path.
        overrides: as on the command line.
        iterations: how many to train.
        device: ``cpu`` or ``cuda``.
        warm_up: how many of them, from the first on, do not count.
        threads: CPU threads.
        turn: iterations after which another program works (:mod:`benchmarks.turns`); 0: none does.

    Raises:
        ValueError: fewer than two iterations after the warm-up; the last one also evaluates, and does not count.
    """
    if iterations < warm_up + 2:
        raise ValueError(
            f"measuring takes at least {warm_up + 2} iterations: {warm_up} to warm up, one to measure, and the last, which also "
            "evaluates"
        )
    torch.set_num_threads(threads)
    trainer = [
        f"trainer.{option}" for option in (*QUIET, f"iterations={iterations}", f"accelerator={device}", f"threads={threads}")
    ]
    clock = Iterations(turn)
    with tempfile.TemporaryDirectory() as root:
        folder = marlkit.train(marlkit.load_recipe(recipe, [*overrides, *trainer]), root, progress=False, callbacks=[clock])
        metrics = read_metrics(folder / "metrics.csv")
        spec = marlkit.load_policy(folder, "last").spec
    averages = {name: fmean(metrics[f"time/{name}"][warm_up:-1]) for name in STEPS}
    return Measured(averages | {"overhead": fmean(clock.seconds[warm_up:]) - sum(averages.values())}, spec)
