"""Returns are told per agent, and per group where agents are opposed: nobody seeks the mean over enemies."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from marlkit import keys
from marlkit.spec import Discrete, TeamSpec
from marlkit.training.episode_returns import EpisodeReturns
from marlkit.training.evaluation import Episodes
from marlkit.training.returns import return_names

OPPOSED = TeamSpec(3, 2, Discrete(2), names=("wolf_0", "wolf_1", "sheep"), groups=("wolves", "wolves", "prey"))
OWN = TeamSpec(2, 2, Discrete(2))
ONE_REWARD = TeamSpec(2, 2, Discrete(2), team_reward=True)


def rollout(spec: TeamSpec, rewards: list[list[list[float]]], done: list[list[bool]]) -> TensorDict:
    """Rewards ``[B][T][N]`` and ends ``[B][T]``."""
    batch = TensorDict({}, batch_size=[len(done), len(done[0])])
    batch.set(keys.REWARD, torch.tensor(rewards).unsqueeze(-1))
    return batch.set(keys.DONE, torch.tensor(done).unsqueeze(-1))


FIRST = rollout(
    OPPOSED, [[[1.0, 3.0, -2.0], [1.0, 1.0, -4.0]], [[0.0, 8.0, 1.0], [0.5, 0.5, 0.5]]], [[False, True], [True, False]]
)
SECOND = rollout(
    OPPOSED, [[[1.0, 1.0, 1.0], [2.0, 4.0, -9.0]], [[0.5, 1.5, 2.5], [7.0, 7.0, 7.0]]], [[False, False], [True, False]]
)


def test_returns_of_opposed_agents_by_hand() -> None:
    returns = EpisodeReturns(OPPOSED)
    # Episodes: (2, 4, -6) and (0, 8, 1); then (1, 2, 3), which began in the first rollout.
    assert returns.take(FIRST) == {
        "episode/count": 2.0,
        "episode/length": 1.5,
        "episode/group_return/wolves": 3.5,
        "episode/group_return/prey": -2.5,
        "episode/agent_return/wolf_0": 1.0,
        "episode/agent_return/wolf_1": 6.0,
        "episode/agent_return/sheep": -2.5,
    }
    saved = returns.state_dict()
    returns = EpisodeReturns(OPPOSED)
    returns.load_state_dict(saved)
    assert returns.take(SECOND) == {
        "episode/count": 1.0,
        "episode/length": 2.0,
        "episode/group_return/wolves": 1.5,
        "episode/group_return/prey": 3.0,
        "episode/agent_return/wolf_0": 1.0,
        "episode/agent_return/wolf_1": 2.0,
        "episode/agent_return/sheep": 3.0,
    }


def test_a_team_has_its_mean_and_each_agents_own() -> None:
    batch = rollout(OWN, [[[1.0, 3.0], [1.0, 2.0]]], [[False, True]])
    logged = EpisodeReturns(OWN).take(batch)
    assert {name: value for name, value in logged.items() if "return" in name} == {
        "episode/return": 3.5,
        "episode/agent_return/agent_0": 2.0,
        "episode/agent_return/agent_1": 5.0,
    }
    assert logged["episode/reward"] == 1.75
    for spec in (ONE_REWARD, None, TeamSpec(1, 2, Discrete(2))):
        taken = EpisodeReturns(spec).take(batch)
        assert {name for name in taken if "return" in name} == {"episode/return"}
        assert taken["episode/return"] == 3.5


def test_names_of_metrics_are_words() -> None:
    spec = TeamSpec(2, 2, Discrete(2), names=("agent 0", "agent 1"), groups=("the one", "the other"))
    assert return_names("episode", spec) == [
        *("episode/group_return/the_one", "episode/group_return/the_other"),
        *("episode/agent_return/agent_0", "episode/agent_return/agent_1"),
    ]
    assert EpisodeReturns(spec).take(rollout(spec, [[[1.0, 3.0]]], [[True]])).keys() >= set(return_names("episode", spec))


def test_the_mean_is_bit_for_bit_what_it_is_without_the_agents() -> None:
    torch.manual_seed(0)
    batch = rollout(OWN, torch.randn(33, 7, 2).tolist(), (torch.rand(33, 7) < 0.3).tolist())
    with_agents, without = EpisodeReturns(OWN).take(batch), EpisodeReturns().take(batch)
    assert without.items() <= with_agents.items()


def test_a_state_without_agents_leaves_out_the_episodes_that_were_running() -> None:
    returns = EpisodeReturns(OWN)
    returns.load_state_dict({"running": torch.tensor([1.0]), "steps": torch.tensor([1.0])})
    ended = rollout(OWN, [[[1.0, 3.0]]], [[True]])
    assert returns.take(ended) == {"episode/count": 1.0, "episode/reward": 2.0, "episode/return": 3.0, "episode/length": 2.0}
    assert returns.take(ended)["episode/agent_return/agent_1"] == 3.0


@pytest.mark.parametrize("spec", [OPPOSED, OWN, ONE_REWARD], ids=["opposed", "own", "one reward"])
def test_an_evaluation_tells_the_same(spec: TeamSpec) -> None:
    each = torch.tensor([[1.0, 3.0, -2.0], [3.0, 5.0, -8.0]])[:, : spec.n_agents]
    episodes = Episodes(each.mean(1), torch.tensor([2, 4]), torch.tensor([True, False]), each, spec)
    found = episodes.summary()
    assert set(return_names("evaluation", spec)) <= set(found)
    assert (found["evaluation/length"], found["evaluation/terminated"]) == (3.0, 0.5)
    if spec is OPPOSED:
        assert "evaluation/return" not in found
        assert (found["evaluation/group_return/wolves"], found["evaluation/group_return/prey"]) == (3.0, -5.0)
        assert (found["evaluation/group_return_std/wolves"], found["evaluation/group_return_std/prey"]) == (1.0, 3.0)
        assert found["evaluation/agent_return/wolf_1"] == 4.0
    else:
        assert (found["evaluation/return"], found["evaluation/return_std"]) == (3.0, 1.0)
        assert ("evaluation/agent_return/agent_0" in found) == (spec is OWN)
