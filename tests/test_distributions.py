"""Distributions of a team's actions against closed forms, and their masks (MASK-1)."""

from __future__ import annotations

import math

import pytest
import torch

from marlkit import keys
from marlkit.distributions import CategoricalTeam, NormalTeam


def test_categorical_matches_hand_computed_numbers() -> None:
    team = CategoricalTeam(torch.tensor([[[0.0, math.log(3.0)]]]))
    assert float(team.log_prob(torch.tensor([[1]]))) == pytest.approx(math.log(0.75), rel=1e-6)
    assert float(team.entropy()) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), rel=1e-6)
    other = CategoricalTeam(torch.zeros(1, 1, 2))
    assert float(team.kl(other)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-5)
    assert team.mode().item() == 1
    assert team.log_prob(torch.tensor([[1]])).shape == (1, 1, 1)


def test_masked_actions_are_never_drawn_and_change_nothing() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[[True, False, True]]])
    first = CategoricalTeam(torch.tensor([[[0.0, 50.0, 1.0]]]).expand(20000, 1, 3), mask)
    second = CategoricalTeam(torch.tensor([[[0.0, -7.0, 1.0]]]).expand(20000, 1, 3), mask)
    samples = first.sample()
    assert not (samples == 1).any()
    share = math.e / (1 + math.e)
    assert abs(float((samples == 2).float().mean()) - share) < 5 * math.sqrt(share * (1 - share) / 20000)
    for quantity in ("entropy", "mode"):
        assert torch.equal(getattr(first, quantity)(), getattr(second, quantity)())
    assert float(first.kl(second).abs().max()) == 0
    assert torch.isfinite(first.entropy()).all()


def test_masked_logits_receive_no_gradient() -> None:
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    team = CategoricalTeam(logits, torch.tensor([[[True, False, True]]]))
    (team.entropy().sum() + team.log_prob(torch.tensor([[2]])).sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert float(logits.grad[0, 0, 1]) == 0


def test_normal_matches_torchs_and_sums_dimensions_but_not_agents() -> None:
    torch.manual_seed(0)
    loc, scale, action = torch.randn(5, 3, 2), torch.rand(5, 3, 2) + 0.1, torch.randn(5, 3, 2)
    team, reference = NormalTeam(loc, scale), torch.distributions.Normal(loc, scale)
    torch.testing.assert_close(team.log_prob(action), reference.log_prob(action).sum(-1, keepdim=True))
    torch.testing.assert_close(team.entropy(), reference.entropy().sum(-1, keepdim=True))
    other = torch.distributions.Normal(action, scale.flip(0))
    expected = torch.distributions.kl_divergence(reference, other).sum(-1, keepdim=True)
    torch.testing.assert_close(team.kl(NormalTeam(action, scale.flip(0))), expected)


def test_padded_dimensions_count_for_nothing() -> None:
    dims = torch.tensor([[[True, False]]])
    loc = torch.tensor([[[0.5, 3.0]]], requires_grad=True)
    team = NormalTeam(loc, torch.ones(1, 1, 2), dims)
    alone = NormalTeam(loc[..., :1], torch.ones(1, 1, 1))
    action = torch.tensor([[[0.2, 99.0]]])
    assert torch.equal(team.log_prob(action), alone.log_prob(action[..., :1]))
    assert torch.equal(team.entropy(), alone.entropy())
    team.log_prob(action).sum().backward()
    assert loc.grad is not None
    assert float(loc.grad[0, 0, 1]) == 0


def test_state_independent_deviation_is_expanded_where_it_is_stored() -> None:
    team = NormalTeam(torch.zeros(4, 3, 2), torch.ones(3, 2))
    assert team.parameters()[keys.SCALE].shape == (4, 3, 2)
    assert team.entropy().shape == (4, 3, 1)
