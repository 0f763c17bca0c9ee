"""Unbiased estimates of variances: a value's, split by the law of total variance, and a mean's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marlkit.functional.reduce import masked_mean


class VarianceParts(NamedTuple):
    """The parts of ``Var(Q(s, a_i, a_-i))``, each a scalar ``[]``.

    Attributes:
        own: ``E_s[Var(E[Q | s, a_i] | s)]``; ``None`` where nothing was drawn of it.
        others: ``E_{s, a_i}[Var(Q | s, a_i)]``; ``None`` likewise.
        state: ``Var_s(E[Q | s])``.
    """

    own: Tensor | None
    others: Tensor | None
    state: Tensor

    @property
    def marginal(self) -> Tensor:
        """``Var(Qt(s, a_i))`` of the value marginalised over the others, ``Qt = E[Q | s, a_i]``."""
        return self.state if self.own is None else self.state + self.own

    @property
    def total(self) -> Tensor:
        """``Var(Q)``."""
        return self.marginal if self.others is None else self.marginal + self.others


def split_variance(values: Tensor, weight: Tensor) -> VarianceParts:
    """The law of total variance, estimated by a nested analysis of variance (Searle, Casella and McCulloch 1992, chapter 3).

    Sums of squares are corrected for the noise of the means that they are taken of, so that each part is unbiased whatever the
    number of draws; small ones may come out negative. The variance over states divides by one less than their number.

    Args:
        values: ``[M, L, R, N]``: for each of ``R`` states and ``N`` agents ``M`` own actions, and for each of these ``L`` actions
            of the others. ``M = 1`` for a value that has no own action, ``L = 1`` for one that has no others'.
        weight: ``[R, N]`` bool: the entries that count.

    Returns:
        Means over agents; of agents with at least two states that count.
    """
    own_draws, others_draws = values.shape[:2]
    given_own = values.mean(1)
    others = values.var(1).mean(0) if others_draws > 1 else None
    noise = torch.zeros_like(given_own[0]) if others is None else others / others_draws
    between = given_own.var(0) if own_draws > 1 else None
    own = None if between is None else between - noise
    # What the mean over all draws of a state varies by.
    noise = noise if between is None else between / own_draws
    counted = weight & (weight.sum(0) > 1)
    state = _variance_over_rows(given_own.mean(0), counted) - _mean_by_agent(noise, counted)
    agents = counted.any(0)

    def over_agents(part: Tensor) -> Tensor:
        return masked_mean(_mean_by_agent(part, counted), agents)

    return VarianceParts(
        None if own is None else over_agents(own),
        None if others is None else over_agents(others),
        masked_mean(state, agents),
    )


def _mean_by_agent(x: Tensor, weight: Tensor) -> Tensor:
    """The mean of ``[R, N]`` over the rows that count, ``[N]``."""
    return (x.masked_fill(~weight, 0.0)).sum(0) / weight.sum(0).clamp(min=1)


def _variance_over_rows(x: Tensor, weight: Tensor) -> Tensor:
    """The unbiased variance of ``[R, N]`` over the rows that count, ``[N]``."""
    centred = (x - _mean_by_agent(x, weight)).masked_fill(~weight, 0.0)
    return centred.square().sum(0) / (weight.sum(0) - 1).clamp(min=1)


def variance_of_mean(samples: Tensor) -> Tensor:
    """``sum_p Var(mean_s x_sp)``: how much the mean of independent vectors ``[S, P]`` varies, ``S > 1``; unbiased, ``[]``."""
    return samples.var(0).sum() / len(samples)
