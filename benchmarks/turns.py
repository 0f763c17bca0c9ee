"""Programs that take turns on one machine: one runs some iterations while the others wait, then the next.

The speed of a shared machine changes from minute to minute. Programs that run one after the other are measured at different
speeds; those that take turns are measured at the same ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

WORD = "your turn"


def pass_on() -> None:
    """In a program that takes turns: wait until it is its turn again.

    Raises:
        SystemExit: the process that schedules the turns has ended.
    """
    print(WORD, flush=True)
    if not sys.stdin.readline():
        sys.exit("the process that schedules the turns has ended")


def last_lines(commands: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The JSON line that each program ends with.

    Args:
        commands: by name. In this order they begin, each when the one before it has ended or calls :func:`pass_on`, and in this
            order those that do have their turns.

    Raises:
        SystemExit: one failed; the others are stopped.
    """
    programs: dict[str, _Program] = {}
    found: dict[str, str | None] = {}
    with ExitStack() as stack:
        for name, command in commands.items():
            programs[name] = stack.enter_context(_Program(command))
            found[name] = programs[name].until_it_passes_on()
        while waiting := [name for name, line in found.items() if line is None]:
            for name in waiting:
                programs[name].begin_a_turn()
                found[name] = programs[name].until_it_passes_on()
    return {name: json.loads(line) for name, line in found.items() if line is not None}


class _Program:
    """A command that runs in a temporary folder, because the peer writes files where it runs."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command

    def __enter__(self) -> _Program:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self._errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            )
            stack.enter_context(self._process)
            stack.callback(self._process.kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin_a_turn(self) -> None:
        assert self._process.stdin is not None
        # If it has ended while it waited, reading its output reports it.
        with suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)

    def until_it_passes_on(self) -> str | None:
        """``None`` when it passes its turn on, its last line when it has ended."""
        assert self._process.stdout is not None
        last = ""
        for line in self._process.stdout:
            last = line.rstrip("\n")
            if last == WORD:
                return None
        if self._process.wait() != 0:
            self._errors.seek(0)
            sys.exit(f"{' '.join(self._command)} failed:\n{self._errors.read()}")
        return last
