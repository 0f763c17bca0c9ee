"""Whose fault an exception is: that of the component in whose code it was raised."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from marlkit.component import Component, who_is
from marlkit.errors import MarlkitError
from marlkit.ranks import Ranks

LESS_MEMORY = (
    "Lower what is large: env.num_envs, the steps or the capacity of data, the minibatches of update, the hidden sizes, "
    "or trainer.evaluation_episodes."
)
"""The remedy where memory does not suffice."""


@contextmanager
def naming_the_culprit(when: str) -> Iterator[None]:
    """Let an exception that a component did not foresee say which component it was, and where.

    Args:
        when: begins the message.

    Raises:
        MarlkitError: in the place of any other exception in a component, or for want of memory; others pass.
    """
    try:
        yield
    except MarlkitError:
        raise
    except Exception as error:  # whatever a component does
        found = culprit(error)
        if found is None and not is_out_of_memory(error):
            raise
        raise MarlkitError(f"{when}: {failure(error, 'training' if found is None else who_is(found))}") from error


def culprit(error: BaseException) -> Component | None:
    """The component whose method was the last to be called; ``None`` where it was none, or ranks were exchanging tensors."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        this = frame.f_locals.get("self")
        if isinstance(this, Ranks):
            return None
        found = this if isinstance(this, Component) else found
    return found


def failure(error: BaseException, who: str) -> str:
    """What happened to ``who``, with the line of the component's own file where there is one."""
    what = f"{type(error).__name__}: {error}".strip()
    if is_out_of_memory(error):
        return f"{who} needs more memory than there is ({what.partition(chr(10))[0]}). {LESS_MEMORY}"
    return f"{who} failed: {what}{_place(error)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was raised because memory did not suffice, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _place(error: BaseException) -> str:
    """The last line of the culprit's file that was run, as `` (my_env.py:12)``."""
    found = culprit(error)
    try:
        file = None if found is None else inspect.getsourcefile(found.__class__)
    except (OSError, TypeError):
        file = None
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return f" ({Path(file).name}:{lines[-1]})" if file is not None and lines else ""
