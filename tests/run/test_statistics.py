"""Interquartile mean and bootstrap interval against hand-computed and enumerated values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from marlkit.run.statistics import bootstrap_interval, interquartile_mean


@pytest.mark.parametrize(
    ("values", "expected"),
    [([7.0], 7.0), ([1.0, 2.0, 6.0], 3.0), ([10.0, 1.0, 3.0, 2.0], 2.5), ([100.0, 2.0, 1.0, 4.0, 3.0], 3.0)],
)
def test_interquartile_mean_by_hand(values: list[float], expected: float) -> None:
    assert interquartile_mean(values) == expected


def test_interquartile_mean_sorts_every_column_by_itself() -> None:
    assert interquartile_mean([[0, 9], [1, 2], [2, 1], [9, 0]]).tolist() == [1.5, 1.5]


def test_bootstrap_interval_against_all_resamples() -> None:
    values = np.array([0.0, 1.0, 3.0, 10.0])
    exact = sorted(sum(sorted(draw)[1:3]) / 2 for draw in itertools.product(values, repeat=4))
    low, high = bootstrap_interval(values, confidence=0.8, resamples=20_000)
    # The quantiles lie well inside steps of the exact distribution, so that chance in 20,000 draws cannot move them.
    for share in (0.09, 0.11):
        assert exact[int(share * len(exact))] == low
        assert exact[int((1 - share) * len(exact))] == high


def test_bootstrap_interval_keeps_the_curves_of_a_seed_together() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 1))
    low, high = bootstrap_interval(np.hstack([rows, 2 * rows]))
    np.testing.assert_allclose([low[1], high[1]], [2 * low[0], 2 * high[0]], rtol=1e-12)


def test_bootstrap_interval_of_equal_seeds_has_no_width() -> None:
    low, high = bootstrap_interval(np.full((5, 2), 4.0))
    assert low.tolist() == high.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("values", [[], np.float64(1.0)])
def test_no_values_is_an_error(values: object) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        interquartile_mean(values)  # type: ignore[arg-type]
