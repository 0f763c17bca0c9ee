"""What is known of the scenarios without importing torch or VMAS agrees with what VMAS itself says."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import Any

import pytest

pytest.importorskip("vmas")

import vmas
from vmas.scenarios import load

from marlkit.envs._vmas import scenarios
from marlkit.envs._vmas.agents import groups_of
from marlkit.envs._vmas.scenario_source import Options
from marlkit.errors import ComponentError


def options_of(name: str) -> Options:
    found = scenarios.scenario_options(name)
    assert found is not None, "the source of every scenario of VMAS tells its options"
    return found


def test_the_names_are_those_that_vmas_lists() -> None:
    listed = [
        *vmas.scenarios,
        *(f"mpe/{name}" for name in vmas.mpe_scenarios),
        *(f"debug/{name}" for name in vmas.debug_scenarios),
    ]
    assert list(scenarios.scenario_files()) == sorted(listed)
    assert scenarios.scenario_names() == [*sorted(listed), *scenarios.shipped_scenarios()]


@pytest.mark.parametrize(
    ("name", "full"), [("balance", "balance"), ("simple_tag", "mpe/simple_tag"), ("mpe/simple_tag", "mpe/simple_tag")]
)
def test_a_scenario_may_be_called_without_its_folder(name: str, full: str) -> None:
    assert scenarios.full_name(name) == full
    assert scenarios.full_name("folder/balance") is None


def test_options_are_those_that_the_scenario_reads() -> None:
    assert options_of("balance").used == {"n_agents", "package_mass", "random_package_pos_on_line"}
    assert options_of("mpe/simple") == Options(frozenset())
    with pytest.raises(ComponentError, match="no scenario `nowhere`"):
        scenarios.scenario_options("nowhere")


@pytest.mark.parametrize("name", scenarios.scenario_files())
def test_every_textual_use_of_the_arguments_is_found(name: str) -> None:
    lines = scenarios.scenario_files()[name].read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    found = options_of(name)
    assert found.used | found.ignored == set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', text))
    assert found.ignored == ({"n_agents"} if name == "multi_give_way" else set())


def test_vmas_accepts_what_was_found_and_warns_of_anything_else() -> None:
    options = dict.fromkeys(options_of("balance").used, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vmas.make_env("balance", num_envs=1, **options)
        with pytest.raises(UserWarning, match="n_agent"):
            vmas.make_env("balance", num_envs=1, n_agent=3)


def test_problems_are_found_before_anything_is_built() -> None:
    def problems(**options: Any) -> list[tuple[str, str]]:
        return list(scenarios.check({"scenario_options": None, **options}))

    assert problems(scenario="balance", scenario_options={"n_agents": 3}) == []
    [(option, message)] = problems(scenario="navigatoin")
    assert option == "scenario"
    assert "Did you mean `navigation`?" in message
    [(option, message)] = problems(scenario="simple_tag", scenario_options={"num_adversary": 3, "bound": 1.0})
    assert option == "scenario_options.num_adversary"
    assert "Did you mean `num_adversaries`?" in message
    assert "It has no options" in problems(scenario="simple", scenario_options={"x": 1})[0][1]


def test_what_the_source_says_of_opposed_agents_is_what_vmas_marks() -> None:
    opposed = {name for name in scenarios.scenario_names() if scenarios.traits({"scenario": name})}
    assert opposed == {f"mpe/simple_{name}" for name in ("adversary", "crypto", "push", "tag", "world_comm")}
    for name in opposed:
        agents = vmas.make_env(name.rpartition("/")[2], num_envs=1).agents
        assert {agent.adversary for agent in agents} == {True, False}


@pytest.mark.parametrize("name", sorted(set(scenarios.scenario_files()) - {"road_traffic", "debug/pollock", "sampling"}))
def test_groups_of_a_built_scenario_are_those_of_its_source(name: str) -> None:
    for options in (
        ({"ai_red_agents": False}, {"ai_red_agents": False, "ai_blue_agents": True}, {}) if name == "football" else ({},)
    ):
        made = load(str(scenarios.scenario_files()[name])).Scenario()
        made.env_make_world(1, "cpu", **options)
        groups = groups_of(made, made.world.policy_agents)
        assert (("opposing",) if groups else ()) == scenarios.traits({"scenario": name, "scenario_options": options})


def test_without_vmas_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "scenario_folder", lambda: None)
    [(option, message)] = scenarios.check({"scenario": "balance"})
    assert option == "type"
    assert "pip install marlkit[vmas]" in message


def test_neither_torch_nor_vmas_is_imported() -> None:
    code = (
        "import sys; from marlkit.envs import _factory; from marlkit.envs._vmas import scenarios; "
        "section = {'scenario': 'simple_tag', 'scenario_options': {'bound': 2}}; list(scenarios.check(section)); "
        "assert scenarios.traits(section) == ('opposing',) and 'bound' in scenarios.held_options(section); "
        "list(_factory.check({'factory': 'a.b'})); "
        "print(sorted({'torch', 'vmas', 'torchrl'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
