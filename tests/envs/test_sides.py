"""One group of agents is trained, the others are a part of its environment."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vmas")

from players import flee
from small_runs import KilledError, killed_at, small, without_times

from marlkit import rng, run
from marlkit.component import Actor, Runtime
from marlkit.envs.vmas import VmasEnvironment
from marlkit.errors import MarlkitError, OptionError, RecipeError, TrustError
from marlkit.recipe import load_recipe
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import check_environment
from marlkit.training.assembly import build_environment

CPU = torch.device("cpu")
TAG: dict[str, Any] = {"scenario": "simple_tag", "scenario_options": {"num_adversaries": 2}}


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with rng.isolated(0):
        yield


def create(runtime: Runtime | None = None, **options: Any) -> VmasEnvironment:
    return VmasEnvironment(runtime or Runtime(CPU, 5), **{"num_envs": 3, "max_steps": 4, **TAG, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"train": "adversaries"},
        {"train": "good_agents", "against": "players.flee", "continuous_actions": False},
        {"train": "red", "scenario": "football", "scenario_options": {"ai_red_agents": False, "n_blue_agents": 2}},
    ],
    ids=["continuous", "discrete", "football"],
)
def test_rules_of_environments(options: dict[str, Any]) -> None:
    check_environment(partial(create, **options), steps=6)


def test_the_team_is_the_group_alone() -> None:
    everyone, team = create(), create(train="adversaries", reward="sum")
    assert everyone.spec.groups == ("adversaries", "adversaries", "good_agents")
    assert everyone.spec.own_observation_sizes == (14, 14, 12)
    assert (team.spec.agent_names, team.spec.groups, team.spec.observation) == (("adversary_0", "adversary_1"), None, 14)
    assert team.traits == {"continuous", "team_reward"}
    assert create(train="good_agents").spec.observation == 12
    current = team.reset()
    assert current["agents", "observation"].shape == (3, 2, 14)
    assert current["state"].shape == (3, 28)


@pytest.mark.parametrize("continuous", [True, False])
def test_a_step_is_that_of_all_agents_with_the_players_actions(continuous: bool) -> None:
    everyone = create(continuous_actions=continuous)
    team = create(train="adversaries", against="players.flee", continuous_actions=continuous)
    with rng.isolated(1):
        seen = everyone.reset()["agents", "observation"]
    with rng.isolated(1):
        assert torch.equal(team.reset()["agents", "observation"], seen[:, :2])
    size = everyone.spec.action_features
    alone = TeamSpec(1, 12, Continuous(size) if continuous else Discrete(size))
    for step in range(10):
        action = torch.rand(3, 2, size) if continuous else torch.randint(size, (3, 2))
        with rng.isolated(step):
            joint = torch.cat([action, flee(seen[:, 2:, :12], alone)], 1)
            arrived, current = everyone.step(joint)
        with rng.isolated(step):
            ours, _ = team.step(action)
        assert torch.equal(ours["agents", "reward"], arrived["agents", "reward"][:, :2])
        assert torch.equal(ours["agents", "observation"], arrived["agents", "observation"][:, :2])
        seen = current["agents", "observation"]


def test_a_random_player_keeps_within_what_each_agent_has() -> None:
    team = create(train="adversaries", scenario="simple_world_comm", scenario_options={}, continuous_actions=False, num_envs=200)
    assert team._sides is not None
    player, others = team._sides.player, team.simulation.action_sizes[-2:]
    drawn = player.act(torch.zeros(200, 2, 4), torch.ones(200, 1, dtype=torch.bool))
    assert [set(column.tolist()) for column in drawn.t()] == [set(range(size)) for size in others]


# --- a run as the opponent ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which both groups were trained together, with memory."""
    changes = ["env.scenario=simple_tag", "env.scenario_options={num_adversaries: 2}", "env.reward=individual", "actor.body=gru"]
    changes += [
        "actor.output_gain=3.0",
        "actor.sequence_length=5",
        "trainer.iterations=1",
        "trainer.monitor=evaluation/group_return/adversaries",
    ]
    recipe = load_recipe("ippo", small("ippo", *changes, "trainer.compile=none"))
    return run.train(recipe, tmp_path_factory.mktemp("runs"), progress=False)


def with_run(folder: Path, seed: int = 5, **options: Any) -> VmasEnvironment:
    def load(named: str) -> Actor:
        return run.load_policy(named).actor

    return create(Runtime(CPU, seed, load_actor=load), train="adversaries", against=str(folder), **options)


def test_the_policy_of_a_run_plays_on_what_its_agents_see_and_remembers(former: Path) -> None:
    team = with_run(former)
    policy = run.load_policy(former)
    player: Any = team._sides.player  # type: ignore[union-attr]
    player._samples = False
    first = torch.ones(3, 1, dtype=torch.bool)
    for step in range(3):
        observation = torch.randn(3, 1, 12)
        seen = torch.zeros(3, 3, 14)
        seen[:, 2:, :12] = observation
        assert torch.equal(player.act(observation, first).clamp(-1, 1), policy(seen)[:, 2:])
        first = torch.zeros_like(first)
        assert step or len(player._carried) == 1


def test_rules_of_environments_with_a_run(former: Path) -> None:
    check_environment(lambda runtime: with_run(former, seed=runtime.seed), steps=5)  # saved within an episode


