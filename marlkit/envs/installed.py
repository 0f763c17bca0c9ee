"""Whether the libraries behind the adapters are installed, found out without importing them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

TORCHRL_MISSING = "needs TorchRL, which is not installed: `pip install marlkit[torchrl]`"


def check_torchrl(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Problems of an ``env: {type: torchrl, …}`` section, as ``(option, message)``."""
    if importlib.util.find_spec("torchrl") is None:
        yield "type", TORCHRL_MISSING
    factory = options["factory"]
    if "." not in factory or not all(part.isidentifier() for part in factory.split(".")):
        yield "factory", f"must be a dotted path such as `torchrl.envs.VmasEnv`, got `{factory}`"
