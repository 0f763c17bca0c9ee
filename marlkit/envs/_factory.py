"""What can be known of an environment that a named function makes, without importing it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlkit.contract import Code

SUITES = {
    "torchrl.envs.GymEnv": "env_name",
    "torchrl.envs.libs.gym.GymEnv": "env_name",
    "torchrl.envs.PettingZooEnv": "task",
    "torchrl.envs.libs.pettingzoo.PettingZooEnv": "task",
    "torchrl.envs.VmasEnv": "scenario",
    "torchrl.envs.libs.vmas.VmasEnv": "scenario",
}
"""Classes of TorchRL that make an environment of an installed suite, each with the option that holds its name.

They run nothing but the suite as long as the name names no module (in Gymnasium `module:Environment-v0` does) and the other
options are plain (:func:`_is_plain`).
"""


def check(options: Mapping[str, Any], folders: Sequence[Path] = ()) -> Iterator[tuple[str, str]]:
    """Problems of the options of ``env: {type: torchrl, …}``, as ``(option, message)``."""
    factory = options["factory"]
    if "." not in factory or not all(part.isidentifier() for part in factory.split(".")):
        yield "factory", f"must be a dotted path such as `torchrl.envs.VmasEnv`, got `{factory}`"


def code(options: Mapping[str, Any]) -> Iterator[Code]:
    """The function of ``env: {type: torchrl, …}`` with its arguments, unless it only makes an environment of a suite."""
    factory, given = options["factory"], dict(options.get("options") or {})
    name = given.pop(SUITES[factory], "") if factory in SUITES else ":"
    if not re.fullmatch(r"[\w-]*(/[\w-]+)*", str(name)) or not _is_plain(given):
        yield Code("factory", factory, options.get("options") or {})


def _is_plain(value: Any) -> bool:
    """Whether a value holds only numbers and single words, which name no file, module or address."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return re.fullmatch(r"[\w-]*", value) is not None if isinstance(value, str) else True
