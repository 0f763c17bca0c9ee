"""Each rule of the testing kit is broken by a component with one fault, and says so."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Build

from marlkit.testing import RULES, check_component


@pytest.mark.parametrize(("rule", "build"), [pytest.param(rule, build, id=f"{rule}: {fault}") for rule, fault, build in MUTANTS])
def test_a_fault_breaks_its_rule_and_none_before_it(rule: str, build: Build) -> None:
    component = build()
    with pytest.raises(AssertionError) as caught:
        check_component(component)
    said = str(caught.value)
    assert said.startswith(type(component).__name__ + " ")
    assert f"Rule `{rule}`: " in said, said
    assert said.endswith((".", "?")), said


def test_every_rule_is_broken_by_a_fault() -> None:
    assert {rule.name for rule in RULES} == {rule for rule, _, _ in MUTANTS}
    assert len({rule.name for rule in RULES}) == len(RULES)
