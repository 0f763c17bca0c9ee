"""The deterministic actor: what it plays, what it is bootstrapped with, and the gradient that its actions carry (DPG-2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.actors.deterministic import DeterministicActor
from marlkit.errors import OptionError
from marlkit.functional.gumbel import gumbel_from_uniform, straight_through
from marlkit.nn.distributions import UNAVAILABLE
from marlkit.spec import Continuous, Discrete, TeamSpec

BOUNDS = (((-1.0, -2.0), (0.0, -1.0), (-1.0, 0.0)), ((1.0, 2.0), (4.0, 1.0), (3.0, 0.0)))
CONTINUOUS = TeamSpec(3, 4, Continuous(2, *BOUNDS), action_sizes=(2, 2, 1))
DISCRETE = TeamSpec(3, 4, Discrete(4), action_sizes=(4, 2, 3))
MIDDLE = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
HALF = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
OWNED = torch.tensor([[True, True], [True, True], [True, False]])


def seen(spec: TeamSpec, rows: int, seed: int = 0) -> TensorDict:
    """Random observations and the masks of what the agents have."""
    draw = torch.Generator().manual_seed(seed)
    has = torch.arange(spec.action_features) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)
    return TensorDict(
        {
            "agents": {
                "observation": torch.randn(rows, spec.n_agents, spec.observation, generator=draw),
                "action_mask" if spec.discrete else "action_dims": has.expand(rows, -1, -1).clone(),
            }
        },
        batch_size=[rows],
    )


def actor_of(spec: TeamSpec, **options: Any) -> DeterministicActor:
    torch.manual_seed(1)
    return DeterministicActor(spec, **{"hidden": [6], "output_gain": 1.5, **options})


def middle_of_play(actor: DeterministicActor, batch: TensorDict) -> Tensor:
    """``mu``, written out from the network."""
    return torch.where(OWNED, MIDDLE + HALF * actor.network(batch[keys.OBSERVATION]).tanh(), 0.0)


# --- continuous -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["all", "none", [[0, 2], [1]]])
def test_mu_lies_in_the_range_of_each_agent_and_is_what_is_bootstrapped_with(share: Any) -> None:
    actor, batch = actor_of(CONTINUOUS, share=share), seen(CONTINUOUS, 7)
    expected = middle_of_play(actor, batch)
    assert (expected[:, 1, 0] > 0).all()
    for action in (
        actor.reparametrised(batch),
        actor.bootstrap(batch.clone())[keys.ACTION],
        actor(batch.clone(), deterministic=True)[keys.ACTION],
    ):
        torch.testing.assert_close(action, expected)


def test_actions_that_values_are_bootstrapped_with_are_smoothed_within_limits() -> None:
    """Normal noise of deviation 0.2, cut at 0.3, in half-ranges, and never beyond what the policy can choose."""
    actor, batch = actor_of(CONTINUOUS, target_noise=0.2, target_noise_limit=0.3), seen(CONTINUOUS, 1)
    batch = batch.expand(20_000).clone()
    torch.manual_seed(0)
    mu, action = middle_of_play(actor, batch), actor.bootstrap(batch)[keys.ACTION]
    noise = ((action - mu) / HALF)[:, OWNED]
    room = ((MIDDLE + HALF - mu) / HALF)[0, OWNED], ((mu - MIDDLE + HALF) / HALF)[0, OWNED]
    assert not action[:, ~OWNED].any()
    for dimension, (above, below) in enumerate(zip(*room, strict=True)):
        drawn = noise[:, dimension]
        top, bottom = min(above.item(), 0.3), -min(below.item(), 0.3)
        assert (drawn.max().item(), drawn.min().item()) == pytest.approx((top, bottom), abs=1e-5)
        inside = (drawn < top - 1e-5) & (drawn > bottom + 1e-5)
        share = torch.distributions.Normal(0.0, 0.2).cdf(torch.tensor([bottom, top])).diff().item()
        assert inside.float().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 20_000))
    torch.testing.assert_close(actor.reparametrised(batch), mu)
    torch.testing.assert_close(batch[keys.LOC], mu)


def test_what_is_played_is_mu_with_noise_and_its_log_probability() -> None:
    actor, batch = actor_of(CONTINUOUS, exploration=0.25), seen(CONTINUOUS, 1)
    batch = batch.expand(20_000).clone()
    torch.manual_seed(0)
    actor(batch)
    mu, action = middle_of_play(actor, batch), batch[keys.ACTION]
    noise = ((action - mu) / HALF)[:, OWNED]
    assert (action[:, ~OWNED] == 0).all(), "padding is not played"
    five_sigma = 5 * 0.25 / math.sqrt(len(noise))
    assert (noise.mean(0).abs() < five_sigma).all()
    assert ((noise.std(0) - 0.25).abs() < five_sigma).all()
    correlation = torch.corrcoef(noise.T) - torch.eye(5)
    assert correlation.abs().max() < 5 / math.sqrt(len(noise))
    deviation = 0.25 * HALF
    density = -0.5 * ((action - mu) / deviation) ** 2 - deviation.log() - 0.5 * math.log(2 * math.pi)
    expected = (density * OWNED).sum(-1, keepdim=True)
    torch.testing.assert_close(batch[keys.LOG_PROB], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(actor.distribution(batch).log_prob(action), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(batch[keys.LOC], mu)
    torch.testing.assert_close(batch[keys.SCALE], deviation.expand_as(mu))


def test_mu_has_the_gradient_of_a_scaled_tanh() -> None:
    actor, batch = actor_of(CONTINUOUS, hidden=[], share="none"), seen(CONTINUOUS, 5)
    weights = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(3))
    (weights * actor.reparametrised(batch)).sum().backward()
    for agent in range(3):
        weight, bias = actor.agent_parameters([agent])
        observation = batch[keys.OBSERVATION][:, agent]
        slope = weights[:, agent] * OWNED[agent] * HALF[agent] * (1 - (observation @ weight.T + bias).tanh() ** 2)
        torch.testing.assert_close(bias.grad, slope.sum(0))
        torch.testing.assert_close(weight.grad, slope.T @ observation)


def test_noise_fades_linearly_in_copies_and_checkpoints_too() -> None:
    actor, batch = actor_of(CONTINUOUS, exploration=0.5, exploration_end=0.1), seen(CONTINUOUS, 2)
    for progress, expected in ((0.0, 0.5), (0.25, 0.4), (1.0, 0.1)):
        actor.schedule(progress)
        torch.testing.assert_close(actor(batch.clone())[keys.SCALE][0], expected * HALF)
    loaded = actor_of(CONTINUOUS, exploration=0.5, exploration_end=0.1)
    loaded.load_state_dict(actor.state_dict())
    torch.testing.assert_close(loaded(batch.clone())[keys.SCALE][0], 0.1 * HALF)
    steady = actor_of(CONTINUOUS, exploration=0.5)
    steady.schedule(1.0)
    torch.testing.assert_close(steady(batch.clone())[keys.SCALE][0], 0.5 * HALF)


@pytest.mark.parametrize("option", ["exploration", "exploration_end", "temperature"])
def test_without_noise_there_is_no_ratio_and_without_warmth_no_gradient(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}.*must be above 0"):
        actor_of(CONTINUOUS, **{option: 0.0})


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
def test_the_distribution_of_some_agents_is_their_part_of_all(spec: TeamSpec) -> None:
    actor, batch = actor_of(spec, share="none"), seen(spec, 4)
    every, some = actor.distribution(batch).parameters(), actor.distribution(batch, [2, 0]).parameters()
    for key, value in some.items():
        torch.testing.assert_close(value, every[key][:, [2, 0]])


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
def test_an_agents_action_depends_on_its_own_parameters_only(spec: TeamSpec) -> None:
    actor, batch = actor_of(spec, share="none"), seen(spec, 6)
    weights = torch.randn(6, spec.action_features, generator=torch.Generator().manual_seed(4))
    (weights * actor.reparametrised(batch)[:, 1]).sum().backward()
    own = {id(parameter) for parameter in actor.agent_parameters([1])}
    for parameter in actor.parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moved == (id(parameter) in own)


# --- discrete -------------------------------------------------------------------------------------------------------------


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_samples_with_gradient_are_as_frequent_as_the_policy_says() -> None:
    """DPG-2: 1e5 samples of each agent; 99.99th percentiles of chi-square with 3, 1 and 2 degrees of freedom."""
    actor, batch = actor_of(DISCRETE, output_gain=3.0), seen(DISCRETE, 1)
    batch = batch.expand(100_000).clone()
    torch.manual_seed(0)
    sampled = actor.reparametrised(batch).detach()
    assert ((sampled == 0) | (sampled == 1)).all()
    assert (sampled.sum(-1) == 1).all()
    outputs = actor.network(batch[keys.OBSERVATION][:1])[0]
    for agent, (size, limit) in enumerate(zip((4, 2, 3), (21.1, 15.1, 18.4), strict=True)):
        probabilities = outputs[agent, :size].softmax(-1).detach()
        assert probabilities.max() - probabilities.min() > 0.1
        counts = sampled[:, agent].sum(0)
        assert (counts[size:] == 0).all(), "what an agent does not have is never chosen"
        assert chi_square(counts[:size], probabilities) < limit


def test_log_probabilities_and_bootstrap_are_the_categorical_policys() -> None:
    actor, batch = actor_of(DISCRETE), seen(DISCRETE, 50)
    torch.manual_seed(0)
    for chosen in (actor(batch.clone()), actor.bootstrap(batch.clone()), actor(batch.clone(), deterministic=True)):
        masked = actor.network(batch[keys.OBSERVATION]).masked_fill(~batch[keys.ACTION_MASK], -math.inf)
        expected = masked.log_softmax(-1).gather(-1, chosen[keys.ACTION].unsqueeze(-1))
        torch.testing.assert_close(chosen[keys.LOG_PROB], expected)
    samples = [actor.bootstrap(batch.clone())[keys.ACTION] for _ in range(2)]
    assert not torch.equal(*samples), "a sample, not the mode"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_gradient_is_the_relaxations(temperature: float) -> None:
    """``dy/dl = (diag(y) - y y^T) / tau`` at ``y = softmax((l + g) / tau)``, written out."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, dtype=torch.float64, generator=draw, requires_grad=True)
    noise, weight = torch.randn(2, 4, dtype=torch.float64, generator=draw)
    hard = straight_through(logits, noise, temperature)
    assert hard.tolist() == [float(index == (logits + noise).argmax()) for index in range(4)]
    (hard * weight).sum().backward()
    y = ((logits.detach() + noise) / temperature).exp()
    y = y / y.sum()
    torch.testing.assert_close(logits.grad, (torch.diag(y) - torch.outer(y, y)) @ weight / temperature)


