"""The environment of `docs/environments.md`, as its text, as a class and broken at a chosen step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit.component import Environment, Runtime

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "environments.md"
MEETING: str = re.findall(r"```python\n(# my_env\.py\n.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
"""Continuous actions, random starts, both kinds of ends."""

DISCRETE = (
    MEETING.replace("import Continuous,", "import Discrete,")
    .replace("ACTION_DIMS", "ACTION_MASK")
    .replace('("continuous",)', '("discrete",)')
    .replace("action = Continuous(1, low=((-1.0,),) * n_agents, high=((1.0,),) * n_agents)", "action = Discrete(3)")
    .replace("action.clamp(-1, 1)", "(action - 1).unsqueeze(-1)")
    .replace('"action_dims": everyone', '"action_mask": everyone.expand(-1, -1, 3)')
)
"""The same with three moves."""


def environment(code: str = MEETING) -> Any:
    """The class of a module."""
    names: dict[str, Any] = {"__name__": "my_env"}
    exec(compile(code, "my_env.py", "exec"), names)
    return names["MeetingEnvironment"]


def replaced(code: str, *changes: tuple[str, str]) -> str:
    """A text with some of its parts changed, all of which it must have."""
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    return code


Gave = tuple[TensorDict, TensorDict]


def broken_at(step: int, breaks: Callable[[TensorDict, TensorDict], Any], code: str = MEETING, **options: Any) -> Environment:
    """An environment whose step of that number, from 1, gives what ``breaks`` makes of it; ``None``: what it changed in place."""

    class BrokenEnvironment(environment(code)):  # type: ignore[misc]
        count = 0

        def step(self, action: Tensor) -> Any:
            arrived, current = super().step(action)
            self.count += 1
            if self.count != step:
                return arrived, current
            found = breaks(arrived, current)
            return (arrived, current) if found is None else found

    made: Environment = BrokenEnvironment(Runtime(torch.device("cpu"), 0), **{"num_envs": 3, "max_steps": 6} | options)
    return made
