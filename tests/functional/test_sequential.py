"""The compound factor against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from marlkit.functional.sequential import compound


def test_factor_by_hand() -> None:
    factor = torch.tensor([[[2.0], [-3.0], [5.0]]])
    old, new = torch.tensor([[[0.5], [0.25], [0.5]]]), torch.tensor([[[0.25], [0.75], [0.5]]])
    alive = torch.ones(1, 3, 1, dtype=torch.bool)
    expected = torch.tensor([[[1.0], [-9.0], [5.0]]])
    torch.testing.assert_close(compound(factor, new.log(), old.log(), alive), expected)


@pytest.mark.parametrize("absurd", [50.0, math.inf, -math.inf, math.nan])
def test_ratio_is_one_where_not_alive(absurd: float) -> None:
    factor = torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(0))
    alive = torch.rand(4, 6, 1, generator=torch.Generator().manual_seed(1)) < 0.5
    log_prob = torch.full((4, 6, 1), absurd).masked_fill(alive, math.log(2.0))
    result = compound(factor, log_prob, torch.zeros(4, 6, 1), alive)
    torch.testing.assert_close(result, factor * torch.where(alive, 2.0, 1.0))
    assert 0 < alive.sum() < alive.numel()


def test_a_policy_without_the_action_makes_the_factor_zero() -> None:
    alive = torch.ones(1, dtype=torch.bool)
    assert compound(torch.ones(1), torch.tensor([-math.inf]), torch.zeros(1), alive).item() == 0.0


def test_no_gradient() -> None:
    log_prob = torch.zeros(3, requires_grad=True)
    assert not compound(torch.ones(3), log_prob, log_prob, torch.ones(3, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "alive"])
def test_shape_that_would_enlarge_the_factor_is_refused(name: str) -> None:
    shapes = {key: (4, 6, 3) if key == name else (4, 6, 1) for key in ("log_prob", "old_log_prob", "alive")}
    tensors = {key: torch.zeros(shape, dtype=torch.bool if key == "alive" else None) for key, shape in shapes.items()}
    with pytest.raises(ValueError, match=rf"^{name} of shape \[4, 6, 3\] does not broadcast to factor"):
        compound(torch.ones(4, 6, 1), **tensors)
