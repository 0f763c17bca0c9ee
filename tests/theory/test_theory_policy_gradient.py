"""Policy gradient theorem on enumerated games: what the losses' gradients are, against differences of the exact return.

A batch holds every trajectory once and its probability as weight, so that a batch mean is an expectation, not an estimate.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from marlkit.functional.losses import policy_gradient_loss, ppo_clip_loss
from marlkit.functional.reduce import masked_mean
from marlkit.functional.returns import generalised_advantage, n_step_return

assert_exact = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)

GAMMA, ACTIONS, START, MIDDLE, END = 0.8, 3, 0, (1, 2), 3
ABSURD = 1e6
JOINT = list(itertools.product(range(ACTIONS), repeat=2))


class TwoStepGame:
    """Two agents, three states: the start leads to one of two middle states or ends; every action there ends the game."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.logits = generator.normal(size=(2, 3, ACTIONS))
        self.first_reward = generator.normal(size=(ACTIONS, ACTIONS, 4))
        self.second_reward = generator.normal(size=(3, ACTIONS, ACTIONS))
        transition = generator.random((ACTIONS, ACTIONS, 4))
        transition[:, :, START] = 0.0
        self.transition = transition / transition.sum(-1, keepdims=True)

    def state_values(self, logits: np.ndarray) -> np.ndarray:
        """Exact value of each state (zero of the end), by plain loops."""
        policy = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        value = np.zeros(4)
        for state, (a, b) in itertools.product(MIDDLE, JOINT):
            value[state] += policy[0, state, a] * policy[1, state, b] * self.second_reward[state, a, b]
        for (a, b), following in itertools.product(JOINT, (*MIDDLE, END)):
            probability = policy[0, START, a] * policy[1, START, b] * self.transition[a, b, following]
            value[START] += probability * (self.first_reward[a, b, following] + GAMMA * value[following])
        return value

    def exact_gradient(self) -> Tensor:
        """Differences of the exact return of the start, fourth order in the step."""
        gradient, step = np.zeros_like(self.logits), 1e-3
        for index in np.ndindex(*self.logits.shape):
            for multiple, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                moved = self.logits.copy()
                moved[index] += multiple * step
                gradient[index] += factor * self.state_values(moved)[START] / (12 * step)
        return torch.from_numpy(gradient)


@dataclass
class Trajectories:
    """Every trajectory of a game, ``R`` rows of two steps.

    ``state`` and ``following`` are [R, 2], ``action`` [R, 2, N], ``reward`` [R, 2, 1], ``weight`` [R, 2, 1, 1].
    """

    state: Tensor
    following: Tensor
    action: Tensor
    reward: Tensor
    weight: Tensor

    @property
    def terminated(self) -> Tensor:
        return (self.following == END).unsqueeze(-1)

    def log_prob(self, logits: Tensor) -> Tensor:
        """``[R, 2, N, 1]`` with gradient to ``logits`` [N, S, A]."""
        agents = torch.arange(2)
        return logits.log_softmax(-1)[agents, self.state.unsqueeze(-1), self.action].unsqueeze(-1)

    def per_agent(self, state_value: np.ndarray, states: Tensor) -> Tensor:
        return torch.from_numpy(state_value)[states][:, :, None, None].expand(-1, -1, 2, 1)


def enumerate_trajectories(game: TwoStepGame) -> Trajectories:
    """Weight: probability of the trajectory times ``gamma^t``; zero for the second step of a game that ended in the first."""
    policy = np.exp(game.logits) / np.exp(game.logits).sum(-1, keepdims=True)
    rows = []
    for (a, b), middle in itertools.product(JOINT, (*MIDDLE, END)):
        probability = policy[0, START, a] * policy[1, START, b] * game.transition[a, b, middle]
        reward = game.first_reward[a, b, middle]
        if middle == END:
            rows.append(((START, START), (END, END), ((a, b), (0, 0)), (reward, ABSURD), (probability, 0.0)))
            continue
        for c, d in JOINT:
            both = probability * policy[0, middle, c] * policy[1, middle, d]
            rewards = (reward, game.second_reward[middle, c, d])
            rows.append(((START, middle), (middle, END), ((a, b), (c, d)), rewards, (both, GAMMA * both)))
    columns = list(zip(*rows, strict=True))
    state, following, action = (torch.tensor(column) for column in columns[:3])
    reward_column, weight_column = (torch.tensor(column, dtype=torch.float64) for column in columns[3:])
    return Trajectories(state, following, action, reward_column.unsqueeze(-1), weight_column[:, :, None, None])


