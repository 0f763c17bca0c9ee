"""Bounds with a way back."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from marlkit.actors._independent import Deviation
from marlkit.actors.module import ModuleActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.actors.transformer import TransformerActor
from marlkit.errors import OptionError
from marlkit.functional.bounds import bounded
from marlkit.nn.actions import LOG_DEVIATION_RANGE
from marlkit.options import Range, StartingDeviation
from marlkit.spec import Continuous, TeamSpec
from marlkit.testing import fake_batch

LOW, HIGH = -1.0, 2.0


@pytest.mark.parametrize(
    ("x", "slope", "expected"),
    [
        (0.0, 3.0, 3.0),
        (0.0, -3.0, -3.0),
        (LOW, 3.0, 3.0),
        (HIGH, -3.0, -3.0),
        (5.0, 3.0, 3.0),  # descent lowers x: inwards
        (5.0, -3.0, 0.0),
        (-4.0, -3.0, -3.0),
        (-4.0, 3.0, 0.0),
    ],
)
def test_the_gradient_leads_inwards_or_is_zero(x: float, slope: float, expected: float) -> None:
    entry = torch.tensor([x], requires_grad=True)
    value = bounded(entry, LOW, HIGH)
    assert float(value.detach()) == min(max(x, LOW), HIGH)
    (slope * value).sum().backward()
    assert entry.grad is not None
    assert float(entry.grad) == expected


@pytest.mark.parametrize("start", [-9.0, -5.5, 2.5, 8.0])
def test_a_deviation_beyond_its_bounds_comes_back_to_the_best_one(start: float) -> None:
    """Maximum likelihood of samples of deviation 0.5: with a plain clamp the parameter would never move."""
    actor = StochasticActor(TeamSpec(1, 2, Continuous(1)), hidden=[], output_gain=0.01)
    with torch.no_grad():
        for parameter in actor.log_deviation.parameters():
            parameter.fill_(start)
    batch = fake_batch(actor.spec, [256], actor.reads)
    action = 0.5 * torch.randn(256, 1, 1, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.1, betas=(0.9, 0.9))
    for _ in range(300):
        optimizer.zero_grad()
        (-actor.distribution(batch).log_prob(action).mean()).backward()
        optimizer.step()
    assert float(actor.log_deviation[0].exp()) == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("deviation", [0.007, 0.05, 1.0, 7.3])
@pytest.mark.parametrize("std", ["parameter", "predicted"])
def test_the_deviation_at_the_start_is_the_one_asked_for(deviation: float, std: Deviation) -> None:
    actor = StochasticActor(TeamSpec(2, 3, Continuous(2)), std=std, initial_std=deviation, output_gain=1e-6)
    scale = actor.distribution(fake_batch(actor.spec, [4], actor.reads)).parameters()["agents", "scale"]
    torch.testing.assert_close(scale, torch.full_like(scale, deviation), rtol=1e-3, atol=0)


@pytest.mark.parametrize("deviation", [0.001, 10.0])
@pytest.mark.parametrize("make", [StochasticActor, TransformerActor])
def test_a_deviation_that_cannot_be_had_is_refused(deviation: float, make: type[StochasticActor]) -> None:
    with pytest.raises(OptionError, match="initial_std"):
        make(TeamSpec(2, 3, Continuous(2)), initial_std=deviation)
    with pytest.raises(OptionError, match="initial_std"):
        ModuleActor(TeamSpec(2, 3, Continuous(2)), network="torch.nn.Linear", initial_std=deviation)


def test_every_starting_deviation_lies_within_the_bounds() -> None:
    _, limits = get_args(StartingDeviation)
    assert isinstance(limits, Range)
    assert limits.at_least is not None
    assert limits.at_most is not None
    assert LOG_DEVIATION_RANGE[0] < math.log(limits.at_least) < math.log(limits.at_most) < LOG_DEVIATION_RANGE[1]
