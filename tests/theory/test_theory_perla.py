"""The theorems of PERLA (Jafferjee et al. 2022) by enumeration of every executed action and every tuple of K samples.

``Q(a_i, a_-i)`` is marginalised to ``Qt(a_i) = E_{a_-i}[Q]`` and estimated by ``Qh_K(a_i)``, the mean over K samples of a_-i.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from marlkit.functional.losses import explained_variance, policy_gradient_loss
from marlkit.functional.marginal import action_code, categorical_from_uniform, counter_uniform, joint_actions, repeats
from marlkit.functional.reduce import masked_mean
from marlkit.functional.returns import generalised_advantage

assert_exact = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)
mean_per_row = torch.vmap(masked_mean)


class OneStep:
    """Agent i with ``policy`` [A], joint actions of the others drawn from ``others`` [J], and any action values [A, J]."""

    def __init__(self, action_value: np.ndarray, policy: np.ndarray, others: np.ndarray) -> None:
        self.action_value = torch.from_numpy(np.asarray(action_value, dtype=np.float64))
        self.policy = torch.from_numpy(np.asarray(policy, dtype=np.float64))
        self.others = torch.from_numpy(np.asarray(others, dtype=np.float64))
        self.marginal = self.action_value @ self.others
        self.variance_given_own = (self.action_value - self.marginal[:, None]).square() @ self.others

    @classmethod
    def random(cls, seed: int) -> OneStep:
        """Three own actions; two others with two actions each, whose joint policy is the product."""
        generator = np.random.default_rng(seed)
        others = np.outer(generator.dirichlet(np.ones(2)), generator.dirichlet(np.ones(2))).flatten()
        return cls(generator.normal(size=(3, 4)), generator.dirichlet(np.ones(3)), others)

    def tuples(self, samples: int) -> tuple[Tensor, Tensor]:
        """Every tuple of sampled joint actions of the others ``[J^K, K]`` and its probability ``[J^K]``."""
        drawn = joint_actions(samples, len(self.others))
        return drawn, self.others[drawn].prod(-1)

    def estimates(self, samples: int) -> tuple[Tensor, Tensor]:
        """``Qh_K`` for each own action and each tuple ``[A, J^K]``, repeated samples evaluated once; tuple probabilities."""
        drawn, probability = self.tuples(samples)
        order, count = (x.squeeze(-1) for x in repeats(action_code(drawn.unsqueeze(-1)).unsqueeze(-1)))
        values = self.action_value[:, drawn.gather(1, order)]
        return torch.stack([mean_per_row(own, count) for own in values]), probability

    def total_variance(self, table: Tensor, second: Tensor) -> float:
        weight = self.policy[:, None] * second
        mean = (weight * table).sum()
        return (weight * (table - mean).square()).sum().item()


def payoff_of_the_specification() -> OneStep:
    return OneStep(np.array([[1.0, 0.0], [0.0, 3.0]]), np.array([0.6, 0.4]), np.array([0.7, 0.3]))


def test_variances_by_hand() -> None:
    game = payoff_of_the_specification()
    assert game.marginal.tolist() == pytest.approx([0.7, 0.9], abs=1e-12)
    assert game.total_variance(game.action_value, game.others) == pytest.approx(0.8916, abs=1e-10)
    for samples, expected in ((1, 0.8916), (2, 0.4506), (10, 0.0978)):
        estimate, probability = game.estimates(samples)
        assert game.total_variance(estimate, probability) == pytest.approx(expected, abs=1e-10)
        weight = game.policy[:, None] * probability
        share = explained_variance(game.marginal[:, None].expand_as(estimate), estimate, weight)
        assert share.item() == pytest.approx(0.0096 / expected, abs=1e-10)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_variance_falls_with_the_number_of_samples_towards_that_of_the_marginal(seed: int, samples: int) -> None:
    """Theorem 1: ``Var(Qh_K) = Var(Q) / K + (K - 1) / K Var(Qt)``; given the own action ``Var(Q | a_i) / K``."""
    game = OneStep.random(seed)
    estimate, probability = game.estimates(samples)
    assert_exact(estimate @ probability, game.marginal)
    assert_exact((estimate - game.marginal[:, None]).square() @ probability, game.variance_given_own / samples)
    of_value = game.total_variance(game.action_value, game.others)
    of_marginal = game.total_variance(game.marginal[:, None], torch.ones(1))
    expected = of_value / samples + (samples - 1) / samples * of_marginal
    assert game.total_variance(estimate, probability) == pytest.approx(expected, abs=1e-10)


def row_gradients(game: OneStep, estimate: Tensor) -> Tensor:
    """Gradient of the loss in the logits for each own action and each column of ``estimate`` [A, X]: ``[A, X, A]``, ascent."""
    own = torch.arange(len(game.policy))

    def loss(logits: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
        log_prob = logits.log_softmax(-1).gather(0, action.view(1))
        return policy_gradient_loss(log_prob, advantage.view(1), torch.ones(1))

    per_row = torch.vmap(torch.vmap(torch.func.grad(loss), (None, None, 0)), (None, 0, 0))
    return -per_row(game.policy.log(), own, estimate)


def moments(gradient: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Expectation ``[A]`` and total variance (trace of the covariance) over rows ``[A, X, A]``."""
    mean = (weight.unsqueeze(-1) * gradient).sum((0, 1))
    return mean, (weight * (gradient - mean).square().sum(-1)).sum().item()


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_marginalising_keeps_the_gradient_and_removes_its_excess_variance(seed: int, samples: int) -> None:
    """Theorem 3 for any critic, right or wrong, and the variance of theorem 2: the excess is exactly one K-th."""
    game = OneStep.random(seed)
    score = torch.eye(3, dtype=torch.float64) - game.policy
    exact = (game.policy[:, None] * score * game.marginal[:, None]).sum(0)

    own = game.policy[:, None]
    of_executed, executed_variance = moments(row_gradients(game, game.action_value), own * game.others)
    of_marginal, marginal_variance = moments(row_gradients(game, game.marginal[:, None]), own)
    estimate, probability = game.estimates(samples)
    of_samples, sample_variance = moments(row_gradients(game, estimate), own * probability)

    assert_exact(of_executed, exact)
    assert_exact(of_marginal, exact)
    assert_exact(of_samples, exact)
    excess = (game.policy * score.square().sum(-1) * game.variance_given_own).sum().item()
    assert excess > 0.01
    assert executed_variance - marginal_variance == pytest.approx(excess, abs=1e-10)
    assert sample_variance - marginal_variance == pytest.approx(excess / samples, abs=1e-10)


