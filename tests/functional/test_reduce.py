"""Weighted means and advantage standardisation against numpy on the entries that count."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from marlkit.functional.reduce import masked_mean, standardise

assert_exact = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 5, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def alive() -> Tensor:
    return torch.rand(4, 5, 3, 1, generator=torch.Generator().manual_seed(1)) < 0.6


def test_mean_is_over_the_entries_that_count(x: Tensor, alive: Tensor) -> None:
    np.testing.assert_allclose(masked_mean(x, alive), np.mean(x.numpy()[alive.numpy()]), rtol=0, atol=1e-12)
    assert 0 < alive.sum() < alive.numel()


def test_weights_by_hand() -> None:
    mean = masked_mean(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([2.0, 0.5, 0.0]))
    assert mean.item() == pytest.approx((2 * 1 + 0.5 * 10) / 2.5)
    assert masked_mean(torch.tensor([8.0, 8.0]), torch.tensor([0.25, 0.25])).item() == pytest.approx(4.0)


def test_without_a_weight_all_count(x: Tensor) -> None:
    torch.testing.assert_close(masked_mean(x, None), masked_mean(x, torch.ones_like(x)), rtol=1e-12, atol=0)


def test_weight_is_counted_broadcast(x: Tensor) -> None:
    valid = torch.zeros(4, 5, 1, 1, dtype=torch.bool)
    valid[1, 2:4] = True
    np.testing.assert_allclose(masked_mean(x, valid), np.mean(x.numpy()[1, 2:4]), rtol=0, atol=1e-12)


def test_the_mean_of_no_entries_is_zero(x: Tensor) -> None:
    no_entry = torch.zeros_like(x, dtype=torch.bool)
    assert masked_mean(x, no_entry).item() == 0.0
    assert torch.equal(standardise(x, no_entry), torch.zeros_like(x))


@pytest.mark.parametrize("absurd", [1e30, float("inf"), float("nan")])
def test_entries_without_weight_change_nothing(x: Tensor, alive: Tensor, absurd: float) -> None:
    spoilt = x.masked_fill(~alive, absurd).requires_grad_()
    mean = masked_mean(spoilt, alive)
    mean.backward()
    assert torch.equal(mean, masked_mean(x, alive))
    assert spoilt.grad is not None
    assert_exact(spoilt.grad, alive / alive.sum().double())
    assert torch.equal(standardise(spoilt, alive), standardise(x, alive))


def test_standardise_equals_numpy_population_statistics(x: Tensor, alive: Tensor) -> None:
    counted = x.numpy()[alive.numpy()]
    result = standardise(x, alive, epsilon=1e-3)
    expected = (counted - np.mean(counted)) / (np.std(counted) + 1e-3)
    np.testing.assert_allclose(result.numpy()[alive.numpy()], expected, rtol=0, atol=1e-10)
    assert (result[~alive] == 0).all()


def test_standardise_by_hand() -> None:
    ones = torch.ones(3, dtype=torch.bool)
    result = standardise(torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64), ones, epsilon=0.0)
    assert_exact(result, torch.tensor([-(0.5**0.5), -(0.5**0.5), 2**0.5], dtype=torch.float64))


def test_standardise_counts_a_weight_of_two_twice() -> None:
    once = standardise(torch.tensor([1.0, 4.0, 4.0]), torch.ones(3))
    double = standardise(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(double, once[:2])


def test_standardise_of_equal_entries_is_zero_and_has_no_gradient() -> None:
    result = standardise(torch.full((2, 3), 7.0, requires_grad=True), torch.ones(2, 3))
    assert torch.equal(result, torch.zeros(2, 3))
    assert not result.requires_grad


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5, 2, 1), (4, 5, 3, 7)])
def test_weight_that_does_not_fit_is_refused(x: Tensor, shape: tuple[int, ...]) -> None:
    for reduction in (masked_mean, standardise):
        with pytest.raises(ValueError, match=r"weight of shape .* does not broadcast to x of shape \[4, 5, 3, 1\]"):
            reduction(x, torch.ones(shape))
