"""A trained policy in an environment that was changed since, with more or fewer agents among others."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vmas")

import torch
from small_runs import small

import marlkit
from marlkit import run
from marlkit.cli.main import main
from marlkit.errors import RecipeError
from marlkit.recipe import load_recipe
from marlkit.spec import Continuous, Discrete, TeamSpec

TEAM = ["env.scenario=navigation", "env.scenario_options={n_agents: 3}", "trainer.iterations=1", "trainer.compile=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose agents share all parameters and have no identities."""
    recipe = load_recipe("ippo", small("ippo", *TEAM, "actor.agent_id=false", "critic.agent_id=false"))
    return run.train(recipe, tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture(scope="module")
def told_apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose agents have identities."""
    return run.train(load_recipe("ippo", small("ippo", *TEAM)), tmp_path_factory.mktemp("runs"), progress=False)


def test_a_policy_without_identities_plays_in_a_team_of_another_size(folder: Path) -> None:
    for n_agents in (1, 6):
        found = run.evaluate(folder, overrides=[f"env.scenario_options.n_agents={n_agents}"])
        assert sum("agent_return" in name for name in found) in (0, n_agents)
    assert run.evaluate(folder, overrides=["env.max_steps=5"])["evaluation/length"] == 5
    assert run.evaluate(folder)["evaluation/length"] == 8
    assert run.evaluate(folder, overrides=["env.scenario_options.n_agents=3"]) == run.evaluate(folder)


def test_it_acts_alike_for_each_agent_of_a_team_of_any_size(folder: Path) -> None:
    three, five = marlkit.load_policy(folder), marlkit.load_policy(folder, n_agents=5)
    observations = torch.randn(4, 5, three.spec.observation)
    actions = five(observations)
    assert actions.shape == (4, 5, 2)
    assert torch.equal(actions[:, :3], three(observations[:, :3]))
    assert torch.equal(actions[:, 3:], three(observations[:, 2:])[:, 1:])


def test_the_command_takes_changes_of_the_environment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(folder), "env.scenario_options.n_agents=2", "--episodes", "3"]) == 0
    assert "evaluation/return" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("y", "`y`: has no value"),
        ("seed=3", "seed: cannot be changed in a trained run"),
        ("actor.hidden=[8]", "actor.hidden: cannot be changed in a trained run"),
        ("env.num_envs=3", "--episodes"),
        ("env.scenario_options.n_agent=2", "Did you mean `n_agents`"),
        (
            "env.scenario=balance",
            "its agents have observations of length 16 and 2 dimensions of actions, those that were trained",
        ),
        ("env.continuous_actions=false", "9 actions, those that were trained .* 2 dimensions"),
    ],
)
def test_other_changes_are_refused(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run.evaluate(folder, overrides=[override])


def test_a_policy_that_depends_on_the_number_of_agents_is_refused(told_apart: Path) -> None:
    remedy = "trained for 3 agents, here are 4 .*Train it with actor.share=all actor.agent_id=false"
    with pytest.raises(RecipeError, match=remedy):
        run.evaluate(told_apart, overrides=["env.scenario_options.n_agents=4"])
    with pytest.raises(RecipeError, match=remedy):
        marlkit.load_policy(told_apart, n_agents=4)


def test_a_team_is_resized_where_its_agents_are_alike() -> None:
    bounds = ((-1.0, -2.0),) * 2, ((1.0, 2.0),) * 2
    team = TeamSpec(2, 3, Continuous(2, *bounds), names=("a", "b"), observation_sizes=(3, 3), action_sizes=(2, 2))
    larger = team.resized(3)
    assert larger.action == Continuous(2, ((-1.0, -2.0),) * 3, ((1.0, 2.0),) * 3)
    assert (larger.n_agents, larger.agent_names, larger.own_observation_sizes) == (3, ("agent_0", "agent_1", "agent_2"), (3,) * 3)
    for unlike in (
        TeamSpec(2, 3, Discrete(2), action_sizes=(1, 2)),
        TeamSpec(2, 3, Discrete(2), observation_sizes=(3, 2)),
        TeamSpec(2, 3, Discrete(2), groups=("wolves", "sheep")),
        TeamSpec(2, 3, Continuous(1, ((0.0,), (-1.0,)))),
    ):
        with pytest.raises(ValueError, match="differ"):
            unlike.resized(3)
    with pytest.raises(ValueError, match="at least one"):
        team.resized(0)