def test_expected_gradient_of_a_whole_batch_is_that_of_the_marginal() -> None:
    """Theorem 3 through one batch loss: executed joint actions times sample tuples, weighted by their probabilities."""
    game = OneStep.random(seed=7)
    estimate, probability = game.estimates(2)
    logits = game.policy.log().requires_grad_()
    log_prob = logits.log_softmax(-1).view(3, 1, 1).expand(3, len(game.others), len(probability))
    weight = game.policy.view(3, 1, 1) * game.others.view(1, -1, 1) * probability
    losses = {
        "executed": policy_gradient_loss(log_prob, game.action_value.unsqueeze(2), weight),
        "sampled": policy_gradient_loss(log_prob, estimate.unsqueeze(1), weight),
        "executed minus sampled baseline": policy_gradient_loss(
            log_prob, game.action_value.unsqueeze(2) - estimate[:1].unsqueeze(1), weight
        ),
    }
    exact = game.policy * (game.marginal - game.policy @ game.marginal)
    for name, loss in losses.items():
        error = -torch.autograd.grad(loss, logits, retain_graph=True)[0] - exact
        assert error.abs().max() < 1e-10, name


def test_sample_mean_converges_to_the_marginal() -> None:
    game = payoff_of_the_specification()
    rows, samples = 400, 100
    seed = torch.arange(rows).unsqueeze(-1) * 7919
    drawn = categorical_from_uniform(game.others.log().float(), counter_uniform(seed, 0, samples))
    estimate = masked_mean(game.action_value[1, drawn], torch.ones(rows, samples))
    deviation = math.sqrt(game.variance_given_own[1].item() / (rows * samples))
    assert abs(estimate.item() - game.marginal[1].item()) < 5 * deviation
    per_row = mean_per_row(game.action_value[1, drawn], torch.ones(rows, samples))
    expected = game.variance_given_own[1].item() / samples
    assert per_row.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / rows))


