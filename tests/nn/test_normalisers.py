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


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4, 1e5])
@pytest.mark.parametrize("batches", [1, 300])
def test_targets_far_from_zero_keep_their_deviation(offset: float, batches: int) -> None:
    generator = torch.Generator().manual_seed(0)
    normaliser = ValueNormaliser(enabled=True)
    for _ in range(batches):
        normaliser.update(offset + torch.randn(4096, generator=generator))
    normal = normaliser.normalise(offset + torch.randn(100_000, generator=generator))
    assert float(normal.std()) == pytest.approx(1.0, rel=0.05)
    assert abs(float(normal.mean())) < 0.1


def test_a_long_history_is_the_weighted_mean_and_variance_of_all_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    normaliser, beta = ValueNormaliser(enabled=True, beta=0.9), 0.9
    batches = [scale * torch.randn(16, generator=generator) + shift for scale, shift in zip(range(1, 41), range(40), strict=True)]
    for batch in batches:
        normaliser.update(batch)
    weights = torch.tensor([beta ** (40 - j) for j in range(1, 41)], dtype=torch.float64).repeat_interleave(16)
    values = torch.cat(batches).double()
    mean = (weights * values).sum() / weights.sum()
    variance = (weights * (values - mean).square()).sum() / weights.sum()
    torch.testing.assert_close(normaliser.mean.double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(normaliser.variance.double(), variance, rtol=1e-5, atol=0)


def test_averages_of_an_older_checkpoint_are_converted() -> None:
    old = {"n.mean": torch.tensor(1.5), "n.mean_square": torch.tensor(6.0), "n.weight": torch.tensor(0.5)}
    holder = torch.nn.ModuleDict({"n": ValueNormaliser(enabled=True)})
    holder.load_state_dict(old)
    # mean 1.5 / 0.5 = 3, mean square 6 / 0.5 = 12, variance 12 - 9 = 3.
    assert {name: float(value) for name, value in holder.state_dict().items()} == {"n.mean": 3, "n.variance": 3, "n.weight": 0.5}
    untouched = torch.nn.ModuleDict({"n": ValueNormaliser(enabled=True)})
    untouched.load_state_dict({name: torch.zeros(()) for name in old})
    assert all(float(value) == 0 for value in untouched.state_dict().values())
