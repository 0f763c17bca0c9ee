"""Options that a user's scenario does not read, found by building it once with keys that notice being looked up."""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from marlkit import rng
from marlkit.envs._vmas.scenario_source import BASE
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

    A small world is built and takes a step. An option that the scenario keeps, and whose name occurs in its source, counts as
    read: it may be used later.

    Raises:
        OptionError: it does not read one.
    """
    with rng.isolated(0):
        made, keys = scenario(), [_Key(name) for name in options]
        try:
            made.env_make_world(2, torch.device("cpu"), **dict(zip(keys, copy.deepcopy(list(options.values())), strict=True)))
        except Exception:
            return  # building it in earnest says what is wrong
        with suppress(Exception):  # as above
            _step(made)
    kept = [held for held in (vars(made), *vars(made).values()) if isinstance(held, dict)]
    unread = [str(key) for key in keys if not key.found]
    words = _words(scenario) if unread else set()
    for name in unread:
        if name not in words or not any(name in held for held in kept):
            message = f"scenario `{path}` has no option `{name}`: it does not read it"
            raise OptionError(f"scenario_options.{name}", f"{message}.{did_you_mean(name, words)}")


def _step(made: Any) -> None:
    made.env_reset_world_at(None)
    for agent in made.world.policy_agents:
        agent.action.u = torch.zeros(2, agent.action_size)
    for agent in made.world.agents:
        made.env_process_action(agent)
    made.pre_step()
    made.world.step()
    made.post_step()
    for agent in made.world.policy_agents:
        made.reward(agent)
        made.observation(agent)
    made.done()


def _words(scenario: type) -> set[str]:
    """The attributes, arguments and strings in the source of a class and of those above it that are not VMAS' base."""
    found: set[str] = set()
    classes = [cls for cls in scenario.__mro__ if hasattr(cls, "make_world") and cls.__module__ != BASE.rpartition(".")[0]]
    for module in set(map(inspect.getmodule, classes)):
        with suppress(OSError, TypeError, SyntaxError):
            nodes = list(ast.walk(ast.parse(inspect.getsource(module)))) if module is not None else []
            found |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            found |= {node.arg for node in nodes if isinstance(node, ast.arg)}
            found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return {word for word in found if word.isidentifier()}
