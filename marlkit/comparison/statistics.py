"""Statistics over few runs and several tasks, by SciPy.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice". A sample holds the scores of the runs
on one task, along its last axis. Where there are several, each is a stratum: runs are drawn anew within every task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
CONFIDENCE = 0.95
TRIMMED = 0.25
"""Share that an interquartile mean leaves out on each side; ``floor(n / 4)`` of n scores."""


class Estimate(NamedTuple):
    """An estimate ``[*]`` and the bounds ``[*]`` of its interval, NaN where a sample has one run only."""

    value: Array
    low: Array
    high: Array


class Statistic(Protocol):
    """A function of samples that reduces their axis ``axis``."""

    def __call__(self, *samples: Array, axis: int = -1) -> Array:
        """The statistic ``[*]`` of samples ``[*, runs]``."""


def interquartile_mean(*samples: Array, axis: int = -1) -> Array:
    """Mean of all scores of all tasks without the lowest and the highest quarter."""
    return np.asarray(stats.trim_mean(np.concatenate(samples, axis=axis), TRIMMED, axis=axis))


def mean(*samples: Array, axis: int = -1) -> Array:
    """Mean of all scores of all tasks."""
    return np.asarray(np.concatenate(samples, axis=axis).mean(axis=axis))


def improvement(*samples: Array, axis: int = -1) -> Array:
    """``P(X > Y) + P(X = Y) / 2``, averaged over the tasks: Mann and Whitney's U over the number of pairs.

    Args:
        samples: those of X, one per task, and then those of Y in the same order.
        axis: of the runs.
    """
    tasks = len(samples) // 2
    shares = []
    for x, y in zip(samples[:tasks], samples[tasks:], strict=True):
        with np.errstate(all="ignore"):  # of the p-value, which is not used
            u = stats.mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic
        shares.append(u / (x.shape[axis] * y.shape[axis]))
    return np.asarray(np.mean(shares, axis=0))


def estimate(samples: Sequence[Array], statistic: Statistic, *, resamples: int = 10_000) -> Estimate:
    """A statistic and its 95 % percentile interval by the stratified bootstrap.

    Whole runs are drawn, so that a run's curve stays together. The same samples always give the same interval.

    Args:
        samples: ``[*, runs]`` each.
        statistic: of the samples.
        resamples: how many times the runs are drawn.
    """
    value = statistic(*samples, axis=-1)
    if min(sample.shape[-1] for sample in samples) < 2:
        return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        batch=1000,
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Estimate(value, *map(np.asarray, found.confidence_interval))


def profile(samples: Sequence[Array], thresholds: Array) -> Estimate:
    """The share of runs whose score lies above each threshold ``[T]``: a performance profile."""
    above = [np.asarray(sample > thresholds[:, None], dtype=np.float64) for sample in samples]
    return estimate(above, mean, resamples=2000)


def curve(values: Array) -> Estimate:
    """The interquartile mean over the runs of ``[runs, points]`` at each point."""
    return estimate([values.T], interquartile_mean, resamples=2000)


def align(series: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Interpolate the curves of several runs at the frames of the first, within the range that all of them cover.

    Args:
        series: per run, frames and values, in order of frames.

    Returns:
        Frames ``[P]`` and values ``[runs, P]``, linearly interpolated between a run's own points.
    """
    start = max(frames[0] for frames, _ in series)
    end = min(frames[-1] for frames, _ in series)
    grid = series[0][0]
    grid = grid[(grid >= start) & (grid <= end)]
    return grid, np.stack([np.interp(grid, frames, values) for frames, values in series])
