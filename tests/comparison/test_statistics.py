"""Statistics of runs against hand-computed and enumerated values, and against what rliable gave.

``golden_rliable.json`` holds numbers that rliable 1.2.0 gave in an environment of its own (its versions stand in the file; beside
pandas 3 it cannot be imported), after ``numpy.random.seed(0)``: of ``get_interval_estimates`` with ``aggregate_iqm`` (10,000
resamples) and ``probability_of_improvement`` (1,000), and of ``create_performance_profile`` (2,000). The scores are of five runs
of three algorithms on two tasks, ``[runs, tasks]`` as there; ``first_task`` takes the first task alone.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marlkit.comparison.statistics import Array, align, curve, estimate, improvement, interquartile_mean, mean, profile

GOLDEN = json.loads((Path(__file__).parent / "golden_rliable.json").read_text())


def samples(name: str, part: str) -> list[Array]:
    """The scores of an algorithm: one sample per task."""
    scores = np.array(GOLDEN["scores"][name]).T
    return list(scores if part == "two_tasks" else scores[:1])


@pytest.mark.parametrize("part", ["two_tasks", "first_task"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_interquartile_mean_and_profile_are_those_of_rliable(name: str, part: str) -> None:
    golden = GOLDEN[part]
    found = estimate(samples(name, part), interquartile_mean)
    assert float(found.value) == pytest.approx(golden["iqm"][name], rel=1e-12)
    shares = profile(samples(name, part), np.array(GOLDEN["taus"]))
    np.testing.assert_allclose(shares.value, golden["profile"][name], rtol=1e-12)
    # Bootstrap noise: few means are possible, so that a bound may be the next of them.
    np.testing.assert_allclose([float(found.low), float(found.high)], golden["iqm_interval"][name], atol=0.1)
    np.testing.assert_allclose([shares.low, shares.high], golden["profile_interval"][name], atol=0.101)


@pytest.mark.parametrize("part", ["two_tasks", "first_task"])
@pytest.mark.parametrize("pair", ["a,b", "a,c", "b,c"])
def test_probability_of_improvement_is_that_of_rliable(pair: str, part: str) -> None:
    x, y = (samples(name, part) for name in pair.split(","))
    found = estimate([*x, *y], improvement, resamples=2000)
    assert float(found.value) == pytest.approx(GOLDEN[part]["improvement"][pair], rel=1e-12)
    np.testing.assert_allclose([float(found.low), float(found.high)], GOLDEN[part]["improvement_interval"][pair], atol=0.05)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([7.0], 7.0), ([1.0, 2.0, 6.0], 3.0), ([10.0, 1.0, 3.0, 2.0], 2.5), ([100.0, 2.0, 1.0, 4.0, 3.0], 3.0)],
)
def test_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    assert interquartile_mean(np.array(values)) == expected


def test_over_several_tasks_the_quarters_are_those_of_all_scores() -> None:
    # All eight in order: 0 0 | 1 2 3 4 | 90 100.
    assert interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0]), np.array([0.0, 3.0, 4.0, 90.0])) == 2.5


def test_probability_of_improvement_by_hand() -> None:
    # 3 beats both, 1 ties with 1 and loses to 2: (2 + 0.5) / 4; and on the second task nothing is better: 0.
    assert improvement(np.array([3.0, 1.0]), np.array([1.0, 2.0])) == 0.625
    x, y = (np.array([3.0, 1.0]), np.array([0.0, 0.0])), (np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    assert improvement(*x, *y) == 0.3125
    assert improvement(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5


def test_the_interval_against_all_resamples() -> None:
    values = np.array([0.0, 1.0, 3.0, 10.0])
    exact = np.array([sum(sorted(draw)[1:3]) / 2 for draw in itertools.product(values, repeat=4)])
    found = estimate([values], interquartile_mean, resamples=20_000)
    for bound, share in ((found.low, 0.025), (found.high, 0.975)):
        # Between the quantiles beside it, so that chance in 20,000 draws cannot move it out.
        assert np.quantile(exact, share - 0.01) <= float(bound) <= np.quantile(exact, share + 0.01)


def test_runs_are_drawn_within_each_task() -> None:
    """Were they drawn from all tasks together, a mean over tasks without spread within them would have an interval."""
    found = estimate([np.full(5, 0.0), np.full(5, 10.0)], mean)
    assert [float(part) for part in found] == [5.0, 5.0, 5.0]


def test_the_points_of_a_run_are_drawn_together() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 1))
    found = curve(np.hstack([rows, 2 * rows]))
    np.testing.assert_allclose([found.low[1], found.high[1]], [2 * found.low[0], 2 * found.high[0]], rtol=1e-12)


def test_one_run_has_no_interval() -> None:
    found = curve(np.array([[1.0, 2.0]]))
    assert found.value.tolist() == [1.0, 2.0]
    assert np.isnan([found.low, found.high]).all()


def test_a_profile_counts_scores_above_and_not_at_a_threshold() -> None:
    found: Any = profile([np.array([1.0, 2.0, 2.0, 3.0])], np.array([0.0, 2.0, 3.0]))
    assert found.value.tolist() == [1.0, 0.25, 0.0]


def test_curves_of_unequal_points_are_compared_where_all_of_them_reach() -> None:
    first = (np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.0, 1.0, 2.0, 3.0]))
    second = (np.array([5.0, 25.0]), np.array([10.0, 30.0]))
    frames, values = align([first, second])
    assert frames.tolist() == [10, 20]
    assert values.tolist() == [[1, 2], [15, 25]]
