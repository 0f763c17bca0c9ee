"""TensorBoard's events; a disk that takes no more of them ends them, not the training."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from marlkit.errors import writing


class EventLogger(TensorBoardLogger):
    """Lightning's logger for TensorBoard in a folder ``tensorboard`` of the run.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(run, name="tensorboard", version="")
        _let_writers_end_in_silence()
        self.ended = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the events.

        Raises:
            WriteError: its file cannot be made.
        """
        with writing(self.log_dir):
            return super().experiment

    def log_metrics(self, *arguments: Any, **options: Any) -> None:
        """Write metrics, unless writing has failed before."""
        with self._ending_on_failure():
            super().log_metrics(*arguments, **options)

    def save(self) -> None:
        """Flush what was written."""
        with self._ending_on_failure():
            super().save()

    def finalize(self, status: str) -> None:
        """Close the file."""
        with self._ending_on_failure():
            super().finalize(status)

    @contextmanager
    def _ending_on_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # of this call, or of the writer's thread before it
            # Lightning makes a ValueError of whatever a writer raises.
            failure = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(failure, OSError):
                raise
            if not self.ended:
                message = f"{self.log_dir}: nothing more can be written ({failure.strerror or failure})"
                warnings.warn(f"{message}; TensorBoard's curves end here, metrics.csv goes on.", stacklevel=4)
            self.ended = True


def _told_by_the_logger(failure: threading.ExceptHookArgs) -> bool:
    """Whether a thread that has failed is a writer of events, whose error the next call of the logger gets."""
    return isinstance(failure.thread, _AsyncWriterThread) and isinstance(failure.exc_value, OSError)


@functools.cache
def _let_writers_end_in_silence() -> None:
    before = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not _told_by_the_logger(failure):
            before(failure)

    threading.excepthook = hook
