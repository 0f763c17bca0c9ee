"""Level-based foraging: equal to the package step by step on recorded play, and by its own rules from start to end."""

from __future__ import annotations

import io
from typing import Any

import foraging_plays as plays
import numpy as np
import pytest
import torch
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


def create(map: str = "8x8-2p-2f-coop", num_envs: int = 4, runtime: Runtime = RUNTIME, **options: Any) -> ForagingEnvironment:
    return ForagingEnvironment(runtime, map=map, num_envs=num_envs, **options)


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


def check_play(case: str, runtime: Runtime = RUNTIME) -> None:
    """Hold the environment to a recorded play."""
    play = plays.recorded(case)
    env = placed(create(num_envs=plays.EPISODES, runtime=runtime, **plays.options_of(case)), play.agents, play.food)
    assert np.array_equal(env._view.observation.cpu().numpy(), play.first)
    assert np.array_equal(env._view.available.cpu().numpy(), play.available_first)
    begin = play.lengths.astype(int).cumsum() - play.lengths
    for step in range(play.lengths.max()):
        running = np.flatnonzero(step < play.lengths)
        rows = begin[running] + step
        action = torch.zeros(plays.EPISODES, env.spec.n_agents, dtype=torch.int64)
        action[running] = torch.tensor(play.actions[rows]).long()
        arrived = env.step(action.to(env.device))[0].cpu()
        found = {name: arrived[name].squeeze(-1).numpy()[running] for name in ("terminated", "truncated", "done")}
        assert np.array_equal(arrived["agents", "observation"].numpy()[running], play.observations[rows])
        assert np.array_equal(arrived["agents", "action_mask"].numpy()[running], play.available[rows])
        assert np.array_equal(arrived["agents", "reward"].squeeze(-1).numpy()[running], play.rewards[rows].astype(np.float32))
        assert np.array_equal(found["done"], step + 1 == play.lengths[running])
        assert np.array_equal(found["terminated"], play.left[rows] == 0)
        assert np.array_equal(found["truncated"], (play.left[rows] > 0) & (step + 1 == 50))


@pytest.mark.parametrize("case", plays.cases())
def test_recorded_play_is_repeated_step_by_step(case: str) -> None:
    check_play(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["10x10-3p-5f-v2", "2s-10x10-5p-3f-v3", "2s-8x8-3p-3f blind-v3"])
def test_recorded_play_is_repeated_on_a_gpu(case: str) -> None:
    check_play(case, Runtime(torch.device("cuda"), seed=0))


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
        if read.sight is None:
            agents = play.observations[:, 0, 3 * read.food :].reshape(len(play.left), -1, 3)[..., :2].astype(int)
            apart = (agents[:, :, None] != agents[:, None]).any(-1) | np.eye(read.agents, dtype=bool)
            found["a shared cell"] = (~apart).any()
        seen |= {name for name, happens in found.items() if happens}
    names = {"alone", "together", "three together", "in vain", "unavailable", "penalty", "eaten", "cut", "less food"}
    assert seen == names | {"a shared cell"}


def test_the_rewards_of_a_team_add_up_to_one_where_all_is_eaten() -> None:
    env = create("5x5-2p-1f", num_envs=200, reward="sum")
    current, total, ended = env.reset(), torch.zeros(200), 0
    for _ in range(100):
        mask = current["agents", "action_mask"]
        action = (torch.rand(mask.shape) * mask + mask[..., LOAD:] * torch.eye(6)[LOAD]).argmax(-1)
        arrived, current = env.step(action)
        total = total + arrived["agents", "reward"][:, 0, 0]
        assert (arrived["agents", "reward"] == arrived["agents", "reward"][:, :1]).all()
        eaten = arrived["terminated"].squeeze(-1)
        assert torch.allclose(total[eaten], torch.ones(()), atol=1e-6)
        assert (total <= 1 + 1e-6).all()
        total = total.masked_fill(arrived["done"].squeeze(-1), 0)
        ended += int(eaten.sum())
    assert ended > 200


# --- the start of an episode -------------------------------------------------------------------------------------------------


