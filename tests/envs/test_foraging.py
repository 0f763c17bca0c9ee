"""Level-based foraging: equal to the package step by step on recorded play, and by its own rules from start to end."""

from __future__ import annotations

import io
import re
from typing import Any

import foraging_plays as plays
import numpy as np
import pytest
import torch
from foraging_plays import Play
from torch import Tensor

from marlkit import rng
from marlkit.component import Runtime
from marlkit.envs._foraging import maps
from marlkit.envs.foraging import EAST, LOAD, NONE, NORTH, SOUTH, WEST, ForagingEnvironment
from marlkit.errors import CheckpointError, MarlkitError, OptionError
from marlkit.spec import Discrete

RUNTIME = Runtime(torch.device("cpu"), seed=0)


@pytest.fixture(autouse=True)
def _isolated() -> Any:
    with rng.isolated(0):
        yield


def create(map: str = "8x8-2p-2f-coop", num_envs: int = 4, **options: Any) -> ForagingEnvironment:
    return ForagingEnvironment(RUNTIME, map=map, num_envs=num_envs, **options)


def placed(env: ForagingEnvironment, agents: Any, food: Any) -> ForagingEnvironment:
    """The environment with agents ``[E, N, 3]`` and food ``[E, F, 3]`` as rows, columns and levels; level 0: no food."""
    found = torch.tensor(np.concatenate([food, agents], 1)).long()
    row, column, level = found.unbind(-1)
    width = env.map.columns + 2
    cells = (row + 1) * width + column + 1
    cells = cells.where(level > 0, (env.map.rows + 2) * width - 1)
    grids = {"cells": cells.t(), "levels": level.t().float(), "total": level[:, : env.map.food].sum(1).float()}
    state = {"map": env.map.name, "steps": torch.zeros(len(found), dtype=torch.int64), "grids": grids}
    env.load_state_dict({**state, "grids": {name: tensor.contiguous() for name, tensor in grids.items()}})
    return env


# --- against the package -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", plays.cases())
def test_recorded_play_is_repeated_step_by_step(case: str) -> None:
    play = plays.recorded(case)
    env = placed(create(num_envs=plays.EPISODES, **plays.options_of(case)), play.agents, play.food)
    seen = env._view
    assert np.array_equal(seen.observation.numpy(), play.first)
    assert np.array_equal(seen.available.numpy(), play.available_first)
    begin = play.lengths.astype(int).cumsum() - play.lengths
    for step in range(play.lengths.max()):
        running = np.flatnonzero(step < play.lengths)
        rows = begin[running] + step
        action = torch.zeros(plays.EPISODES, env.spec.n_agents, dtype=torch.int64)
        action[running] = torch.tensor(play.actions[rows]).long()
        arrived, _ = env.step(action)
        found = {name: arrived[name].squeeze(-1).numpy()[running] for name in ("terminated", "truncated", "done")}
        assert np.array_equal(arrived["agents", "observation"].numpy()[running], play.observations[rows])
        assert np.array_equal(arrived["agents", "action_mask"].numpy()[running], play.available[rows])
        assert np.array_equal(arrived["agents", "reward"].squeeze(-1).numpy()[running], play.rewards[rows].astype(np.float32))
        assert np.array_equal(found["done"], step + 1 == play.lengths[running])
        assert np.array_equal(found["terminated"], play.left[rows] == 0)
        assert np.array_equal(found["truncated"], (play.left[rows] > 0) & (step + 1 == 50))


def moves(play: Play, env: ForagingEnvironment) -> tuple[Any, Any]:
    """Rows and columns ``[L, N]`` of the agents before and after each step, where they see all."""
    own = 3 * env.map.food
    order = [[(own + 3 * (0 if j == i else j + (j < i))) for j in range(env.map.agents)] for i in range(env.map.agents)]
    after = play.observations[:, 0][:, order[0]], play.observations[:, 0][:, np.array(order[0]) + 1]
    return order, after


def test_the_recorded_play_has_what_can_happen() -> None:
    """Loading alone, together and in vain, unavailable actions, full grids, both kinds of ends, agents that share a cell."""
    seen: set[str] = set()
    for case in plays.cases():
        play, options = plays.recorded(case), plays.options_of(case)
        read = maps.read(options["map"])
        starts = np.cumsum(play.lengths.astype(int)) - play.lengths
        before = np.insert(play.available[:-1], 0, play.available_first[0], axis=0)
        before[starts] = play.available_first
        able = np.take_along_axis(before, play.actions[..., None].astype(int), -1)[..., 0]
        paid = (play.rewards > 0).sum(-1)
        found = {
            "alone": (paid == 1).any(),
            "together": (paid >= 2).any(),
            "three together": (paid >= 3).any(),
            "in vain": (((play.actions == LOAD) & able).any(-1) & (paid == 0)).any(),
            "unavailable": (~able).any(),
            "penalty": (play.rewards < 0).any(),
            "eaten": (play.left == 0).any(),
            "cut": (play.lengths == 50).any() and (play.left[-1] > 0),
            "less food": (play.food[..., 2] == 0).any(),
        }
        if read.sight is None and not options.get("observe_agent_levels") is False:
            agents = play.observations[:, 0, 3 * read.food :].reshape(len(play.left), -1, 3)[..., :2].astype(int)
            apart = (agents[:, :, None] != agents[:, None]).any(-1) | np.eye(read.agents, dtype=bool)
            found["a shared cell"] = (~apart).any()
        seen |= {name for name, happens in found.items() if happens}
    names = {"alone", "together", "three together", "in vain", "unavailable", "penalty", "eaten", "cut", "less food"}
    assert seen == names | {"a shared cell"}
