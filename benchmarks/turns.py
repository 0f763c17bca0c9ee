"""Two programs side by side on one machine, of which only one works at a time: each does some iterations, then the other.

A machine that others use too is fast in one minute and slow in the next. Programs that run one after the other meet different
minutes; those that take turns meet the same ones.
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
    """In a program that takes turns: let the others work until it is its turn again.

    Raises:
        SystemExit: whoever hands out the turns is gone.
    """
    print(WORD, flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody hands out turns any more")


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
    """A command that runs in a folder of its own, because the peer leaves things where it runs."""

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
        # Where it has died while it waited, the end of what it says will tell.
        with suppress(BrokenPipeError):
            print(file=self._process.stdin, flush=True)

    def until_it_passes_on(self) -> str | None:
        """Nothing when it lets the others work, its last line when it is done."""
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