@pytest.mark.parametrize("truncated", [False, True])
def test_advantage_from_sampled_values_is_unbiased(truncated: bool) -> None:
    """Style v: the mean advantage over all tuples of K samples at each of three states is that of the exact marginal values."""
    generator = np.random.default_rng(8)
    states = [OneStep(generator.normal(size=(1, 3)), np.ones(1), generator.dirichlet(np.ones(3))) for _ in range(3)]
    estimates, probabilities = zip(*(state.estimates(2) for state in states), strict=True)
    rows = list(itertools.product(range(9), repeat=3))
    sampled = torch.tensor([[estimates[t][0, x[t]].item() for t in range(3)] for x in rows], dtype=torch.float64)
    chances = [[math.prod(p[i].item() for p, i in zip(probabilities, x, strict=True))] for x in rows]
    weight = torch.tensor(chances, dtype=torch.float64)
    exact = torch.tensor([[state.marginal.item() for state in states]], dtype=torch.float64)
    reward = torch.tensor(generator.normal(size=(1, 2, 1)))
    terminated = torch.tensor([[[False], [not truncated]]])
    done = torch.tensor([[[False], [True]]])

    def advantage(values: Tensor) -> Tensor:
        size = len(values)
        flags = (terminated.expand(size, -1, -1), done.expand(size, -1, -1))
        value, following = values[:, :2, None, None], values[:, 1:, None, None]
        return generalised_advantage(reward.expand(size, -1, -1), value, following, *flags, gamma=0.9, lmbda=0.7)[0].view(size, 2)

    each = advantage(sampled)
    assert each.std(0).min() > 0.1
    expected = advantage(exact)[0]
    for step in range(2):
        assert masked_mean(each[:, step, None], weight).item() == pytest.approx(expected[step].item(), abs=1e-10)


def payoff(actions: Tensor) -> Tensor:
    """8 if all choose the first action, -12 if some but not all do, 0 if none does."""
    first = (actions == 0).sum(-1)
    return torch.where(first == actions.shape[-1], 8.0, torch.where(first > 0, -12.0, 0.0)).double()


def first_action_gradient(probability: float, agents: int, n_actions: int) -> dict[str, float]:
    """Expected ascent direction of agent 0's logit of the first action, every agent choosing it with ``probability``.

    From the executed payoffs and from their marginals over the others' policies; the latter by polynomial, not from the table.
    """
    rest = (1 - probability) / (n_actions - 1)
    logits = torch.tensor([probability, *[rest] * (n_actions - 1)], dtype=torch.float64).log().requires_grad_()
    actions = joint_actions(agents, n_actions)
    chosen = logits.detach()[actions].sum(-1).exp()
    log_prob = logits.log_softmax(-1)[actions[:, 0]]
    others = agents - 1
    if_first = 8 * probability**others - 12 * (1 - probability**others)
    if_not = -12 * (1 - (1 - probability) ** others)
    marginal = torch.tensor([if_first if first == 0 else if_not for first in actions[:, 0].tolist()], dtype=torch.float64)
    losses = {"executed": payoff(actions), "marginal": marginal}
    return {
        name: -torch.autograd.grad(policy_gradient_loss(log_prob, values, chosen), logits, retain_graph=True)[0][0].item()
        for name, values in losses.items()
    }


