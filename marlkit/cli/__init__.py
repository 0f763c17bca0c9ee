"""The command ``marlkit``."""

from __future__ import annotations

from marlkit.cli.main import main

__all__ = ["main"]
