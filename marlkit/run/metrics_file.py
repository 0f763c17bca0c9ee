"""The metrics of a run as one CSV file: one row per iteration, readable at any time, also after a kill."""

from __future__ import annotations

import csv
import io
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from marlkit.errors import RunError, writing
from marlkit.run.files import partial_path, sync_folder

ITERATION = "iteration"
FRAMES = "frames"
EPISODE_RETURN = "episode/return"
EVALUATION_RETURN = "evaluation/return"
GROUP_RETURN = "group_return"
"""In place of ``return``, with the group's name behind it, where agents are opposed to each other."""
FRAMES_PER_SECOND = "time/frames_per_second"

MOST_RANGES = 8
"""Ranges of iterations that a message names."""

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
            return Continuation(missing=_in_words(range(self.first_iteration)))
        self._columns, places, repeated = _survey(self.path)
        kept = {iteration: place for iteration, place in sorted(places.items()) if iteration < self.first_iteration}
        with self.path.open("rb") as file:
            self._replace(_at(file, place) for place in kept.values())
        return Continuation(
            missing=_in_words(iteration for iteration in range(self.first_iteration) if iteration not in kept),
            repeated=_in_words(sorted(repeated)),
            dropped=_in_words(sorted(places.keys() - kept.keys())),
        )

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
        _, places, _ = _survey(self.path)
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


def returns_of(name: str, metrics: Iterable[str]) -> dict[str, str]:
    """The metrics that tell a return such as ``episode/return``, by the group whose it is; ``""`` for the whole team."""
    prefix = f"{name.rpartition('/')[0]}/{GROUP_RETURN}/"
    metrics = list(metrics)
    groups = {metric.removeprefix(prefix): metric for metric in metrics if metric.startswith(prefix)}
    return groups or ({"": name} if name in metrics else {})


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """Read a metrics file.

    Returns:
        Every column as numbers, one per row; ``nan`` where the row does not hold the metric.

    Raises:
        RunError: there is no such file, or it is not a metrics file.
    """
    lines = _lines(Path(path))
    columns = next(lines).cells
    values: list[list[float]] = [[] for _ in columns]
    for line in lines:
        for column, cell in zip(values, line.cells, strict=True):
            column.append(float(cell or math.nan))
    return dict(zip(columns, values, strict=True))


class _Line(NamedTuple):
    """A line of a metrics file: its cells, and where it stands."""

    cells: list[str]
    place: tuple[int, int]


def _lines(path: Path) -> Iterator[_Line]:
    """The header and the rows, one at a time; a last line without a line break, left by a killed process, is skipped."""
    header: list[str] = []
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise RunError(f"{path}: no metrics can be read from it (it is no file).")
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                text = raw.decode()
                if not text.endswith("\n"):
                    break
                cells = next(csv.reader([text]), [])
                if number == 1:
                    header = cells
                    _refuse_header(header, path)
                elif len(cells) != len(header) or not all(map(_is_number, cells)) or not _is_iteration(cells[0]):
                    raise RunError(f"{path}:{number}: is not a row of {len(header)} numbers; mend or remove it.")
                yield _Line(cells, (file.tell() - len(raw), len(raw)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: no metrics can be read from it ({error}).") from error
    if not header:
        _refuse_header(header, path)


def _refuse_header(header: Sequence[str], path: Path) -> None:
    if header[:1] != [ITERATION] or len(set(header)) < len(header):
        raise RunError(f"{path}: is not a metrics file; its first column must be `{ITERATION}`, and each column another.")


def _survey(path: Path) -> tuple[list[str], dict[int, tuple[int, int]], set[int]]:
    """Columns, the place of the last row of each iteration, and the iterations that are repeated or out of order."""
    lines = _lines(path)
    columns = next(lines).cells
    places: dict[int, tuple[int, int]] = {}
    repeated: set[int] = set()
    highest = -1
    for line in lines:
        iteration = int(line.cells[0])
        if iteration <= highest:
            repeated.add(iteration)
        highest = max(highest, iteration)
        places[iteration] = line.place
    return columns, places, repeated


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


def _in_words(iterations: Iterable[int]) -> str:
    """Iterations in order as ranges: ``0 to 4, 7``; the first few of many."""
    ranges: list[list[int]] = []
    for iteration in iterations:
        if ranges and iteration == ranges[-1][1] + 1:
            ranges[-1][1] = iteration
        else:
            ranges.append([iteration, iteration])
    shown = [f"{first}" if first == last else f"{first} to {last}" for first, last in ranges[:MOST_RANGES]]
    return ", ".join([*shown, *(["…"] if len(ranges) > MOST_RANGES else [])])


def _is_iteration(cell: str) -> bool:
    return cell.isascii() and cell.isdigit() and len(cell) < 18


def _is_number(cell: str) -> bool:
    try:
        float(cell or math.nan)
    except ValueError:
        return False
    return True


def _as_text(value: float) -> str:
    """The shortest text that reads back as the same number; tensors and NumPy scalars become plain numbers first."""
    plain = value.item() if hasattr(value, "item") else value
    return repr(int(plain) if isinstance(plain, bool) else plain)
