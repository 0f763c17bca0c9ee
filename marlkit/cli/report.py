"""Output of the command line: errors, notes, and the wiring of a recipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import marlkit
from marlkit import keys
from marlkit.contract import KINDS
from marlkit.errors import MarlkitError, Problem, RecipeError
from marlkit.keys import Key
from marlkit.recipe import Recipe
from marlkit.recipe.wiring import DIMENSIONS, MISSING, dimensions, is_discrete, shape, wiring

if TYPE_CHECKING:
    from marlkit.comparison import Comparison

PIPE_WIDTH = 160
"""Columns where the output is no terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line handle a closed pipe, which it does silently; rich would exit with code 1."""
        raise BrokenPipeError


def console(file: IO[str] | None = None) -> Console:
    """A console on standard output, or on `file`; text such as ``[N, O]`` is not parsed as markup."""
    file = file or sys.stdout
    return _Console(file=file, markup=False, highlight=False, emoji=False, width=None if file.isatty() else PIPE_WIDTH)


def table(*columns: str) -> Table:
    """An empty table in marlkit's style."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def print_error(error: MarlkitError) -> None:
    """Print an error on standard error, each problem on its own line."""
    out = console(sys.stderr)
    lines = [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else [str(error)]
    if len(lines) > 1:
        out.print(Text(f"{len(lines)} problems:", style="bold red"))
    for line in lines:
        out.print(Text("error: ", style="bold red") + Text(line), soft_wrap=True)


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on standard error, separate from the output of a command."""
    for note in notes:
        console(sys.stderr).print(Text("note: ", style="yellow") + Text(note), soft_wrap=True)


def print_step(message: str) -> None:
    """Print on standard error what is being done."""
    console(sys.stderr).print(Text(message, style="dim"), soft_wrap=True)


def print_comparison(found: Comparison) -> None:
    """Print a table for each task."""
    from marlkit.comparison.tables import summary_rows

    for result in found.results:
        heads, rows = summary_rows(result)
        print_sections(f"{result.task.name}: {found.metric}, interquartile mean and 95 % interval", rows, heads)


def print_warnings(problems: Iterable[Problem]) -> None:
    """Print what may be wrong on standard error, separate from the output of a command."""
    for problem in problems:
        console(sys.stderr).print(Text("warning: ", style="yellow") + Text(str(problem)), soft_wrap=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of marlkit within the block as one line each, without the line of code that gives them."""
    usual, package = warnings.formatwarning, str(Path(marlkit.__file__).parent)

    def plain(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        own = filename.startswith(package) and issubclass(category, UserWarning)
        return f"marlkit: {message}\n" if own else usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def print_interrupted(message: str) -> None:
    """Print after a signal how to go on."""
    console(sys.stderr).print(Text(message), soft_wrap=True)


def print_ok(recipe: Recipe, ran: bool) -> None:
    """Print that a recipe has passed its checks, and its components."""
    parts = ", ".join(f"{section} {recipe.entries[section].name}" for section in KINDS)
    how = "names, values and fit checked, every component tried" if ran else "names, values and fit checked"
    console().print(f"ok: {recipe.name} ({how})", f"    {parts}", sep="\n", soft_wrap=True)


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print numbers by name."""
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}")


def print_wiring(recipe: Recipe, sizes: Mapping[str, int], parameters: Mapping[str, int]) -> None:
    """Print which component reads and writes which key.

    Args:
        recipe: a completed recipe.
        sizes: of the named dimensions; empty to print the names.
        parameters: numbers of parameters by section; empty where they are not known.
    """
    columns = ["component", "reads", "from", "writes", *(["parameters"] if parameters else [])]
    made = table(*columns)
    discrete = is_discrete(recipe)
    for row in wiring(recipe):
        if not (row.reads or row.writes or row.follows or row.path in parameters):
            continue
        cells = [
            f"{row.path}\n{row.component}{'' if row.runs else chr(10) + '(does not run: no component reads its keys)'}",
            _keys(row.reads, discrete, sizes),
            "\n".join(writer or MISSING for writer in row.reads.values()) if row.runs else "",
            _keys(row.writes, discrete, sizes),
            *([f"{parameters[row.path]:,}" if row.path in parameters else ""] if parameters else []),
        ]
        made.add_row(*map(Text, cells), end_section=True)
    out = console()
    out.print(made)
    legend = [f"{name}{f' = {sizes[name]}' if name in sizes else ''} {DIMENSIONS[name]}" for name in dimensions(recipe)]
    out.print(f"Shapes follow the batch dimensions: {', '.join(legend)}.", soft_wrap=True)
    if parameters:
        out.print(f"Parameters in all: {sum(parameters.values()):,}.")


def _keys(found: Iterable[Key], discrete: bool, sizes: Mapping[str, int]) -> str:
    return "\n".join(f"{keys.name(key)} {shape(key, discrete, sizes)}" for key in found)


def print_sections(title: str, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> None:
    """Print a table under a title."""
    out = console()
    out.print(Text(title, style="bold"))
    made = table(*columns)
    for row in rows:
        made.add_row(*map(Text, row))
    out.print(made)
    out.print()
