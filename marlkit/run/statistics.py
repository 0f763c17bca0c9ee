"""Statistics over few seeds: interquartile mean and its bootstrap interval.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def interquartile_mean(values: ArrayLike) -> Array:
    """Mean over axis 0 without the ``floor(n / 4)`` lowest and as many highest values.

    Args:
        values: ``[n, *]``, one row per seed.

    Returns:
        ``[*]``.

    Raises:
        ValueError: there are no values.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError("the interquartile mean needs a list of at least one value")
    ordered = np.sort(rows, axis=0)
    cut = len(ordered) // 4
    return np.asarray(ordered[cut : len(ordered) - cut].mean(axis=0))


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Array, Array]:
    """Percentile bootstrap interval of the interquartile mean.

    Whole rows are drawn with replacement, so that a seed's curve stays together.

    Args:
        values: ``[n, *]``, one row per seed.
        confidence: share of the resampled means inside the interval.
        resamples: how many times the rows are drawn.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        ``(low, high)``, each ``[*]``.

    Raises:
        ValueError: there are no values.
    """
    rows = np.asarray(values, dtype=np.float64)
    interquartile_mean(rows)
    draws = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
    means = np.stack([interquartile_mean(rows[draw]) for draw in draws])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return np.asarray(low), np.asarray(high)
