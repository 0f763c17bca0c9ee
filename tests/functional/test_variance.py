"""Estimates of variances against exact ones: the expectation over every possible outcome of the draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from marlkit.functional.variance import VarianceParts, split_variance, variance_of_mean

STATES = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[-2.0, 1.0], [0.5, 1.0]], [[0.0, 4.0], [2.0, 2.0]]], dtype=torch.float64)
"""``Q(s, a_1, a_2)`` of three states."""
OWN, OTHER = torch.tensor([0.6, 0.4], dtype=torch.float64), torch.tensor([0.7, 0.3], dtype=torch.float64)


def expected(states: Tensor, own_draws: int, others_draws: int) -> VarianceParts:
    """The mean of the estimate over all draws of a pair of states, weighted by their probabilities."""
    per_state = []
    for own in itertools.product((0, 1), repeat=own_draws):
        for others in itertools.product((0, 1), repeat=own_draws * others_draws):
            probability = math.prod(OWN[list(own)].tolist()) * math.prod(OTHER[list(others)].tolist())
            per_state.append((torch.tensor(own), torch.tensor(others).view(own_draws, others_draws), probability))
    total = torch.zeros(3, dtype=torch.float64)
    for first, second in itertools.product(per_state, repeat=2):
        drawn = [q[own.unsqueeze(1), others] for q, (own, others, _) in zip(states, (first, second), strict=True)]
        parts = split_variance(torch.stack(drawn, -1).unsqueeze(-1), torch.ones(2, 1, dtype=torch.bool))
        total += first[2] * second[2] * torch.stack([torch.zeros(()) if part is None else part for part in parts])
    return VarianceParts(*total)


def exact(states: Tensor) -> tuple[float, float, float]:
    """Own, others, state; the last divided by one less than the number of states."""
    marginal = states @ OTHER
    value = marginal @ OWN
    own = ((marginal - value[:, None]).square() @ OWN).mean()
    others = ((states - marginal[..., None]).square() @ OTHER @ OWN).mean()
    return own.item(), others.item(), value.var().item()


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, 0)])
def test_each_part_is_unbiased(pair: tuple[int, int]) -> None:
    states = STATES[list(pair)]
    found = expected(states, 2, 2)
    torch.testing.assert_close(torch.stack(found), torch.tensor(exact(states)).double(), rtol=0, atol=1e-7)  # type: ignore[arg-type]


def test_the_parts_of_the_matrix_game_are_those_of_the_paper() -> None:
    found = expected(STATES[[0, 0]], 2, 2)
    assert found.total.item() == pytest.approx(0.8916)
    assert found.marginal.item() == pytest.approx(0.0096)
    assert found.others is not None
    assert (found.marginal + found.others / 2).item() == pytest.approx(0.4506)
    assert (found.marginal + found.others / 10).item() == pytest.approx(0.0978)


def test_what_was_not_drawn_is_absent() -> None:
    values = torch.tensor([[[[1.0], [4.0]]]])
    parts = split_variance(values, torch.ones(2, 1, dtype=torch.bool))
    assert (parts.own, parts.others) == (None, None)
    assert parts.total == parts.marginal == parts.state == 4.5


def test_dead_agents_and_agents_with_one_state_do_not_count() -> None:
    values = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(4, 3, dtype=torch.bool)
    weight[2:, 1], weight[1:, 2] = False, False
    spoilt = values.clone()
    spoilt[:, :, 2:, 1], spoilt[:, :, :, 2] = torch.inf, 1e9
    alone = [split_variance(values[..., :rows, i : i + 1], weight[:rows, i : i + 1]) for i, rows in ((0, 4), (1, 2))]
    for found, one, other in zip(split_variance(spoilt, weight), *alone, strict=True):
        torch.testing.assert_close(found, (one + other) / 2)


def test_the_variance_of_a_mean() -> None:
    assert variance_of_mean(torch.tensor([[1.0, 0.0], [3.0, 6.0]])) == pytest.approx((2 + 18) / 2)
