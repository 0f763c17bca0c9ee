"""What a logger does beyond writing metrics into a run; imports nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from marlkit.contract import Code


def code(options: Mapping[str, Any]) -> Iterator[Code]:
    """A logger with arguments, which can name a server to send to and a folder to write to."""
    if options.get("logger") is not None and options.get("logger_options"):
        yield Code("logger", f"lightning.pytorch.loggers.{options['logger']}", options["logger_options"])
