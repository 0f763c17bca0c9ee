"""What a logger does beyond writing metrics into a run; imports nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from marlkit.contract import Code

NAMES = {"description", "experiment_name", "group", "job_type", "name", "notes", "project", "run_name", "tags"}
"""Arguments that only say how a run is called; others can name a server to send to, or a folder to write to."""


def code(options: Mapping[str, Any]) -> Iterator[Code]:
    """A logger that is given more than names."""
    given = options.get("logger_options") or {}
    if options.get("logger") is not None and not NAMES.issuperset(given):
        yield Code("logger", f"lightning.pytorch.loggers.{options['logger']}", given)
