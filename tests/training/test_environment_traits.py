"""What the contract of an environment says is compared with the environment that is built, and with what it pays."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marlkit import keys
from marlkit.component import Actor, Runtime
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.errors import MarlkitError, RecipeError
from marlkit.recipe import Recipe, load_recipe
from marlkit.spec import Discrete, TeamSpec
from marlkit.training.assembly import build_environment
from marlkit.training.dry_run import dry_run
from marlkit.training.evaluation import play_episodes

OWN = """
import torch
from marlkit.contract import Contract
from marlkit.envs._adapter import WRITES, Outcome
from marlkit.envs.one_step import OneStepGame
from marlkit.spec import Continuous, Discrete, TeamSpec

class OwnEnvironment(OneStepGame):
    contract = Contract(writes=WRITES, traits=({traits}))

    def __init__(self, runtime, *, num_envs: int = 4):
        super().__init__(runtime, TeamSpec(2, 1, {spec}), num_envs)

    def payoff(self, action):
        return action.reshape(self.num_envs, -1).float().sum(1)

    def simulate(self, action):
        outcome = super().simulate(action)
        return outcome._replace(reward=outcome.reward + torch.tensor([[0.0], [{more}]]))
"""

TEAM = """
env: {{type: {module}.OwnEnvironment, num_envs: 4}}
actor: {{type: stochastic, hidden: [4], share: none}}
critic: {{type: centralised, hidden: [4]}}
data: {{type: rollout, steps: 6}}
estimator: gae
update: {update}
"""
STEP = "{type: ppo_clip, epochs: 1, minibatch_size: 12}"
SEQUENTIAL = f"{{type: sequential, step: {STEP}}}"
_numbers = itertools.count()


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes an environment and a recipe, and reads the recipe."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def read(traits: str, spec: str, *, more: float = 0.0, update: str = SEQUENTIAL) -> Recipe:
        module = f"own_environment_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(OWN.format(traits=traits, spec=spec, more=more), encoding="utf-8")
        file = tmp_path / "team.yaml"
        file.write_text(TEAM.format(module=module, update=update), encoding="utf-8")
        return load_recipe(file, trust=True)

    return read


def refusal(recipe: Recipe) -> str:
    with pytest.raises(MarlkitError) as caught:
        dry_run(recipe)
    return str(caught.value)


def test_an_environment_that_is_as_it_says_passes(team: Any) -> None:
    dry_run(team("'discrete', 'team_reward'", "Discrete(2), team_reward=True"))
    dry_run(team("", "Discrete(2), team_reward=True"))
    dry_run(team("'discrete', 'opposing'", "Discrete(2), groups=('a', 'b')", more=-1.0, update=STEP))
    dry_run(team("", "Continuous(1), groups=('a', 'b')", more=-1.0, update=STEP))


@pytest.mark.parametrize(
    ("traits", "spec", "trait"),
    [
        ("'discrete', 'team_reward'", "Discrete(2)", "team_reward"),
        ("'team_reward',", "Discrete(2)", "team_reward"),
        ("'continuous', 'team_reward'", "Discrete(2), team_reward=True", "continuous"),
        ("'discrete', 'team_reward'", "Continuous(1), team_reward=True", "discrete"),
        ("'discrete', 'opposing'", "Discrete(2)", "opposing"),
        ("'discrete', 'opposing'", "Discrete(2), groups=('a', 'a')", "opposing"),
    ],
)
def test_a_trait_that_the_built_environment_lacks_is_refused_by_name(team: Any, traits: str, spec: str, trait: str) -> None:
    message = refusal(team(traits, spec, update=SEQUENTIAL if "team_reward" in traits else STEP))
    if trait in ("discrete", "continuous"):
        assert f"env (OwnEnvironment) has actions that are {'discrete' if trait == 'continuous' else 'continuous'}" in message
        assert f"and the trait `{trait}`. Rule `spec`" in message
    else:
        assert f"`OwnEnvironment` declares the trait `{trait}`, which its team spec lacks" in message
    assert "team.yaml:2: env.type" in message


def test_what_the_source_does_not_tell_is_checked_when_it_is_built(team: Any) -> None:
    message = refusal(team("'discrete',", "Discrete(2)"))
    assert "`sequential` needs the trait `team_reward`, which env" in message
    opposed = refusal(team("'discrete',", "Discrete(2), groups=('a', 'b')", more=-1.0))
    assert "`sequential` cannot train opponents: set update=ppo_clip" in opposed


def test_a_contract_cannot_have_opponents_and_one_reward(team: Any) -> None:
    with pytest.raises(RecipeError, match="opposed to each other"):
        team("'discrete', 'opposing', 'team_reward'", "Discrete(2)")
    with pytest.raises(ValueError, match="cannot all receive the same reward: a, b"):
        TeamSpec(2, 1, Discrete(2), team_reward=True, groups=("a", "b"))
    with pytest.raises(ValueError, match="a group for each of the 2 agents"):
        TeamSpec(2, 1, Discrete(2), groups=("a",))


def test_unequal_rewards_are_found_by_the_dry_run(team: Any) -> None:
    message = refusal(team("'discrete', 'team_reward'", "Discrete(2), team_reward=True", more=0.5))
    assert "env (OwnEnvironment) says `team_reward` and pays its agents differently" in message


class FirstMove(Actor):
    """Always the first move."""

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec

    def distribution(self, batch: Any, agents: Any = None) -> Any:
        raise NotImplementedError

    def forward(self, batch: Any, deterministic: bool = False) -> Any:
        return batch.set(keys.ACTION, torch.zeros(*batch.batch_size, self.spec.n_agents, dtype=torch.int64))


def test_unequal_rewards_are_found_by_evaluations() -> None:
    class Sometimes(MatrixGameEnvironment):
        def simulate(self, action: Any) -> Any:
            outcome = super().simulate(action)
            return outcome._replace(reward=outcome.reward + torch.tensor([[0.0], [0.25]]))

    env = Sometimes(Runtime(torch.device("cpu"), seed=0), num_envs=2)
    with pytest.raises(MarlkitError, match=r"paid one of them 0\.25 more or less"):
        play_episodes(env, FirstMove(env.spec), seed=0, steps=1)


def test_the_traits_of_a_built_environment_are_those_of_its_team(team: Any) -> None:
    env = build_environment(team("", "Discrete(2), groups=('a', 'b')", update=STEP), torch.device("cpu"), 0)
    assert env.traits == {"discrete", "opposing"}
    assert env.spec.members == {"a": (0,), "b": (1,)}
    assert TeamSpec.from_dict(env.spec.as_dict()) == env.spec
