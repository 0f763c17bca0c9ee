"""Another scenario is one override for every recipe; where agents are opposed and a recipe pools rewards, the remedy passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("vmas")

from marlkit.envs._vmas.scenarios import scenario_names
from marlkit.errors import Problem, RecipeError
from marlkit.recipe import Recipe, load_recipe, shipped

OPPOSING = {f"mpe/simple_{name}" for name in ("adversary", "crypto", "push", "tag", "world_comm")}
"""The scenarios of VMAS whose agents do not share one aim; `football` does not with both teams controlled by policies."""


def problems(recipe: str | Path, *overrides: str) -> tuple[Problem, ...]:
    try:
        load_recipe(recipe, overrides)
    except RecipeError as error:
        return error.problems
    return ()


def settings(remedy: str) -> list[str]:
    """The overrides that a remedy names."""
    return re.findall(r"\b[\w.]+=\w+", remedy)


@pytest.mark.parametrize("recipe", shipped())
def test_every_scenario_is_one_override(recipe: str) -> None:
    env = load_recipe(recipe).config.env
    pooled = env.reward != "individual"
    own = [] if env.type == "vmas" else ["env.type=vmas"]
    # What differs between recipes are their options; every scenario is tried with each kind of them.
    for scenario in scenario_names() if recipe in ("happo", "maddpg") else ("passage", "multi_give_way", "mpe/simple_tag"):
        found = problems(recipe, *own, f"env.scenario={scenario}")
        if scenario not in OPPOSING or not pooled:
            assert not found, f"{scenario}: {found}"
            continue
        (refusal,) = found
        assert refusal.where == "env.reward"
        assert f"scenario `{scenario}` are opposed to each other" in refusal.message
        remedy = settings(refusal.remedy)
        assert "env.reward=individual" in remedy
        assert not problems(recipe, *own, f"env.scenario={scenario}", *remedy), remedy


@pytest.mark.parametrize("recipe", ["happo", "hatrpo"])
def test_individual_rewards_of_opposed_agents_do_not_lead_in_a_circle(recipe: str) -> None:
    (refusal,) = problems(recipe, "env.scenario=simple_tag", "env.reward=individual")
    assert "needs the trait `team_reward`" in refusal.message
    remedy = settings(refusal.remedy)
    assert remedy
    assert not any("env" in text for text in remedy)
    assert not problems(recipe, "env.scenario=simple_tag", "env.reward=individual", *remedy)


def test_football_is_opposed_where_policies_control_both_teams() -> None:
    football = ("env.scenario=football", "env.scenario_options={ai_red_agents: false}")
    assert not problems("coma", "env.scenario=football")
    assert [each.where for each in problems("coma", *football)] == ["env.reward"]
    assert not problems("coma", *football, "env.scenario_options.ai_blue_agents=true")
    assert not problems("coma", *football, "env.reward=individual")


# --- options of the scenario before --------------------------------------------------------------------------------------


def test_options_that_the_new_scenario_does_not_take_are_dropped_with_a_note() -> None:
    recipe = load_recipe("maddpg", ["env.scenario=flocking"])
    assert recipe.options("env")["scenario_options"] == {"n_agents": 3}
    assert recipe.notes == (
        "env.scenario: `navigation` became `flocking`, which does not take `env.scenario_options.collisions`: dropped.",
    )
    unused = load_recipe("mappo", ["env.scenario=multi_give_way"])
    assert unused.options("env")["scenario_options"] == {}, "it takes n_agents and builds four all the same"


def test_options_of_a_scenario_that_does_not_tell_its_own_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlkit.envs._vmas.scenarios.options_of", lambda cls: None)
    recipe = load_recipe("maddpg", ["env.scenario=flocking"])
    assert set(recipe.options("env")["scenario_options"]) == {"n_agents", "collisions"}
    assert recipe.notes == ()


def test_the_same_scenario_keeps_its_options() -> None:
    for scenario in ("balance", "simple_spread"):
        recipe = load_recipe("mappo", [f"env.scenario={scenario}", "env.num_envs=97"])
        assert recipe.options("env")["scenario_options"] == {"n_agents": 3}
        assert recipe.notes == ()


@pytest.mark.parametrize(
    "overrides",
    [
        ["env.scenario=passage", "env.scenario_options.n_agents=5"],
        ["env.scenario_options.n_agents=5", "env.scenario=passage"],
        ["env.scenario=passage", "env.scenario_options={n_agents: 5}"],
        ["env={scenario: passage, scenario_options: {n_agents: 5}}"],
    ],
)
def test_options_that_the_user_sets_are_refused_in_any_order(overrides: list[str]) -> None:
    (refusal,) = problems("mappo", *overrides)
    assert refusal.where == "env.scenario_options.n_agents"
    assert "scenario `passage` has no option `n_agents`" in refusal.message


def test_the_same_rule_holds_for_a_file_that_extends_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: maddpg\nenv: {scenario: passage}\n", encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.options("env")["scenario_options"] == {}
    assert "`env.scenario_options.n_agents`, `env.scenario_options.collisions`: dropped" in recipe.notes[0]
    file.write_text("extends: maddpg\nenv: {scenario: passage, scenario_options: {n_agents: 3}}\n", encoding="utf-8")
    assert [each.line for each in problems(file)] == [2]
    file.write_text("extends: maddpg\nenv: {scenario: passage, scenario_options: {n_passages: 3}}\n", encoding="utf-8")
    assert load_recipe(file, ["env.scenario=ball_passage"]).options("env")["scenario_options"] == {"n_passages": 3}


def test_a_scenario_that_is_not_there_drops_nothing() -> None:
    (refusal,) = problems("mappo", "env.scenario=pasage")
    assert "Did you mean `passage`?" in refusal.message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("env.n_agents=5", "Did you mean `env.scenario_options.n_agents`?"),
        ("env.package_mass=5", "Did you mean `env.scenario_options.package_mass`?"),
        ("env.n_agent=5", "Did you mean `env.scenario_options.n_agents`?"),
        ("env.num_env=5", "Did you mean `num_envs`?"),
    ],
)
def test_an_option_of_the_scenario_in_the_wrong_place_is_named(override: str, words: str) -> None:
    (refusal,) = problems("mappo", override)
    assert words in refusal.remedy


# --- classes of a user -----------------------------------------------------------------------------------------------------


def own(folder: Path, body: str) -> Path:
    """A recipe beside a module of scenarios."""
    (folder / "beside_scenarios.py").write_text(
        f"from vmas.simulator.core import Agent\nfrom vmas.simulator.scenario import BaseScenario\n\n{body}", encoding="utf-8"
    )
    file = folder / "mine.yaml"
    file.write_text("extends: coma\nenv: {scenario: beside_scenarios.Own}\n", encoding="utf-8")
    return file


def test_an_own_class_is_found_beside_the_recipe_and_checked(tmp_path: Path) -> None:
    make = "    def make_world(self, batch_dim, device, n_agents=2, **kwargs): Agent(name='a')\n"
    file = own(tmp_path, f"class Own(BaseScenario):\n{make}")
    recipe: Recipe = load_recipe(file)
    assert recipe.options("env")["scenario_options"] == {"n_agents": 3}
    (refusal,) = problems(file, "env.scenario_options.agents=2")
    assert "scenario `beside_scenarios.Own` has no option `agents`. Did you mean `n_agents`?" in refusal.message
    (refusal,) = problems(file, "env.scenario=beside_scenarios.Owner")
    assert (refusal.where, refusal.source) == ("env.scenario", "override `env.scenario=beside_scenarios.Owner`")
    assert "`beside_scenarios` has no class `Owner`. Did you mean `Own`?" in refusal.message


def test_an_own_class_with_adversaries_is_not_paid_one_reward(tmp_path: Path) -> None:
    make = "    def make_world(self, batch_dim, device): Agent(name='a', adversary=True)\n"
    file = own(tmp_path, f"class Own(BaseScenario):\n{make}")
    (refusal,) = problems(file)
    assert (refusal.where, refusal.remedy) == (
        "env.reward",
        "Set env.reward=individual. Or train one of the groups alone, and name it in `env.train`.",
    )
    assert not problems(file, "env.reward=individual")
