"""One-step games: payoffs written out by hand, one step per episode, the same reward for all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from marlkit import keys
from marlkit.component import Runtime
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.envs.product_game import ProductGameEnvironment
from marlkit.errors import MarlkitError, OptionError
from marlkit.spec import Continuous, Discrete

RUNTIME = Runtime(torch.device("cpu"), seed=0)


def rewards(env: Any, actions: Any) -> list[float]:
    """The reward of every joint action, one per environment, after checking that all agents receive the same."""
    arrived, _ = env.step(torch.tensor(actions))
    reward = arrived["agents", "reward"].squeeze(-1)
    assert (reward == reward[:, :1]).all()
    return list(reward[:, 0].tolist())


@pytest.mark.parametrize(
    ("game", "table"),
    [
        ("cooperation", [[8, -12, -12], [-12, 0, 0], [-12, 0, 0]]),
        ("climbing", [[11, -30, 0], [-30, 7, 6], [0, 0, 5]]),
        ("penalty", [[10, 0, -100], [0, 2, 0], [-100, 0, 10]]),
        ("xor", [[0, 1], [1, 0]]),
    ],
)
def test_the_tables_of_two_agents(game: Any, table: list[list[float]]) -> None:
    joint = list(itertools.product(range(len(table)), repeat=2))
    env = MatrixGameEnvironment(RUNTIME, game=game, num_envs=len(joint))
    assert env.spec.action == Discrete(len(table))
    assert rewards(env, joint) == [table[a][b] for a, b in joint]


def test_cooperation_and_xor_of_three_agents() -> None:
    moves = [[0, 0, 0], [0, 0, 3], [0, 1, 2], [1, 1, 1], [3, 2, 1]]
    cooperation = MatrixGameEnvironment(RUNTIME, num_envs=5, n_agents=3, n_actions=4)
    assert rewards(cooperation, moves) == [8, -12, -12, 0, 0]
    xor = MatrixGameEnvironment(RUNTIME, game="xor", num_envs=5, n_agents=3, n_actions=4)
    assert rewards(xor, moves) == [0, 1, 1, 0, 1]


def test_a_table_of_ones_own() -> None:
    table = [[[1, 2], [3, 4]], [[5, 6], [7, 8.5]]]
    env = MatrixGameEnvironment(RUNTIME, payoff=table, num_envs=3)
    assert (env.spec.n_agents, env.spec.action) == (3, Discrete(2))
    assert rewards(env, [[0, 1, 0], [1, 0, 1], [1, 1, 1]]) == [3, 6, 8.5]


def test_the_product_of_all_actions() -> None:
    env = ProductGameEnvironment(RUNTIME, num_envs=2)
    assert (env.spec.n_agents, env.spec.action, env.spec.team_reward) == (2, Continuous(1), True)
    assert rewards(env, [[[2.0], [3.5]], [[-4.0], [0.5]]]) == [7.0, -2.0]
    assert rewards(ProductGameEnvironment(RUNTIME, num_envs=1, n_agents=3), [[[2.0], [-3.0], [5.0]]]) == [-30.0]


def test_the_product_from_a_given_start() -> None:
    env = ProductGameEnvironment(RUNTIME, num_envs=3, start=[-0.25, 0.25], deviation=2.0, limit=2.0)
    # (-0.25, 0.25), (-0.25 + 2, 0.25 - 1), and (2, -2) of (7.75, -5.75).
    assert rewards(env, [[[0.0], [0.0]], [[1.0], [-0.5]], [[4.0], [-3.0]]]) == [-0.0625, 1.75 * -0.75, -4.0]
    with pytest.raises(OptionError, match=r"`start`: must be one number for each of the 3 agents, got \[1\.0, 2\.0\]"):
        ProductGameEnvironment(RUNTIME, n_agents=3, start=[1.0, 2.0])


@pytest.mark.parametrize("env", [MatrixGameEnvironment(RUNTIME, num_envs=4), ProductGameEnvironment(RUNTIME, num_envs=4)])
def test_every_step_is_an_episode_with_all_declared_keys(env: Any) -> None:
    discrete = env.spec.discrete
    action = torch.zeros(4, 2, dtype=torch.int64) if discrete else torch.zeros(4, 2, 1)
    sizes = {**env.spec.sizes(), "1": 1}
    current = env.reset()
    arrived, following = env.step(action)
    afterwards = {keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE}
    for key in env.writes:
        info = keys.describe(key)
        shape = (4, *(sizes[dimension] for dimension in info.dimensions(discrete=discrete)))
        own = key[1:] if key in afterwards else key
        for step in [arrived] if key in afterwards else [current, arrived, following]:
            assert step[own].shape == shape
            assert step[own].dtype == getattr(torch, info.dtype)
    assert arrived["terminated"].all()
    assert arrived["done"].all()
    assert not arrived["truncated"].any()
    assert following["is_first"].all()
    assert not arrived["is_first"].any()
    assert (current["agents", "observation"] == 1).all()
    assert env.spec.horizon == 1
    env.load_state_dict(env.state_dict())


@pytest.mark.parametrize(
    ("options", "option", "words"),
    [
        ({"payoff": [[1, 2], [3]]}, "payoff", "N levels of lists of A numbers"),
        ({"payoff": [[1, 2, 3], [4, 5, 6]]}, "payoff", r"got the shape \[2, 3\]"),
        ({"payoff": [["a", 2], [3, 4]]}, "payoff", "N levels of lists of A numbers"),
        ({"game": "climbing", "n_agents": 3}, "n_agents", "the payoff table has 2, not 3"),
        ({"payoff": [[1, 2], [3, 4]], "n_actions": 5}, "n_actions", "the payoff table has 2, not 5"),
        ({"game": "chess"}, "game", "cooperation or climbing"),
    ],
)
def test_tables_that_do_not_fit_are_refused(options: Any, option: str, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        MatrixGameEnvironment(RUNTIME, **options)
    assert caught.value.option == option


@pytest.mark.parametrize("action", [torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)])
def test_actions_of_a_wrong_shape_or_type_are_refused(action: torch.Tensor) -> None:
    with pytest.raises(MarlkitError, match=r"whole numbers \[B, N\] = \[4, 2\]"):
        MatrixGameEnvironment(RUNTIME, num_envs=4).step(action)
