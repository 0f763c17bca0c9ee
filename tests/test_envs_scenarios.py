"""What is known of the scenarios without importing torch or VMAS agrees with what VMAS itself says."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest

vmas = pytest.importorskip("vmas")

from marlkit.envs import scenarios


def test_the_names_are_those_that_vmas_lists() -> None:
    listed = [*vmas.scenarios, *(f"mpe/{name}" for name in vmas.mpe_scenarios), *(f"debug/{name}" for name in vmas.debug_scenarios)]
    assert scenarios.scenario_names() == sorted(listed)


@pytest.mark.parametrize(("name", "full"), [("balance", "balance"), ("simple_tag", "mpe/simple_tag"), ("mpe/simple_tag", "mpe/simple_tag")])
def test_a_scenario_may_be_called_without_its_folder(name: str, full: str) -> None:
    assert scenarios.full_name(name) == full
    assert scenarios.full_name("folder/balance") is None


def test_options_are_those_that_the_scenario_reads() -> None:
    assert scenarios.scenario_option_names("balance") == {"n_agents", "package_mass", "random_package_pos_on_line"}
    assert scenarios.scenario_option_names("mpe/simple") == set()
    with pytest.raises(KeyError):
        scenarios.scenario_option_names("nowhere")


class Recorder(dict[str, Any]):
    """Keyword arguments that note which of them are asked for; every one has its default."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def pop(self, key: str, *default: Any) -> Any:
        self.asked.add(key)
        return default[0]

    get = pop


@pytest.mark.parametrize("name", scenarios.scenario_names())
def test_what_a_scenario_asks_its_arguments_for_was_found_in_its_source(name: str) -> None:
    """The scenario's own `make_world` runs with arguments that note what it asks for."""
    module = load(str(scenarios.scenario_files()[name]))
    recorder = Recorder()
    # `**kwargs` makes a plain dict, so the code of the methods that take it is run with the recorder in its place.
    for method in vars(module.Scenario).values():
        code = getattr(method, "__code__", None)
        if code is not None and "kwargs" in code.co_varnames[code.co_argcount :]:
            recorder.asked |= {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    assert scenarios.scenario_option_names(name) <= recorder.asked


def test_problems_are_found_before_anything_is_built() -> None:
    def problems(**options: Any) -> list[tuple[str, str]]:
        return list(scenarios.check({"scenario_options": None, **options}))

    assert problems(scenario="balance", scenario_options={"n_agents": 3}) == []
    assert problems(scenario="my_package.my_scenario.Scenario", scenario_options={"anything": 1}) == []
    [(option, message)] = problems(scenario="navigatoin")
    assert option == "scenario"
    assert "Did you mean `navigation`?" in message
    [(option, message)] = problems(scenario="simple_tag", scenario_options={"num_adversary": 3, "bound": 1.0})
    assert option == "scenario_options.num_adversary"
    assert "Did you mean `num_adversaries`?" in message
    assert "It has no options" in problems(scenario="simple", scenario_options={"x": 1})[0][1]


def test_without_vmas_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "scenario_folder", lambda: None)
    [(option, message)] = scenarios.check({"scenario": "balance"})
    assert option == "type"
    assert "pip install marlkit[vmas]" in message


def test_neither_torch_nor_vmas_is_imported() -> None:
    code = (
        "import sys; from marlkit.envs import scenarios, installed; "
        "list(scenarios.check({'scenario': 'balance', 'scenario_options': {'n_agents': 2}})); "
        "list(installed.check_torchrl({'factory': 'a.b'})); "
        "print(sorted({'torch', 'vmas', 'torchrl'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
