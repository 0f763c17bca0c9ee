"""The errors that marlkit raises. Each message names the problem, its place and a remedy."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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


class TrustError(MarlkitError):
    """A recipe or a run would run code, or read environment variables, that the user has not trusted."""


class RunError(MarlkitError):
    """A folder that is not a run, or a run that cannot be resumed."""


class CheckpointError(RunError):
    """A checkpoint that is damaged, not of this recipe, or holds more than plain data."""


class WriteError(RunError):
    """A file that cannot be written: a full disk, a missing permission, an impossible name."""


class CheckpointWriteError(CheckpointError, WriteError):
    """A checkpoint that cannot be written."""


@contextmanager
def writing(path: str | os.PathLike[str], remedy: str = "") -> Iterator[None]:
    """Say of a failure to write within the block which file it is about.

    Args:
        path: the file.
        remedy: what to do besides mending the cause.

    Raises:
        WriteError: in place of an :class:`OSError`.
    """
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "Choose another place, or make this one writable.")
        reason = error.strerror or str(error)
        raise WriteError(f"{path}: cannot be written ({reason}). {advice}{f' {remedy}' if remedy else ''}") from error


_ADVICE = {
    errno.ENOSPC: "Free some space on the disk.",
    errno.EDQUOT: "Free some space: your quota is used up.",
    errno.EFBIG: "Files may not grow so large here (`ulimit -f`).",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EISDIR: "It is a folder: name a file in it.",
    errno.ENOTDIR: "A part of the path is a file, not a folder.",
}


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
    """Something played, a loss, gradient or prediction became NaN or infinite; training stopped before it spread."""


class RuleError(MarlkitError, AssertionError):
    """A component breaks a rule of its kind.

    Attributes:
        rule: the rule, in a word.
    """

    def __init__(self, who: str, rule: str, problem: str, remedy: str) -> None:
        super().__init__(f"{who} {problem}. Rule `{rule}`: {remedy}")
        self.rule = rule


class ComponentError(MarlkitError):
    """A name of no component, or a component whose source cannot be read."""


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The nearest of the known names; ``None`` if none is as near as ``likeness``, from 0 to 1."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of the known names, with a leading space; empty if none is near."""
    near = nearest(word, known)
    return f" Did you mean `{near}`?" if near else ""