def ascent(loss: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weighted sum, from the loss, which is the negative mean over steps and agents."""
    total = weight.sum() * 2
    assert total > 1
    return -torch.autograd.grad(loss, logits)[0] * total


def advantage_of(game: TwoStepGame, batch: Trajectories, estimator: str, seed: int) -> Tensor:
    """An advantage ``[R, 2, N, 1]`` that leaves the policy gradient unbiased, for different reasons."""
    wrong = np.append(np.random.default_rng(seed).normal(size=3), ABSURD)
    exact = game.state_values(game.logits)
    exact[END] = ABSURD
    values = wrong if estimator in ("whole return, wrong values", "2-step, baseline of others' actions") else exact
    value, next_value = batch.per_agent(values, batch.state), batch.per_agent(values, batch.following)
    flags = (batch.terminated, batch.terminated)
    if estimator == "2-step, baseline of others' actions":
        table = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 3, ACTIONS)))
        others = batch.action.flip(-1)
        baseline = table[torch.arange(2), batch.state.unsqueeze(-1), others].unsqueeze(-1)
        return n_step_return(batch.reward, next_value, *flags, gamma=GAMMA, n=2) - baseline
    if estimator == "1-step, exact values":
        return n_step_return(batch.reward, next_value, *flags, gamma=GAMMA, n=1) - value
    lmbda = 0.3 if estimator == "trace, exact values" else 1.0
    return generalised_advantage(batch.reward, value, next_value, *flags, gamma=GAMMA, lmbda=lmbda)[0]


ESTIMATORS = (
    "whole return, wrong values",
    "trace, exact values",
    "1-step, exact values",
    "2-step, baseline of others' actions",
)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient_is_the_gradient_of_the_return(estimator: str, seed: int) -> None:
    game = TwoStepGame(seed)
    batch = enumerate_trajectories(game)
    assert batch.weight[:, 0].sum().item() == pytest.approx(1.0)
    advantage = advantage_of(game, batch, estimator, seed + 100)
    logits = torch.from_numpy(game.logits).requires_grad_()
    log_prob, expected = batch.log_prob(logits), game.exact_gradient()
    assert expected.abs().max() > 0.01
    loss = policy_gradient_loss(log_prob, advantage, batch.weight)
    assert_exact(ascent(loss, logits, batch.weight), expected)
    loss = ppo_clip_loss(batch.log_prob(logits), log_prob, advantage, batch.weight, clip_epsilon=0.2)
    assert_exact(ascent(loss, logits, batch.weight), expected)


def test_the_estimators_agree_in_expectation_only() -> None:
    game = TwoStepGame(seed=1)
    batch = enumerate_trajectories(game)
    counted = batch.weight.expand(-1, -1, 2, -1) > 0
    estimates = [advantage_of(game, batch, estimator, seed=0)[counted] for estimator in ESTIMATORS]
    for one, other in itertools.combinations(estimates, 2):
        assert (one - other).abs().max() > 0.1


def test_a_baseline_of_the_own_action_would_bias_the_gradient() -> None:
    game = TwoStepGame(seed=0)
    batch = enumerate_trajectories(game)
    logits = torch.from_numpy(game.logits).requires_grad_()
    advantage = advantage_of(game, batch, "whole return, wrong values", 0)
    own = torch.from_numpy(np.random.default_rng(0).normal(size=ACTIONS))[batch.action].unsqueeze(-1)
    loss = policy_gradient_loss(batch.log_prob(logits), advantage - own, batch.weight)
    assert (ascent(loss, logits, batch.weight) - game.exact_gradient()).abs().max() > 0.01


# Coordination without communication: the reward is one if and only if the two agents do different things.
CHOICES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
DIFFERENT = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)


def payoff_and_gradient(logits: Tensor) -> tuple[float, Tensor]:
    """Exact payoff and its gradient from the loss; ``logits`` [N, A], or [1, A] for a policy that both agents share."""
    logits = logits.detach().requires_grad_()
    log_policy = logits.expand(2, 2).log_softmax(-1)
    log_prob = log_policy[torch.arange(2), CHOICES].unsqueeze(-1)
    weight = log_prob.detach().sum(1, keepdim=True).exp()
    payoff = masked_mean(DIFFERENT, weight.flatten()).item()
    loss = policy_gradient_loss(log_prob, DIFFERENT.view(4, 1, 1), weight)
    return payoff, ascent(loss, logits, weight)


def climb(logits: Tensor, steps: int = 300, rate: float = 2.0) -> list[float]:
    payoffs = []
    for _ in range(steps):
        payoff, gradient = payoff_and_gradient(logits)
        payoffs.append(payoff)
        logits = logits + rate * gradient
    return payoffs


@pytest.mark.parametrize("seed", range(4))
def test_a_shared_policy_without_identity_cannot_tell_the_agents_apart(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, 2, generator=generator, dtype=torch.float64)
    payoffs = climb(shared)
    assert max(payoffs) <= 0.5 + 1e-12
    assert payoffs[-1] == pytest.approx(0.5, abs=1e-6)
    separate = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    assert climb(separate)[-1] > 0.99


def test_gradient_of_a_shared_policy_is_the_sum_over_agents() -> None:
    shared = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    _, together = payoff_and_gradient(shared)
    _, apart = payoff_and_gradient(shared.expand(2, 2))
    p = torch.softmax(shared[0], 0)[0].item()
    slope = 2 * (1 - 2 * p) * p * (1 - p)  # of 2 p (1 - p) by the logit of p
    assert_exact(together, torch.tensor([[slope, -slope]], dtype=torch.float64))
    assert_exact(apart.sum(0, keepdim=True), together)
