"""The errors that marlkit raises. Each message names the problem, its place and a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class MarlkitError(Exception):
    """Base of every error that a user can correct; the command line prints it without a traceback."""


class OptionError(MarlkitError, ValueError):
    """A component got an option value that it cannot work with.

    Args:
        option: name of the constructor argument at fault, such as ``"num_envs"``.
        message: what is wrong with the value, and which values are valid.
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"option `{option}`: {message}")
        self.option = option
        self.message = message


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe, with its place and a remedy."""

    source: str
    line: int | None
    where: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        remedy = f" {self.remedy}" if self.remedy else ""
        where = f"{self.where}: " if self.where else ""
        return f"{place}: {where}{self.message}{remedy}"


class RecipeError(MarlkitError):
    """A recipe that cannot be run, with all its problems."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RunError(MarlkitError):
    """A folder that is not a run, or a run that cannot be resumed."""


class CheckpointError(RunError):
    """A checkpoint that is damaged, not of this recipe, or holds more than plain data."""


class LostRankError(RunError):
    """Another rank of the training has stopped or cannot be reached."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended a training.

    Args:
        message: what was saved or lost, and how to go on.
        signum: the signal.
        folder: the run.

    Attributes:
        code: exit code of a process that the signal ends, by the convention of shells.
    """

    def __init__(self, message: str, signum: int, folder: Path | None) -> None:
        super().__init__(message)
        self.signum = signum
        self.folder = folder
        self.code = 128 + signum


class NonFiniteError(MarlkitError):
    """A loss, gradient or prediction became NaN or infinite; training stopped before it spread."""


class ComponentError(MarlkitError):
    """A name of no component, or a component whose source cannot be read."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The nearest of the known names; ``None`` if none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of the known names, with a leading space; empty if none is near."""
    near = nearest(word, known)
    return f" Did you mean `{near}`?" if near else ""
