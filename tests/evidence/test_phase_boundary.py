"""The boundary against enumeration of all joint moves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evidence.phase_boundary import ascend, boundary, found_boundary, reached


def advantage(agents: int, moves: int, first: float) -> float:
    """That of agent 0's first move over its second, summed over all joint moves of the others."""
    found = 0.0
    for others in itertools.product(range(moves), repeat=agents - 1):
        weight = np.prod([first if move == 0 else (1 - first) / (moves - 1) for move in others])
        found += float(weight) * (payoff((0, *others)) - payoff((1, *others)))
    return float(found)


def payoff(joint: tuple[int, ...]) -> float:
    chosen = sum(move == 0 for move in joint)
    return 8.0 if chosen == len(joint) else -12.0 if chosen else 0.0


@pytest.mark.parametrize(("agents", "moves"), [(2, 3), (2, 6), (3, 3), (4, 3)])
def test_the_advantage_changes_its_sign_at_the_boundary(agents: int, moves: int) -> None:
    at = boundary(agents)
    assert abs(advantage(agents, moves, at)) < 1e-9
    assert advantage(agents, moves, at - 0.01) < 0 < advantage(agents, moves, at + 0.01)


@pytest.mark.parametrize(("agents", "moves"), [(2, 3), (20, 15)])
def test_the_ascent_turns_at_the_boundary(agents: int, moves: int) -> None:
    assert found_boundary(agents, moves) == pytest.approx(boundary(agents), abs=0.002)


def test_policies_that_begin_nearly_uniform_reach_nothing() -> None:
    assert reached(2, 3, 1 / 3) == 0
    assert ascend(np.array([1 / 3, 1 / 3]), 3).max() < 0.01
