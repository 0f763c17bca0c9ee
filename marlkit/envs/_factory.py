"""Checks of an environment that a function of a user makes, without importing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def check(options: Mapping[str, Any], folders: Sequence[Path] = ()) -> Iterator[tuple[str, str]]:
    """Problems of the options of ``env: {type: torchrl, …}``, as ``(option, message)``."""
    factory = options["factory"]
    if "." not in factory or not all(part.isidentifier() for part in factory.split(".")):
        yield "factory", f"must be a dotted path such as `torchrl.envs.VmasEnv`, got `{factory}`"