def starts(map: str, count: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Agents ``[count, N, 3]`` and food ``[count, F, 3]`` at the start, as rows, columns and levels; -1, -1, 0: no food."""
    env = create(map, num_envs=count, **options)
    rows = env.reset()["agents", "observation"][:, 0].unflatten(-1, (-1, 3)).long()
    return rows[:, env.map.food :], rows[:, : env.map.food]


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Steps between all places ``[G, K, 3]`` and ``[G, L, 3]``: ``[G, K, L]``."""
    return (one[:, :, None, :2] - other[:, None, :, :2]).abs().sum(-1)


@pytest.mark.parametrize("name", [*maps.PAPER, "8x8-3p-3f-v3", "6x9-4p-2f", "5x5-1p-1f"])
def test_a_start_follows_the_rules(name: str) -> None:
    agents, food = starts(name, 4000)
    said = maps.read(name)
    there = food[..., 2] > 0
    size = torch.tensor([said.rows, said.columns])
    assert ((agents[..., :2] >= 0) & (agents[..., :2] < size)).all()
    assert len(agents[..., :2].flatten(0, 1).unique(dim=0)) == size.prod()
    places = food[there][:, :2]
    assert ((places > 0) & (places < size - 1)).all()
    assert len(places.unique(dim=0)) == (size - 2).prod()
    apart = torch.eye(said.agents, dtype=torch.bool) | (distances(agents, agents) > 0)
    assert apart.all()
    assert (distances(agents, food)[there.unsqueeze(1).expand(-1, said.agents, -1)] > 0).all()
    close = (distances(food, food) < 3) & there.unsqueeze(1) & there.unsqueeze(2)
    assert torch.equal(close, torch.diag_embed(there))
    assert there.all() if said.food == 1 or said.rows > 5 else there[:, 0].all()
    assert set(agents[..., 2].unique().tolist()) == {1, 2}
    highest = agents[..., 2].sort(-1).values[:, :3].sum(-1, keepdim=True).expand_as(there)[there]
    for level in highest.unique().tolist():
        found = food[..., 2][there][highest == level]
        most = level if said.inclusive else max(level - 1, 1)
        wanted = [level] if said.coop else list(range(1, most + 1))
        values, counts = found.unique(return_counts=True)
        assert values.tolist() == wanted
        expected = counts.sum() / len(wanted)
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_food_that_finds_no_place_is_left_out_as_often_as_it_should() -> None:
    """All starts of two agents and a first piece of food on 5x5: a second one has no place after the middle, and near agents."""
    inner = [(row, column) for row in range(1, 4) for column in range(1, 4)]
    cells = [(row, column) for row in range(5) for column in range(5)]
    chance = 0.0
    pairs = [(one, other) for one in cells for other in cells if one != other]
    for pair in pairs:
        left = [cell for cell in inner if cell not in pair]
        stuck = [all(abs(a - c) + abs(b - d) < 3 for c, d in left) for a, b in left]
        chance += sum(stuck) / len(left) / len(pairs)
    count = 20_000
    _, food = starts("5x5-2p-2f", count)
    found = int((food[:, 1, 2] == 0).sum())
    assert abs(found - count * chance) < 4 * (count * chance * (1 - chance)) ** 0.5


def test_options_of_levels() -> None:
    agents, food = starts("8x8-3p-2f-v3", 500, min_player_level=2, max_player_level=4)
    assert set(agents[..., 2].unique().tolist()) == {2, 3, 4}
    assert (food[..., 2] <= agents[..., 2].sum(-1, keepdim=True)).all()
    assert food[..., 2].max() > 6
    assert set(starts("8x8-3p-2f", 100, max_food_level=1)[1][..., 2].unique().tolist()) == {1}
    assert set(starts("8x8-3p-2f-coop", 100, max_food_level=5)[1][..., 2].unique().tolist()) == {5}


def test_an_episode_without_any_food_ends_at_once() -> None:
    env = create("5x5-24p-1f", num_envs=50)
    empty = env.reset()["agents", "observation"][:, 0, 2] == 0
    assert empty.any()
    assert not empty.all()
    arrived, _ = env.step(torch.zeros(50, 24, dtype=torch.int64))
    assert torch.equal(arrived["terminated"].squeeze(-1), empty)


def test_only_finished_grids_start_anew() -> None:
    env = create("5x5-2p-1f", num_envs=64, max_steps=20)
    current = env.reset()
    partly = 0
    for _ in range(60):
        mask = current["agents", "action_mask"]
        arrived, current = env.step((torch.rand(mask.shape) * mask).argmax(-1))
        done = arrived["done"].squeeze(-1)
        for key in ("observation", "action_mask"):
            assert torch.equal(arrived["agents", key][~done], current["agents", key][~done])
        assert torch.equal(current["is_first"].squeeze(-1), done)
        assert (current["agents", "observation"][:, 0, 2] > 0).all()
        partly += bool(done.any() and not done.all())
    assert partly > 5


# --- one step at a time ------------------------------------------------------------------------------------------------------


def stepped(agents: list[list[int]], actions: list[int], food: list[list[int]], **options: Any) -> tuple[Any, Tensor]:
    """What follows one joint step on a 5x5 grid: places of the agents and all that arrived."""
    env = placed(create(f"5x5-{len(agents)}p-{len(food)}f", num_envs=1, **options), [agents], [food])
    arrived, _ = env.step(torch.tensor([actions]))
    own = [3 * len(food), 3 * len(food) + 1]
    return arrived[0], arrived["agents", "observation"][0][:, own].long()


@pytest.mark.parametrize(
    ("agents", "actions", "after"),
    [
        ([[0, 0], [0, 1]], [EAST, WEST], [[0, 1], [0, 0]]),
        ([[0, 0], [0, 2]], [EAST, WEST], [[0, 0], [0, 2]]),
        ([[0, 0], [0, 1]], [EAST, NONE], [[0, 0], [0, 1]]),
        ([[0, 0], [0, 1]], [EAST, EAST], [[0, 1], [0, 2]]),
        ([[0, 0], [0, 1], [0, 3]], [EAST, EAST, WEST], [[0, 1], [0, 1], [0, 3]]),
        ([[0, 0], [4, 4]], [NORTH, SOUTH], [[0, 0], [4, 4]]),
        ([[0, 0], [4, 4]], [WEST, EAST], [[0, 0], [4, 4]]),
        ([[2, 3], [3, 2]], [WEST, NORTH], [[2, 3], [3, 2]]),
        ([[0, 0], [4, 4]], [SOUTH, NORTH], [[1, 0], [3, 4]]),
    ],
    ids=["swap", "meet", "occupied", "follow", "onto one that is held up", "edge", "sides", "food", "free"],
)
def test_moves(agents: list[list[int]], actions: list[int], after: list[list[int]]) -> None:
    _, found = stepped([[*place, 1] for place in agents], actions, [[2, 2, 1]])
    assert found.tolist() == after


@pytest.mark.parametrize(
    ("actions", "options", "rewards", "eaten"),
    [
        ([LOAD, LOAD, NONE], {}, [1 / 3, 2 / 3, 0], True),
        ([LOAD, LOAD, LOAD], {}, [1 / 3, 2 / 3, 0], True),
        ([LOAD, NONE, NONE], {}, [0, 0, 0], False),
        ([LOAD, NONE, LOAD], {"penalty": 0.25}, [-0.25, 0, 0], False),
        ([LOAD, LOAD, NONE], {"normalise_reward": False}, [3, 6, 0], True),
        ([LOAD, LOAD, NONE], {"reward": "mean"}, [1 / 3, 1 / 3, 1 / 3], True),
        ([LOAD, LOAD, NONE], {"reward": "sum"}, [1, 1, 1], True),
    ],
)
def test_loading(actions: list[int], options: dict[str, Any], rewards: list[float], eaten: bool) -> None:
    """Two agents of levels 1 and 2 beside food of level 3, and a third one away from it."""
    arrived, _ = stepped([[2, 1, 1], [1, 2, 2], [4, 4, 2]], actions, [[2, 2, 3]], **options)
    assert arrived["agents", "reward"].squeeze(-1).tolist() == pytest.approx(rewards)
    assert arrived["terminated"].item() == arrived["done"].item() == eaten
    assert not arrived["truncated"].item()


def test_only_what_has_an_effect_is_available() -> None:
    env = placed(create("5x5-2p-1f", num_envs=1), [[[0, 0, 1], [2, 3, 1]]], [[[2, 2, 1]]])
    arrived, _ = env.step(torch.tensor([[NONE, NONE]]))
    corner, beside = arrived["agents", "action_mask"][0].tolist()
    assert corner == [True, False, True, False, True, False]
    assert beside == [True, True, True, False, True, True]


def test_food_that_is_eaten_in_the_last_step_is_a_true_end() -> None:
    arrived, _ = stepped([[2, 1, 1], [4, 4, 1]], [LOAD, NONE], [[2, 2, 1]], max_steps=1)
    assert (arrived["terminated"].item(), arrived["truncated"].item()) == (True, False)
    arrived, _ = stepped([[2, 1, 1], [4, 4, 1]], [NONE, NONE], [[2, 2, 1]], max_steps=1)
    assert (arrived["terminated"].item(), arrived["truncated"].item()) == (False, True)


# --- the team, saving and drawing --------------------------------------------------------------------------------------------


def test_the_team() -> None:
    env = create("10x10-3p-5f", num_envs=2, observe_agent_levels=False)
    assert (env.spec.n_agents, env.spec.observation, env.spec.action) == (3, 21, Discrete(6))
    assert (env.spec.horizon, env.spec.team_reward) == (50, False)
    assert create(reward="mean").spec.team_reward


def test_a_saved_state_of_something_else_is_refused() -> None:
    state = create("8x8-2p-2f").state_dict()
    with pytest.raises(MarlkitError, match="are 4 of `8x8-2p-2f`, these are 4 of `8x8-2p-2f-coop`"):
        create("8x8-2p-2f-coop").load_state_dict(state)
    with pytest.raises(MarlkitError, match="these are 3 of"):
        create("8x8-2p-2f", num_envs=3).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"grids\.levels"):
        create("8x8-2p-2f").load_state_dict(state | {"grids": state["grids"] | {"levels": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=r"grids\.cells.* cells from 0 to 99"):
        create("8x8-2p-2f").load_state_dict(state | {"grids": state["grids"] | {"cells": state["grids"]["cells"] + 100}})


def test_the_saved_state_does_not_change_afterwards() -> None:
    env = create()
    env.reset()
    saved = env.state_dict()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    for _ in range(5):
        env.step(torch.randint(6, (4, 2)))
    before = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert all(torch.equal(saved["grids"][name], before["grids"][name]) for name in before["grids"])
    assert torch.equal(saved["steps"], before["steps"])


def test_pictures_show_food_and_agents_where_they_are() -> None:
    env = placed(create("5x5-2p-2f", num_envs=1), [[[0, 0, 1], [4, 2, 2]]], [[[1, 3, 2], [0, 0, 0]]])
    picture = env.draw()
    assert picture.shape == (480, 480, 3)
    assert picture.dtype == np.uint8
    coloured = {(row, column) for row in range(5) for column in range(5) if picture[96 * row + 24, 96 * column + 48].std() > 20}
    assert coloured == {(0, 0), (4, 2), (1, 3)}
    shared = placed(env, [[[4, 2, 1], [4, 2, 2]]], [[[1, 3, 2], [0, 0, 0]]]).draw()
    colours = shared[432, 192 + 12], shared[432, 192 + 84]
    assert np.abs(colours[0].astype(int) - colours[1]).sum() > 60


# --- names -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("8x8-2p-2f-coop", maps.Map(8, 8, 2, 2, coop=True)),
        ("Foraging-8x8-2p-2f-coop-v2", maps.Map(8, 8, 2, 2, coop=True, inclusive=False)),
        ("Foraging-2s-15x12-3p-4f-v3", maps.Map(15, 12, 3, 4, sight=2, inclusive=True)),
    ],
)
def test_names_of_maps(name: str, found: maps.Map) -> None:
    assert maps.read(name) == found