def test_a_run_against_a_run_is_resumed_exactly(former: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["env.scenario=simple_tag", "env.scenario_options={num_adversaries: 2}", "env.train=adversaries"]
    changes += [f"env.against={former}", "env.reward=sum", "trainer.compile=none", "trainer.iterations=2"]
    recipe = load_recipe("mappo", small("mappo", *changes))
    folder = run.train(recipe, tmp_path, progress=False)
    metrics = without_times(folder)
    assert "evaluation/return" in metrics
    assert not any("good_agent" in name for name in metrics)
    killed_at(1, monkeypatch)
    with pytest.raises(KilledError):
        run.train(recipe, tmp_path / "killed", progress=False)
    monkeypatch.undo()
    (killed,) = (tmp_path / "killed" / "mappo").iterdir()
    assert without_times(run.resume(killed, progress=False)) == metrics


def test_a_policy_that_has_changed_since_is_refused(former: Path) -> None:
    team = with_run(former)
    team.reset()
    saved = team.state_dict()
    other = with_run(former)
    player: Any = other._sides.player  # type: ignore[union-attr]
    next(player._actor.parameters()).data.add_(1)
    with pytest.raises(MarlkitError, match="another one than when this training began"):
        other.load_state_dict(saved)


def test_no_strangers_code_runs_for_an_opponent(former: Path, tmp_path: Path) -> None:
    stranger, ran = tmp_path / "runs" / "stranger", tmp_path / "ran"
    shutil.copytree(former, stranger)
    actor = "from pathlib import Path\nfrom marlkit.actors.stochastic import StochasticActor\n"
    actor += f"Path({str(ran)!r}).touch()\n\n\nclass Mine(StochasticActor):\n    pass\n"
    (stranger / "strange_actor.py").write_text(actor, encoding="utf-8")

    def renamed(text: str) -> str:
        return text.replace("type: stochastic", "type: strange_actor.Mine", 1)

    (stranger / "recipe.yaml").write_text(renamed((former / "recipe.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    for path in (stranger / "checkpoints").iterdir():
        saved = torch.load(path, weights_only=True)
        saved["marlkit"]["recipe"] = renamed(saved["marlkit"]["recipe"])
        torch.save(saved, path)
    changes = [f"env.against={stranger}", "env.scenario=simple_tag", "env.train=adversaries"]
    recipe = load_recipe("ippo", [*changes, "env.scenario_options={num_adversaries: 2}"])
    with pytest.raises(TrustError, match=r"strange_actor\.Mine"):
        build_environment(recipe, CPU, 0)
    assert not ran.exists()
    build_environment(dataclasses.replace(recipe, trust=True), CPU, 0)
    assert ran.exists()


# --- what does not fit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "adversary"}, "no group `adversary`.*Did you mean `adversaries`.*It has: adversaries, good_agents"),
        ({"train": "x", "scenario": "balance", "scenario_options": {}}, "share one aim: leave it out"),
        ({"train": "adversaries", "against": "runs/nowhere"}, "no player, nor a run folder here"),
        ({"train": "adversaries", "against": "players.nobody"}, "cannot be imported"),
        ({"train": "adversaries", "against": "players.NOTHING"}, "must be a function"),
        ({"against": "players.flee"}, "set `train` to the group"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        create(**options)


def test_a_script_that_returns_something_else_is_named() -> None:
    team = create(train="adversaries", against="players.dozing")
    team.reset()
    with pytest.raises(MarlkitError, match=r"`players.dozing` must return floating-point numbers \[B, M, D\] = \[3, 1, 2\]"):
        team.step(torch.zeros(3, 2, 2))


def test_a_run_of_other_agents_is_refused(former: Path) -> None:
    with pytest.raises(OptionError, match="does not play `adversary_2`; it was trained for adversary_0, adversary_1, agent_0"):
        create(
            Runtime(CPU, 5, load_actor=lambda named: run.load_policy(named).actor),
            **{"train": "good_agents", "against": str(former), "scenario_options": {"num_adversaries": 3}},
        )
    with pytest.raises(OptionError, match="other observations or actions"):
        with_run(former, continuous_actions=False)
    together = run.load_policy(former).actor
    vars(together)["traits"] = frozenset({"centralised_execution"})
    with pytest.raises(OptionError, match="acts for all agents together"):
        create(Runtime(CPU, 5, load_actor=lambda _: together), train="adversaries", against=str(former))
    with pytest.raises(OptionError, match="only where a recipe names it"):
        create(train="adversaries", against=str(former))


def test_one_group_of_opposed_agents_is_a_team_to_a_recipe() -> None:
    changes = ["env.scenario=simple_tag", "env.train=adversaries"]
    assert load_recipe("happo", changes).config.env.reward != "individual"
    with pytest.raises(RecipeError, match="are opposed to each other"):
        load_recipe("happo", changes[:1])
    with pytest.raises(RecipeError, match=r"env.against: `runs/nowhere` is no player"):
        load_recipe("ippo", [*changes, "env.against=runs/nowhere"])
    with pytest.raises(RecipeError, match=r"env.against: has no effect"):
        load_recipe("ippo", ["env.scenario=simple_tag", "env.against=players.flee"])


def test_parts_of_a_team() -> None:
    bounds = ((-1.0, -2.0), (-3.0, 0.0), (-1.0, -1.0)), ((1.0, 2.0), (3.0, 0.0), (1.0, 1.0))
    team = TeamSpec(
        3, 5, Continuous(2, *bounds), observation_sizes=(5, 3, 4), action_sizes=(2, 1, 1), groups=("a", "b", "b"), horizon=7
    )
    part = team.part([1, 2])
    assert part == TeamSpec(
        *(2, 4, Continuous(1, ((-3.0,), (-1.0,)), ((3.0,), (1.0,)))),
        horizon=7,
        names=("agent_1", "agent_2"),
        observation_sizes=(3, 4),
        action_sizes=(1, 1),
    )
    assert team.part([0, 1]).groups == ("a", "b")
