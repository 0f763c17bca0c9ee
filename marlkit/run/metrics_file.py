"""The metrics of a run as one CSV file: one row per iteration, readable at any time, also after a kill."""

from __future__ import annotations

import csv
import io
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from marlkit.errors import RunError
from marlkit.run.lock import partial_path

ITERATION = "iteration"
FRAMES = "frames"
EPISODE_RETURN = "episode/return"
EVALUATION_RETURN = "evaluation/return"
GROUP_RETURN = "group_return"
"""In place of ``return``, with the group's name behind it, where agents are opposed to each other."""
FRAMES_PER_SECOND = "time/frames_per_second"

MetricsRow = dict[str, str]


class MetricsFile(Logger):
    """A Lightning logger that writes ``metrics.csv``.

    The column ``iteration`` comes first, the others in the order in which they were first logged; a cell is empty where an
    iteration did not log the metric. Numbers are written so that they read back exactly. Metrics that are logged for the
    same iteration in several calls share its row. Only rank 0 writes.

    Args:
        path: the file; an existing one is continued.
        first_iteration: the iteration at which training continues. Rows of this and of later iterations are dropped: they come
            from a process that ended before its next checkpoint.

    Raises:
        RunError: on the first write, if the file at ``path`` is not a metrics file.
    """

    def __init__(self, path: str | os.PathLike[str], first_iteration: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.first_iteration = first_iteration
        self._columns: list[str] = [ITERATION]
        self._rows: dict[int, MetricsRow] = {}
        self._file: TextIO | None = None

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

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add ``metrics`` to the row of iteration ``step`` and flush it.

        Raises:
            ValueError: ``step`` is missing: a row belongs to an iteration.
        """
        if step is None:
            raise ValueError("a row of metrics belongs to an iteration: pass `step`")
        first = self._file is None
        if first:
            self._continue()
        row = {column: _as_text(value) for column, value in metrics.items()}
        new_columns = [column for column in row if column not in self._columns]
        self._columns += new_columns
        known = step in self._rows
        self._rows[step] = self._rows.get(step, {ITERATION: str(step)}) | row
        if first or new_columns or known:
            self._rewrite()
        else:
            self._append(self._rows[step])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later :meth:`log_metrics` continues it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _continue(self) -> None:
        """Keep the rows of an earlier process that are still valid."""
        if not self._rows and self.path.exists():
            self._columns, rows = _read_rows(self.path)
            self._rows = {int(row[ITERATION]): row for row in rows if int(row[ITERATION]) < self.first_iteration}

    def _rewrite(self) -> None:
        """Replace the whole file atomically: a reader, also after a kill, finds the old file or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(self.path)
        partial.write_text("".join(self._lines([dict(zip(self._columns, self._columns, strict=True)), *self._rows.values()])))
        os.replace(partial, self.path)
        if self._file is not None:
            self._file.close()
        self._file = self.path.open("a", newline="")

    def _append(self, row: MetricsRow) -> None:
        assert self._file is not None
        self._file.write(next(iter(self._lines([row]))))
        self._file.flush()

    def _lines(self, rows: Iterable[MetricsRow]) -> Iterable[str]:
        for row in rows:
            line = io.StringIO()
            csv.DictWriter(line, self._columns, restval="", lineterminator="\n").writerow(row)
            yield line.getvalue()


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
    columns, rows = _read_rows(Path(path))
    return {column: [float(row[column] or math.nan) for row in rows] for column in columns}


def _read_rows(path: Path) -> tuple[list[str], list[MetricsRow]]:
    """Columns and rows; a last line without a line break, left by a killed process, is skipped."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: no metrics can be read from it ({error}).") from error
    complete = text[: text.rfind("\n") + 1]
    header, *lines = list(csv.reader(io.StringIO(complete))) or [[]]
    if header[:1] != [ITERATION]:
        raise RunError(f"{path}: is not a metrics file; its first column must be `{ITERATION}`.")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header) or not all(map(_is_number, line)) or not line[0].isdigit():
            raise RunError(f"{path}:{number}: is not a row of {len(header)} numbers; mend or remove it.")
    return header, [dict(zip(header, line, strict=True)) for line in lines]


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
