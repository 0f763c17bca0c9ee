"""Running value normalisation (VN-1)."""

from __future__ import annotations

import pytest
import torch

from marlkit.nn.normalisers import ValueNormaliser


def test_conversions_are_inverse() -> None:
    normaliser = ValueNormaliser(enabled=True)
    normaliser.update(torch.tensor([3.0, 5.0, 10.0]))
    x = torch.tensor([-100.0, 0.0, 7.0])
    torch.testing.assert_close(normaliser.denormalise(normaliser.normalise(x)), x)


def test_first_update_gives_the_batch_statistics() -> None:
    normaliser = ValueNormaliser(enabled=True)
    normaliser.update(torch.tensor([1.0, 3.0]))
    # mean 2, deviation 1: debiasing undoes the start at zero.
    torch.testing.assert_close(
        normaliser.normalise(torch.tensor([1.0, 2.0, 5.0])), torch.tensor([-1.0, 0.0, 3.0]), rtol=1e-4, atol=1e-3
    )


def test_averages_decay_as_written() -> None:
    normaliser = ValueNormaliser(enabled=True, beta=0.5)
    for batch in ([0.0, 2.0], [4.0, 8.0]):
        normaliser.update(torch.tensor(batch))
    # m = .5 * (.5 * 1) + .5 * 6 = 3.25, s = .5 * (.5 * 2) + .5 * 40 = 20.5, w = .75
    mean, variance = 3.25 / 0.75, 20.5 / 0.75 - (3.25 / 0.75) ** 2
    assert float(normaliser.denormalise(torch.tensor(0.0))) == pytest.approx(mean, rel=1e-5)
    assert float(normaliser.denormalise(torch.tensor(1.0)) - mean) == pytest.approx(variance**0.5, rel=1e-5)


def test_scaling_rewards_leaves_the_normalised_targets_nearly_unchanged() -> None:
    torch.manual_seed(0)
    targets = torch.randn(100) * 3 + 5
    small, large = ValueNormaliser(enabled=True), ValueNormaliser(enabled=True)
    small.update(targets)
    large.update(1000 * targets)
    torch.testing.assert_close(small.normalise(targets), large.normalise(1000 * targets), rtol=1e-2, atol=1e-2)


def test_switched_off_it_is_the_identity_and_keeps_no_statistics() -> None:
    normaliser = ValueNormaliser(enabled=False)
    normaliser.update(torch.tensor([3.0, 5.0]))
    assert float(normaliser.weight) == 0
    x = torch.tensor([2.0])
    assert normaliser.normalise(x) is x
    assert normaliser.denormalise(x) is x