@pytest.mark.parametrize(
    ("options", "option", "words"),
    [
        ({"map": "8x8-2p-2f_coop"}, "map", "Did you mean `8x8-2p-2f-coop`?"),
        ({"map": "8x8_3p_2f"}, "map", "Did you mean `8x8-3p-2f`?"),
        ({"map": "Foraging-10x10-3p-5f-v1"}, "map", "Did you mean `10x10-3p-5f`?"),
        ({"map": "corridor"}, "map", r"is no map: a map is named \{rows\}x.*Those of the paper: 5x5-2p-1f, "),
        ({"map": "2x8-2p-1f"}, "map", "must have 3 to 50 rows and columns"),
        ({"map": "99x99-2p-1f"}, "map", "must have 3 to 50 rows and columns"),
        ({"map": "8x8-0p-1f"}, "map", "at least one agent"),
        ({"map": "5x5-25p-1f"}, "map", "no room for 25 agents and food"),
        ({"map": "8x8-2p-1000000f"}, "map", "grids of 64 cells hold at most 12 pieces of food, not 1000000"),
        ({"map": "5x5-2p-3f"}, "map", "`5x5-2p-3f` has no room for 3 pieces of food: in 200 starts at most 2 .* a larger grid"),
        ({"map": "2s-8x8-2p-2f", "sight": 3}, "sight", "map `2s-8x8-2p-2f` says 2, not 3"),
        ({"map": "8x8-2p-2f-v2", "food_level_inclusive": True}, "food_level_inclusive", "says false, not true"),
        ({"min_player_level": 3}, "min_player_level", "must be at most max_player_level=2, got 3"),
    ],
)
def test_what_cannot_be_played_is_refused(options: Any, option: str, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        create(**options)
    assert caught.value.option == option


def test_a_name_and_an_option_that_agree_are_taken() -> None:
    env = create("Foraging-2s-8x8-2p-2f-v3", sight=2, food_level_inclusive=True)
    assert (env.map.sight, env.map.inclusive) == (2, True)
    assert create("8x8-2p-2f", sight=3, food_level_inclusive=True).map == maps.Map(8, 8, 2, 2, sight=3, inclusive=True)
