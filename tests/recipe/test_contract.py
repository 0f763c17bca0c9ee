"""Conditions of contracts: read in one place, for all who decide, explain or meet them."""

from __future__ import annotations

import pytest

from marlkit.contract import Condition, Contract, When


def test_a_condition_tells_its_parts() -> None:
    assert When("share=none & discrete", ()).parts == (Condition("share", "none"), Condition("discrete"))
    assert [str(part) for part in When("rate=0.5&  continuous", ()).parts] == ["rate=0.5", "continuous"]
    assert When("name=a=b", ()).parts == (Condition("name", "a=b"),)
    assert When("name=", ()).parts == (Condition("name", ""),)


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
    ],
)
def test_all_parts_of_a_condition_must_hold(condition: str, holds: bool) -> None:
    options, environment = {"shared": True, "limit": None, "rate": 0.5}, {"discrete"}
    assert When(condition, ("entry",)).holds(options, environment) is holds
    resolved = Contract(traits=("always", When(condition, ("entry",)))).resolve("traits", options, environment)
    assert resolved == (("always", "entry") if holds else ("always",))