def test_the_actors_temperature_is_that_of_the_relaxation() -> None:
    gradients = []
    for temperature in (1.0, 3.0):
        actor, batch = actor_of(DISCRETE, temperature=temperature), seen(DISCRETE, 5)
        torch.manual_seed(2)
        actor.reparametrised(batch)[..., 0].sum().backward()
        torch.manual_seed(2)
        logits = actor.distribution(batch).parameters()[keys.LOGITS].detach().requires_grad_()
        relaxed = ((logits - (-torch.rand_like(logits).log()).log()) / temperature).softmax(-1)[..., 0].sum()
        wanted = torch.autograd.grad(actor.distribution(batch).parameters()[keys.LOGITS],
                                     list(actor.parameters()), torch.autograd.grad(relaxed, logits)[0])  # fmt: skip
        for parameter, expected in zip(actor.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
        gradients.append([parameter.grad for parameter in actor.parameters()])
    assert all(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_finite_at_both_ends(dtype: torch.dtype) -> None:
    """DPG-2: U = 0 and U = 1."""
    noise = gumbel_from_uniform(torch.tensor([0.0, 1e-12, 0.5, 1.0], dtype=dtype))
    assert torch.isfinite(noise).all()
    assert (noise.diff() > 0).all()
    assert noise[2].item() == pytest.approx(-math.log(math.log(2)))
    assert noise[3] > 15


@pytest.mark.parametrize("uniform", [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)])
def test_no_noise_lifts_an_unavailable_action(uniform: tuple[float, ...]) -> None:
    logits = torch.tensor([0.3, -40.0, UNAVAILABLE], requires_grad=True)
    hard = straight_through(logits.log_softmax(-1), gumbel_from_uniform(torch.tensor(uniform)), 1.0)
    assert hard[2] == 0
    assert hard.sum() == 1
    (hard * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[2] == 0
