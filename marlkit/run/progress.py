"""One progress bar over the iterations of the whole training: return, frames per second, time elapsed and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from marlkit.run.metrics_file import EPISODE_RETURN, EVALUATION_RETURN, FRAMES_PER_SECOND, returns_of
from marlkit.run.step_times import shares


class IterationProgress(ProgressBar):
    """A bar on a terminal; elsewhere, such as in a log file, a line at intervals.

    It reads ``evaluation/return``, ``episode/return`` (or those of each group) and ``time/frames_per_second`` from Lightning's
    ``callback_metrics``.

    Args:
        console: where to show it; ``None`` means standard output.
        profile: whether to show the steps' shares of the time too.
        seconds_between_lines: interval between lines where there is no terminal.
        clock: seconds since some fixed time.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        profile: bool = False,
        seconds_between_lines: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._console = console or Console()
        self._profile = profile
        self._seconds_between_lines = seconds_between_lines
        self._clock = clock
        self._enabled = True
        self._bar: Progress | None = None
        self._start = self._last_line = 0.0
        self._first_iteration = 0

    def disable(self) -> None:
        """Show nothing; Lightning calls this on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        self._console.print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the bar, at the iteration at which training continues."""
        self._start = self._last_line = self._clock()
        self._first_iteration = trainer.current_epoch
        if self._enabled and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.add_task("training", total=_total(trainer), completed=trainer.current_epoch, text="")
            self._bar.start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show one more iteration."""
        done = trainer.current_epoch + 1
        text = _summary(trainer.callback_metrics, self._profile)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, text=text)
        elif self._enabled and self._line_is_due(done, _total(trainer)):
            self._last_line = self._clock()
            self._console.print(self._line(done, _total(trainer), text), highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the bar before the error is shown."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line_is_due(self, done: int, total: int | None) -> bool:
        return done == total or self._clock() - self._last_line >= self._seconds_between_lines

    def _line(self, done: int, total: int | None, text: str) -> str:
        elapsed = self._clock() - self._start
        if total is None:
            return f"iteration {done}  {text}  elapsed {_duration(elapsed)}"
        left = elapsed / (done - self._first_iteration) * (total - done)
        return f"iteration {done}/{total}  {text}  elapsed {_duration(elapsed)}  left {_duration(left)}"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        # The speed is averaged over minutes, because evaluations and checkpoints do not occur in every iteration.
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=300.0,
        refresh_per_second=4,
    )


def _total(trainer: Trainer) -> int | None:
    """Iterations of the whole training; ``None`` where it has no end."""
    return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None


def _summary(metrics: Mapping[str, Tensor], profile: bool) -> str:
    parts = [
        f"{label}{group and f' {group}'} {metrics[key]:.3g}"
        for label, name in (("return", EPISODE_RETURN), ("evaluation", EVALUATION_RETURN))
        for group, key in returns_of(name, metrics).items()
        if metrics[key].isfinite()
    ]
    if FRAMES_PER_SECOND in metrics:
        parts.append(f"{metrics[FRAMES_PER_SECOND]:,.0f} frames/s")
    if profile:
        parts.append(shares(metrics))
    return "  ".join(filter(None, parts))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
