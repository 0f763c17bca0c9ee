"""Options that a user's scenario does not read, found by building it once with keys that notice being looked up."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from marlkit import rng
from marlkit.errors import OptionError, did_you_mean


class _Key(str):
    """The name of an option; notices that a dictionary or a call looks for this name."""

    found: bool = False
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        same = str.__eq__(self, other) is True
        self.found |= same
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other


def refuse_unread(path: str, scenario: type, options: Mapping[str, Any]) -> None:
    """Check that a scenario class reads every option, where its source does not tell.

    A small world is built, reset and looked at. An option that the scenario keeps for later under its name counts as read.

    Raises:
        OptionError: it does not read one.
    """
    with rng.isolated(0):
        made, keys = scenario(), [_Key(name) for name in options]
        try:
            made.env_make_world(2, torch.device("cpu"), **dict(zip(keys, copy.deepcopy(list(options.values())), strict=True)))
        except Exception:
            return  # building it in earnest says what is wrong
        try:
            made.env_reset_world_at(None)
            for agent in made.world.agents:
                made.observation(agent)
                made.reward(agent)
        except Exception:
            pass  # not every scenario can be looked at before it was stepped
    kept = [held for held in (vars(made), *vars(made).values()) if isinstance(held, dict)]
    for key in keys:
        name = str(key)
        if not key.found and not any(name in held for held in kept):
            hint = did_you_mean(name, _words(scenario))
            raise OptionError("scenario_options", f"scenario `{path}` has no option `{name}`: it does not read it.{hint}")


def _words(scenario: type) -> set[str]:
    """The names and strings in the source of a class, of which an option may be meant."""
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(scenario) or scenario))
    except (OSError, TypeError, SyntaxError):
        return set()
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in strings if text.isidentifier()} | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
