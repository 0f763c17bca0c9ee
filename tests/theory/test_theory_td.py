"""What TD learning converges to in a world of one state, reward one and a time limit of M steps (Pardo et al. 2018)."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from marlkit import keys
from marlkit.component import Estimator
from marlkit.estimators.gae import GaeEstimator
from marlkit.estimators.n_step import NStepEstimator
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.estimators.td_lambda import TdLambdaEstimator
from marlkit.functional.losses import value_loss
from marlkit.spec import Discrete, TeamSpec

GAMMA, LIMIT, AGENTS = 0.9, 5, 2
ENDLESS = 1 / (1 - GAMMA)


def rollout(value: float, steps: int, *, limit_is_terminal: bool) -> TensorDict:
    """As many environments as there are phases, each one step further in its episode, so that every phase weighs the same."""
    phase = (torch.arange(LIMIT).unsqueeze(1) + torch.arange(steps)) % LIMIT
    cut = (phase == LIMIT - 1).unsqueeze(-1)
    never = torch.zeros_like(cut)
    values = torch.full((LIMIT, steps, AGENTS, 1), value, dtype=torch.float64)
    batch = TensorDict({}, batch_size=[LIMIT, steps])
    batch.set(keys.STATE_VALUE, values)
    batch.set(keys.following(keys.STATE_VALUE), values)
    batch.set(keys.REWARD, torch.ones_like(values))
    batch.set(keys.TERMINATED, cut if limit_is_terminal else never)
    batch.set(keys.TRUNCATED, never if limit_is_terminal else cut)
    return batch.set(keys.DONE, cut)


def fixed_point(estimator: Estimator, *, limit_is_terminal: bool, steps: int, environments: int = LIMIT) -> float:
    """Batch TD: one number as critic, trained on the estimator's targets with the value loss."""
    critic = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        batch = estimator(rollout(critic.item(), steps, limit_is_terminal=limit_is_terminal)[:environments])
        target = batch[keys.VALUE_TARGET]
        loss = value_loss(critic.expand_as(target), None, target, torch.ones_like(target), clip=None, huber_delta=None)
        with torch.no_grad():
            critic -= torch.autograd.grad(loss, critic)[0]
    return critic.item()


def spec() -> TeamSpec:
    return TeamSpec(n_agents=AGENTS, observation=1, action=Discrete(2))


def one_step() -> list[Estimator]:
    return [
        GaeEstimator(spec(), gamma=GAMMA, lmbda=0.0),
        NStepEstimator(spec(), gamma=GAMMA, n=1),
        OneStepEstimator(spec(), gamma=GAMMA),
        TdLambdaEstimator(spec(), gamma=GAMMA, lmbda=0.0),
    ]


def longer() -> list[Estimator]:
    return [
        *(GaeEstimator(spec(), gamma=GAMMA, lmbda=lmbda) for lmbda in (0.5, 0.95, 1.0)),
        *(NStepEstimator(spec(), gamma=GAMMA, n=n) for n in (2, 3, 20)),
        *(TdLambdaEstimator(spec(), gamma=GAMMA, lmbda=lmbda) for lmbda in (0.5, 0.95, 1.0)),
    ]


@pytest.mark.parametrize("steps", [LIMIT, 7])
@pytest.mark.parametrize("index", range(len([*one_step(), *longer()])))
def test_a_bootstrapped_time_limit_leaves_the_endless_value(index: int, steps: int) -> None:
    estimator = [*one_step(), *longer()][index]
    assert fixed_point(estimator, limit_is_terminal=False, steps=steps) == pytest.approx(ENDLESS, abs=1e-9)


@pytest.mark.parametrize("index", range(len(one_step())))
def test_a_time_limit_taken_for_an_end_is_an_ending_at_random(index: int) -> None:
    """The state does not show the clock: each step ends the episode with probability 1/M."""
    expected = 1 / (1 - GAMMA * (1 - 1 / LIMIT))
    assert expected == pytest.approx(3.571, abs=1e-3)
    assert fixed_point(one_step()[index], limit_is_terminal=True, steps=LIMIT) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_n_step_fixed_point_with_a_terminal_limit(n: int) -> None:
    """With k steps left: all k rewards if k <= n, otherwise n rewards and a bootstrap."""
    rewards = [(1 - GAMMA ** min(k, n)) / (1 - GAMMA) for k in range(1, LIMIT + 1)]
    expected = sum(rewards) / LIMIT / (1 - (LIMIT - n) / LIMIT * GAMMA**n)
    estimator = NStepEstimator(spec(), gamma=GAMMA, n=n)
    # The environment of phase 0 alone: whole episodes, none cut by the end of the rollout.
    result = fixed_point(estimator, limit_is_terminal=True, steps=2 * LIMIT, environments=1)
    assert result == pytest.approx(expected, abs=1e-9)


def test_whole_returns_of_terminal_episodes() -> None:
    """From the start of an episode to its end: the mean over phases of the discounted rewards left."""
    batch = rollout(123.0, LIMIT, limit_is_terminal=True)[:1]
    GaeEstimator(spec(), gamma=GAMMA, lmbda=1.0)(batch)
    left = torch.tensor([(1 - GAMMA**k) / (1 - GAMMA) for k in range(LIMIT, 0, -1)], dtype=torch.float64)
    torch.testing.assert_close(batch[keys.VALUE_TARGET][0, :, 0, 0], left, rtol=0, atol=1e-10)
    torch.testing.assert_close(batch[keys.ADVANTAGE][0, :, 1, 0], left - 123.0, rtol=0, atol=1e-10)
