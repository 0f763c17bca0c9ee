"""Reading the metrics of a run: one CSV file, one row per iteration. Imports no torch."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from marlkit.errors import RunError

ITERATION = "iteration"
FRAMES = "frames"
EPISODE_RETURN = "episode/return"
EVALUATION_RETURN = "evaluation/return"
EVALUATION_LENGTH = "evaluation/length"
"""A metric of every evaluation."""
GROUP_RETURN = "group_return"
"""In place of ``return``, with the group's name behind it, where agents are opposed to each other."""
FRAMES_PER_SECOND = "time/frames_per_second"

MOST_RANGES = 8
"""Ranges of iterations that a message names."""


def returns_of(name: str, metrics: Iterable[str]) -> dict[str, str]:
    """The metrics that tell a return such as ``episode/return``, by the group whose it is; ``""`` for the whole team."""
    prefix = f"{name.rpartition('/')[0]}/{GROUP_RETURN}/"
    metrics = list(metrics)
    groups = {metric.removeprefix(prefix): metric for metric in metrics if metric.startswith(prefix)}
    return groups or ({"": name} if name in metrics else {})


def episode_column(metric: str, number: int) -> str:
    """The column of ``episodes.csv`` that holds the part of episode ``number`` in a metric of evaluations."""
    return f"{metric}/{number}"


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


def iterations_with(path: Path, column: str) -> Iterator[int]:
    """The iterations whose rows of a metrics file hold a value of ``column``.

    Raises:
        RunError: as :func:`read_metrics`.
    """
    lines = _lines(path)
    columns = next(lines).cells
    if column in columns:
        place = columns.index(column)
        yield from (int(line.cells[0]) for line in lines if line.cells[place])


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


def survey(path: Path) -> tuple[list[str], dict[int, tuple[int, int]], set[int]]:
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


def in_words(iterations: Iterable[int]) -> str:
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
