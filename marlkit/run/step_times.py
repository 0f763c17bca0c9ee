"""Time of each step of an iteration: as shares during the training and as a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import fmean

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from marlkit.run.metrics_file import FRAMES_PER_SECOND

STEPS = ("collect", "annotate", "estimate", "update")
BETWEEN = "between"
"""Time outside the steps: logging, evaluations, checkpoints, Lightning."""


def seconds_of(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Seconds of each step that the latest iteration had, from scalar metrics ``[]``."""
    return {step: float(metrics[f"time/{step}"]) for step in STEPS if f"time/{step}" in metrics}


def shares(metrics: Mapping[str, Tensor]) -> str:
    """The steps' shares, such as ``collect 24%  annotate 1%  estimate 0%  update 75%``, from scalar metrics ``[]``."""
    seconds = seconds_of(metrics)
    whole = sum(seconds.values())
    return "  ".join(f"{step} {value / whole:.0%}" for step, value in seconds.items()) if whole > 0 else ""


class StepTimes(Callback):
    """Sums the time of each step and prints a table when the training ends, also if it is interrupted.

    The first iteration, which warms up, is left out if there are others. It reads ``time/*`` from Lightning's
    ``callback_metrics``.

    Args:
        console: where to print; ``None`` means standard output.
        clock: seconds since some fixed time.
    """

    def __init__(self, *, console: Console | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._console = console or Console()
        self._clock = clock
        self._moment = 0.0
        self._iterations: list[dict[str, float]] = []
        self._frames: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._moment = self._clock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the times of an iteration."""
        now, metrics = self._clock(), trainer.callback_metrics
        seconds = seconds_of(metrics)
        within = sum(seconds.values())
        self._iterations.append(seconds | {BETWEEN: max(0.0, now - self._moment - within)})
        self._frames.append(float(metrics.get(FRAMES_PER_SECOND, 0.0)) * within)
        self._moment = now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        self._print(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print the table of the iterations so far."""
        self._print(trainer)

    def averages(self) -> dict[str, float]:
        """Seconds per iteration of each step and between the steps; empty before the first iteration."""
        counted = self._iterations[1:] or self._iterations
        names = [name for name in (*STEPS, BETWEEN) if any(name in each for each in counted)]
        return {name: fmean(each.get(name, 0.0) for each in counted) for name in names}

    def _print(self, trainer: Trainer) -> None:
        seconds = self.averages()
        if not seconds or not trainer.is_global_zero:
            return
        frames, whole = fmean(self._frames[1:] or self._frames), sum(seconds.values())
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column in ("step", "seconds per iteration", "share", "frames/s"):
            table.add_column(column, justify="left" if column == "step" else "right")
        for name, value in (seconds | {"whole": whole}).items():
            rate = f"{frames / value:,.0f}" if value > 0 else ""
            table.add_row(name, f"{value:.4f}", f"{value / whole:.1%}" if whole > 0 else "", rate)
        self._console.print(table)
