"""Distributions of a team's actions against closed forms, and their masks (MASK-1)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from marlkit import keys
from marlkit.nn.distributions import AgentDistribution, CategoricalTeam, NormalTeam, TeamDistribution


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


# --- mixed with a uniform choice ------------------------------------------------------------------------------------------


def mixture(share: float, logits: torch.Tensor, mask: torch.Tensor | None = None) -> CategoricalTeam:
    return CategoricalTeam(logits, mask, torch.tensor(share, dtype=torch.float64))


def test_mixture_matches_hand_computed_numbers() -> None:
    """The softmax is (1/4, 3/4, 0) over two available actions; a share of 0.2 makes it (0.3, 0.7, 0)."""
    logits = torch.tensor([[[0.0, math.log(3.0), 9.0]]], dtype=torch.float64)
    team = mixture(0.2, logits, torch.tensor([[[True, True, False]]]))
    for action, probability in enumerate((0.3, 0.7)):
        assert float(team.log_prob(torch.tensor([[action]]))) == pytest.approx(math.log(probability), abs=1e-14)
    assert float(team.entropy()) == pytest.approx(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)), abs=1e-14)
    other = mixture(0.0, torch.zeros_like(logits), torch.tensor([[[True, True, False]]]))
    assert float(team.kl(other)) == pytest.approx(0.3 * math.log(0.6) + 0.7 * math.log(1.4), abs=1e-14)
    stored = CategoricalTeam(team.parameters()[keys.LOGITS])
    torch.testing.assert_close(stored.log_probs[..., :2], team.log_probs[..., :2], rtol=0, atol=1e-14)
    assert float(stored.log_probs.exp()[0, 0, 2]) == 0


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.5, 1.0])
def test_mixture_and_its_gradient_are_exact(share: float) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True, True], [True, False, True, False], [False, True, False, False]])
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64)
    team = mixture(share, logits, mask)
    softmax = logits.exp() * mask / (logits.exp() * mask).sum(-1, keepdim=True)
    plain = ((1 - share) * softmax + share * mask.double() / mask.sum(-1, keepdim=True))[mask]
    torch.testing.assert_close(team.log_probs[mask].exp(), plain, rtol=1e-13, atol=1e-15)
    found, expected = ((weight[mask] * logs).sum() for logs in (team.log_probs[mask], plain.log()))
    gradients = [torch.autograd.grad(total, logits, retain_graph=True)[0] for total in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_share_of_zero_is_the_plain_softmax() -> None:
    logits, mask = torch.randn(2, 3, dtype=torch.float64), torch.tensor([[True, False, True]] * 2)
    plain = CategoricalTeam(logits, mask).log_probs
    assert torch.equal(mixture(0.0, logits, mask).log_probs[mask], plain[mask])


@pytest.mark.parametrize("size", [50.0, 1e4])
def test_gradients_of_a_saturated_mixture_stay_exact(size: float) -> None:
    """Where the softmax of an action underflows, only the floor is left, and its gradient is zero."""
    logits = torch.tensor([[size, 0.0, -size]], requires_grad=True)
    team = CategoricalTeam(logits, None, torch.tensor(0.3))
    torch.testing.assert_close(team.log_probs.exp(), torch.tensor([[0.8, 0.1, 0.1]]))
    (gradient,) = torch.autograd.grad(team.log_probs[0, 2] + team.entropy().sum(), logits)
    assert torch.isfinite(gradient).all()
    assert float(gradient.abs().max()) < 1e-15


def test_mixture_without_any_available_action_stays_finite() -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    team = CategoricalTeam(logits, torch.zeros(1, 2, dtype=torch.bool), torch.tensor(0.5))
    for quantity in (team.log_probs, team.entropy(), team.kl(team)):
        assert torch.isfinite(quantity).all()
        assert torch.equal(torch.autograd.grad(quantity.sum(), logits, retain_graph=True)[0], torch.zeros(1, 2))


def test_samples_are_drawn_from_the_mixture() -> None:
    torch.manual_seed(0)
    logits, mask = torch.tensor([[9.0, 0.0, 2.0]]).expand(20000, 3), torch.tensor([[False, True, True]])
    samples = CategoricalTeam(logits, mask, torch.tensor(0.4)).sample()
    assert not (samples == 0).any()
    share = 0.4 / 2 + 0.6 / (1 + math.e**2)
    assert abs(float((samples == 1).float().mean()) - share) < 5 * math.sqrt(share * (1 - share) / 20000)


# --- samples with gradient, and the same as distributions of torch ----------------------------------------------------------


def test_normal_samples_carry_the_gradient_of_mean_and_deviation() -> None:
    """``a = loc + scale z``: the derivative by loc is 1, by scale the standard score of the action."""
    torch.manual_seed(0)
    loc, scale = torch.randn(5, 3, 2, requires_grad=True), torch.rand(5, 3, 2).add_(0.1).requires_grad_()
    team = NormalTeam(loc, scale)
    action = team.rsample()
    by_loc, by_scale = torch.autograd.grad(action.sum(), [loc, scale])
    assert torch.equal(by_loc, torch.ones_like(loc))
    torch.testing.assert_close(by_scale, ((action - loc) / scale).detach(), rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    plain = team.sample()
    torch.manual_seed(1)
    assert torch.equal(plain, team.rsample())
    assert not plain.requires_grad


def test_categorical_samples_with_gradient_are_one_hot_and_exactly_distributed() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    logits = probabilities.log().expand(60_000, 1, 3).clone().requires_grad_()
    features = CategoricalTeam(logits).rsample()
    assert torch.equal(features.detach().amax(-1), torch.ones(60_000, 1))
    torch.testing.assert_close(features.detach().sum(-1), torch.ones(60_000, 1))
    frequencies = features.detach().mean((0, 1))
    deviation = (probabilities * (1 - probabilities) / 60_000).sqrt()
    assert ((frequencies - probabilities).abs() < 4 * deviation).all()
    (gradient,) = torch.autograd.grad(features[..., 0].sum(), logits)
    assert (gradient[..., 0] > 0).all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(60_000, 1), rtol=0, atol=1e-6)


def test_categorical_samples_with_gradient_never_take_an_unavailable_action() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([True, False, True]).expand(2_000, 1, 3)
    features = CategoricalTeam(torch.zeros(2_000, 1, 3), mask).rsample(temperature=0.5)
    assert features[..., 1].abs().max() == 0


@pytest.mark.parametrize("discrete", [True, False])
def test_the_same_as_a_distribution_of_torch(discrete: bool) -> None:
    torch.manual_seed(0)
    logits, loc, scale = torch.randn(4, 3, 5), torch.randn(4, 3, 2), torch.rand(4, 3, 2) + 0.5
    team: TeamDistribution = CategoricalTeam(logits) if discrete else NormalTeam(loc, scale)
    here = AgentDistribution(team)
    normal = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
    other: Any = torch.distributions.Categorical(logits=logits) if discrete else normal
    assert here.batch_shape == other.batch_shape == (4, 3)
    action = here.sample()
    torch.testing.assert_close(here.log_prob(action).squeeze(-1), other.log_prob(action))
    torch.testing.assert_close(here.entropy().squeeze(-1), other.entropy())
    assert torch.equal(here.mode, team.mode())
    assert torch.equal(here.deterministic_sample, team.mode())
    assert here.rsample().shape == ((4, 3, 5) if discrete else (4, 3, 2))
    with pytest.raises(ValueError, match="one action per agent at a time"):
        here.sample((2,))