@pytest.mark.parametrize(("agents", "n_actions"), [(2, 2), (2, 3), (2, 6), (3, 2), (3, 3), (4, 2), (5, 2), (10, 2)])
def test_matrix_game_gradient_turns_at_the_phase_boundary(agents: int, n_actions: int) -> None:
    """The claim of the paper's matrix game does not follow from the gradient: below this probability it leads away from 8."""
    boundary = {2: 0.375, 3: 0.4365, 4: 0.4575, 5: 0.468, 10: 0.486}[agents]
    low, high = 0.01, 0.99
    while high - low > 1e-9:
        middle = (low + high) / 2
        gradient = first_action_gradient(middle, agents, n_actions)
        assert gradient["executed"] == pytest.approx(gradient["marginal"], abs=1e-10)
        low, high = (low, middle) if gradient["marginal"] > 0 else (middle, high)
    assert low == pytest.approx(boundary, abs=1e-9 if agents == 2 else 5e-4)
    # Both sides, well away from the root that the bisection assumes.
    for offset in (0.05, 0.2, 0.35):
        assert first_action_gradient(boundary + offset, agents, n_actions)["executed"] > 0
        assert first_action_gradient(boundary - offset, agents, n_actions)["executed"] < 0


@pytest.mark.parametrize(("start", "limit"), [(1 / 3, 0.0), (0.36, 0.0), (0.39, 8.0), (0.5, 8.0)])
def test_exact_policy_gradient_ends_on_the_side_of_the_boundary_where_it_began(start: float, limit: float) -> None:
    actions = joint_actions(2, 3)
    logits = torch.tensor([start, (1 - start) / 2, (1 - start) / 2], dtype=torch.float64).log().repeat(2, 1)
    for _ in range(400):
        logits = logits.detach().requires_grad_()
        log_prob = logits.log_softmax(-1)[torch.arange(2), actions]
        weight = log_prob.detach().sum(-1, keepdim=True).exp()
        # The mean over both agents of expected gradients; each agent's own by the factor of two.
        loss = 2 * policy_gradient_loss(log_prob, payoff(actions).unsqueeze(-1), weight)
        logits = logits - 0.5 * torch.autograd.grad(loss, logits)[0]
    assert masked_mean(payoff(actions).unsqueeze(-1), weight).item() == pytest.approx(limit, abs=0.2)


# --- Theorem 6: an actor-critic with either estimator converges ---------------------------------------------------------------


def expected_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """The exact gradient ``[2, A]`` of the expected reward of two independent softmax policies, ``rewards`` being ``[A, A]``."""
    logits = logits.detach().requires_grad_()
    own, other = logits.softmax(-1)
    return torch.autograd.grad(own @ rewards @ other, logits)[0]


@pytest.mark.parametrize("marginalised", [False, True], ids=["centralised", "PERLA"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_actor_critic_converges_to_a_point_without_gradient(seed: int, marginalised: bool) -> None:
    """A critic that learns from noisy rewards in faster steps than the actor's, K = 4 samples, two agents of three actions."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    logits, critic = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    first = expected_gradient(logits, rewards).norm()
    for step in range(1, 1001):
        policies = logits.softmax(-1)
        actions = torch.stack([policy.multinomial(64, replacement=True, generator=generator) for policy in policies], -1)
        noise = torch.randn(64, generator=generator, dtype=torch.float64)
        own, other = actions.unbind(-1)
        error = rewards[own, other] + noise - critic[own, other]
        critic = critic.index_put((own, other), step**-0.55 * error / 8, accumulate=True)
        if marginalised:
            drawn = torch.stack([policy.multinomial(256, replacement=True, generator=generator) for policy in policies], -1)
            samples = drawn.unflatten(0, (64, 4))
            values = [critic[own[:, None], samples[..., 1]].mean(-1), critic[samples[..., 0], other[:, None]].mean(-1)]
        else:
            values = [critic[own, other]] * 2
        logits = logits.detach().requires_grad_()
        log_prob = logits.log_softmax(-1)[torch.arange(2), actions].unsqueeze(-1)
        loss = 2 * policy_gradient_loss(log_prob, torch.stack(values, -1).unsqueeze(-1), torch.ones_like(log_prob))
        logits = logits - 6 * step**-0.65 * torch.autograd.grad(loss, logits)[0]
    assert expected_gradient(logits, rewards).norm() < 0.1 * first
