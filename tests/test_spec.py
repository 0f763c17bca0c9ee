"""Team specs that describe no team are refused where they are written."""

from __future__ import annotations

from typing import Any

import pytest

from marlkit.spec import Continuous, Discrete, TeamSpec


@pytest.mark.parametrize("action", [2, None, (2,), Discrete])
def test_an_action_space_is_discrete_or_continuous(action: Any) -> None:
    with pytest.raises(TypeError, match=r"`action` must be Discrete\(…\) or Continuous\(…\), got"):
        TeamSpec(3, 8, action)


@pytest.mark.parametrize("low", [-1.0, (-1.0, -1.0), ((-1.0,),) * 3, (("a",),)])
def test_bounds_are_rows_of_numbers(low: Any) -> None:
    with pytest.raises(ValueError, match="`low` must be a tuple with one tuple per agent, of 2 numbers each"):
        Continuous(2, low=low)
