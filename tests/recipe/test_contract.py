"""Conditions of contracts: read in one place, for all who decide, explain or meet them."""

from __future__ import annotations

import pytest

from marlkit.contract import Condition, Contract, When


def test_a_condition_tells_its_parts() -> None:
    assert When("share=none & discrete", ()).parts == (Condition("share", "none"), Condition("discrete"))
    assert [str(part) for part in When("rate=0.5&  continuous", ()).parts] == ["rate=0.5", "continuous"]
    assert When("name=a=b", ()).parts == (Condition("name", "a=b"),)
    assert When("name=", ()).parts == (Condition("name", ""),)
    assert When("rate!=0 & discrete", ()).parts == (Condition("rate", "0", other=True), Condition("discrete"))
    assert [str(part) for part in When("rate!=0 & discrete", ()).parts] == ["rate!=0", "discrete"]


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("discrete", True),
        ("continuous", False),
        ("shared=true", True),
        ("limit=null", True),
        ("rate=0.5", True),
        ("rate=1", False),
        ("shared=true & discrete", True),
        ("shared=true & continuous", False),
        ("absent=null", True),
        ("rate!=0.5", False),
        ("rate!=0", True),
        ("zero!=0", False),
        ("zero=0", True),
        ("shared!=false", True),
        ("shared!=1", True),
        ("limit!=null", False),
        ("absent!=null & discrete", False),
    ],
)
def test_all_parts_of_a_condition_must_hold(condition: str, holds: bool) -> None:
    options, environment = {"shared": True, "limit": None, "rate": 0.5, "zero": 0.0}, {"discrete"}
    assert When(condition, ("entry",)).holds(options, environment) is holds
    resolved = Contract(traits=("always", When(condition, ("entry",)))).resolve("traits", options, environment)
    assert resolved == (("always", "entry") if holds else ("always",))


def test_settings_are_those_with_which_a_condition_holds_or_not() -> None:
    choices = ("all", "none", list)
    equal, unequal = Condition("share", "none"), Condition("share", "none", other=True)
    assert (equal.settings(choices, hold=True), equal.settings(choices, hold=False)) == (["none"], ["all"])
    assert (unequal.settings(choices, hold=True), unequal.settings(choices, hold=False)) == (["all"], ["none"])
    assert Condition("discrete").settings((), hold=True) == []
