"""The metrics of a run as one CSV file: one row per iteration, readable at any time, also after a kill."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from marlkit.errors import writing
from marlkit.run.files import partial_path, sync_folder
from marlkit.run.metrics_file import ITERATION, in_words, survey

MetricsRow = dict[str, str]


@dataclass(frozen=True)
class Continuation:
    """What was found of the iterations before the one at which training continues.

    Attributes:
        missing: iterations without a row, in words; empty if there are none.
        repeated: iterations with several rows, of which the last was kept, or with rows in a wrong place.
        dropped: iterations whose rows were dropped, because they come after the checkpoint and are played again.
    """

    missing: str = ""
    repeated: str = ""
    dropped: str = ""


class MetricsFile(Logger):
    """A Lightning logger that writes ``metrics.csv``.

    The column ``iteration`` comes first, the others in the order in which they were first logged; a cell is empty where an
    iteration did not log the metric. Numbers are written so that they read back exactly. Metrics that are logged for the
    same iteration in several calls share its row. Rows are appended and only the last one is kept in memory; for a metric that
    is new the file is copied line by line, to extend its header. Only rank 0 writes.

    Args:
        path: the file; an existing one is continued.
        first_iteration: the iteration at which training continues. Rows of this and of later iterations are dropped: they come
            from a process that ended before its next checkpoint.

    Raises:
        RunError: by :meth:`begin`, if the file at ``path`` is not a metrics file.
        WriteError: by any method, if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], first_iteration: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.first_iteration = first_iteration
        self._columns: list[str] = [ITERATION]
        self._last: MetricsRow = {}
        self._start_of_last = 0
        self._file: FileIO | None = None
        self._begun = False
        self._is_new = False

    @property
    def name(self) -> str:
        """Empty: the file is directly in the run folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file is directly in the run folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run folder holds the completed recipe."""

    def begin(self) -> Continuation:
        """Keep the rows of an earlier process that are still valid; :meth:`log_metrics` does so if it was not done before."""
        self._begun = True
        if self.first_iteration == 0 or not self.path.exists():
            self._replace([])
            return Continuation(missing=in_words(self._expected()))
        self._columns, places, repeated = survey(self.path)
        kept = {iteration: place for iteration, place in sorted(places.items()) if iteration < self.first_iteration}
        with self.path.open("rb") as file:
            self._replace(_at(file, place) for place in kept.values())
        return Continuation(
            missing=in_words(iteration for iteration in self._expected() if iteration not in kept),
            repeated=in_words(sorted(repeated)),
            dropped=in_words(sorted(places.keys() - kept.keys())),
        )

    def _expected(self) -> Iterable[int]:
        """The iterations before the first that have a row."""
        return range(self.first_iteration)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add ``metrics`` to the row of iteration ``step`` and write it.

        Raises:
            ValueError: ``step`` is missing: a row belongs to an iteration.
        """
        if step is None:
            raise ValueError("a row of metrics belongs to an iteration: pass `step`")
        if not self._begun:
            self.begin()
        row = {" ".join(column.split()): _as_text(value) for column, value in metrics.items()}
        self._extend([column for column in row if column not in self._columns])
        last = int(self._last.get(ITERATION, -1))
        if step < last:
            self._correct(step, row)
        else:
            self._last = (self._last if step == last else {ITERATION: str(step)}) | row
            self._write(self._last, replaces=step == last)

    @rank_zero_only
    def sync(self) -> None:
        """Flush what was written to the disk: before a checkpoint that follows it."""
        with writing(self.path):
            if self._file is not None:
                os.fsync(self._file.fileno())
            if self._is_new:
                sync_folder(self.path.parent)
                self._is_new = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later :meth:`log_metrics` continues it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: MetricsRow, *, replaces: bool) -> None:
        with writing(self.path):
            # Unbuffered, so that nothing is left to be written after a failure.
            self._file = self._file or self.path.open("r+b", buffering=0)
            if replaces:
                self._file.seek(self._start_of_last)
                self._file.truncate()
            else:
                self._start_of_last = self._file.seek(0, os.SEEK_END)
            _write_all(self._file, _line(row.get(column, "") for column in self._columns))

    def _extend(self, columns: Sequence[str]) -> None:
        """Add columns, whose cells are empty in all rows so far."""
        if not columns:
            return
        self._columns += columns
        with self.path.open("rb") as file:
            file.readline()
            self._replace(line.rstrip(b"\n") + b"," * len(columns) + b"\n" for line in file)

    def _correct(self, step: int, row: MetricsRow) -> None:
        """Add to the row of an iteration that is not the last."""
        _, places, _ = survey(self.path)
        with self.path.open("rb") as file:
            old = next(csv.reader([_at(file, places[step]).decode()])) if step in places else []
            known = dict(zip(self._columns, old, strict=False))
            line = _line((known | {ITERATION: str(step)} | row).get(column, "") for column in self._columns)
            order = sorted({*places, step})
            self._replace(line if iteration == step else _at(file, places[iteration]) for iteration in order)

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Replace the whole file atomically: a reader, also after a kill, finds the old file or the new one."""
        self.finalize("")
        partial = partial_path(self.path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    line = b""
                    file.write(_line(self._columns))
                    for line in lines:
                        self._start_of_last = file.tell()
                        file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, self.path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        self._last = {} if not line else dict(zip(self._columns, next(csv.reader([line.decode()])), strict=True))
        self._is_new = True


def _at(file: BinaryIO, place: tuple[int, int]) -> bytes:
    start, length = place
    file.seek(start)
    return file.read(length)


def _write_all(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _line(cells: Iterable[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _as_text(value: float) -> str:
    """The shortest text that reads back as the same number; tensors and NumPy scalars become plain numbers first."""
    plain = value.item() if hasattr(value, "item") else value
    return repr(int(plain) if isinstance(plain, bool) else plain)
