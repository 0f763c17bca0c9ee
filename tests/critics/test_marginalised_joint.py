"""The joint critic averaged over the others' actions, against enumeration and against the value at given actions."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDict

from marlkit import keys
from marlkit.critics.marginalised_joint import MarginalisedJointCritic
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing.batches import batch_for

SIZES = (3, 2, 3)
DISCRETE = TeamSpec(3, 4, Discrete(3), action_sizes=SIZES, team_reward=False)
CONTINUOUS = TeamSpec(
    3, 4, Continuous(2, low=((-1.0, -1.0),) * 3, high=((1.0, 1.0),) * 3), action_sizes=(2, 1, 2), team_reward=False
)


def critic_of(spec: TeamSpec, **options: object) -> MarginalisedJointCritic:
    torch.manual_seed(0)
    critic = MarginalisedJointCritic(spec, hidden=[6], value_norm=False, **options)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return critic.double()


def rows_for(critic: MarginalisedJointCritic) -> TensorDict:
    batch = batch_for(critic, (5,), views=1)
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


def at(critic: MarginalisedJointCritic, rows: TensorDict, agent: int, own: torch.Tensor, joint: torch.Tensor) -> torch.Tensor:
    """``Q_i`` ``[5]`` of the agent's own features and a joint action, by the critic's value at executed actions."""
    given = rows.copy().set(keys.JOINT_ACTION, joint.expand(5, 1, 3))
    features = torch.zeros(5, 3, 3, dtype=torch.float64)
    features[:, agent] = own
    value: torch.Tensor = critic.at_executed(critic._with_own(given, features))
    return value[:, agent, 0]


@pytest.mark.parametrize("share", ["all", "none"])
@pytest.mark.parametrize("view", ["state", "own"])
def test_the_exact_mean_and_its_slope_are_those_of_enumeration(share: str, view: str) -> None:
    critic = critic_of(DISCRETE, exact="always", share=share, view=view)
    rows = rows_for(critic)
    own = torch.nn.functional.one_hot(rows[keys.ACTION], 3).double().requires_grad_()
    found = critic.action_value(rows, own, torch.full((5, 1, 3, 3), float("nan"), dtype=torch.float64))[0, ..., 0]
    beliefs = rows[keys.OPPONENT_LOGITS].softmax(-1).expand(5, 3, 3, 3)
    for agent in range(3):
        others = [other for other in range(3) if other != agent]
        expected = torch.zeros(5, dtype=torch.float64)
        for joint in itertools.product(*map(range, SIZES)):
            if joint[agent]:
                continue  # the own entry is not read
            weight = torch.stack([beliefs[:, agent, other, joint[other]] for other in others]).prod(0)
            expected = expected + weight * at(critic, rows, agent, own[:, agent], torch.tensor(joint))
        torch.testing.assert_close(found[:, agent], expected, atol=1e-12, rtol=0)
        slope, right = (torch.autograd.grad(value.sum(), own, retain_graph=True)[0] for value in (found[:, agent], expected))
        torch.testing.assert_close(slope, right, atol=1e-12, rtol=0)
        assert slope[:, agent, : SIZES[agent]].abs().min() > 0


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_the_mean_over_beliefs_without_doubt_is_the_value_at_them(activation: str) -> None:
    critic = critic_of(CONTINUOUS, activation=activation, samples=3)
    rows = rows_for(critic)
    rows.set(keys.OPPONENT_SCALE, torch.zeros_like(rows[keys.OPPONENT_SCALE]))
    own = (3 * torch.randn(5, 3, 2, dtype=torch.float64)).requires_grad_()
    found = critic.action_value(rows, own, torch.zeros(5, 1, 3, 2, dtype=torch.float64))[0]
    certain = rows.copy().set(keys.JOINT_ACTION, rows[keys.OPPONENT_LOC])
    expected = critic.at_executed(critic._with_own(certain, own))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    slopes = [torch.autograd.grad(value.square().sum(), own)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, atol=1e-12, rtol=0)
    outside = own.detach().abs() > 1
    assert outside.any()
    assert (slopes[0][outside] == 0).all()  # the environment executes no more than the bound
    assert (slopes[0][:, 1, 1] == 0).all()  # a dimension that agent 1 does not have


def test_what_is_regressed_is_the_value_at_the_executed_actions() -> None:
    critic = critic_of(CONTINUOUS)
    rows = rows_for(critic)
    before = critic.predict(rows)
    written = critic(rows.copy())
    torch.testing.assert_close(written[keys.EXECUTED_VALUE], before)
    rows.set(keys.OPPONENT_LOC, rows[keys.OPPONENT_LOC] + 1)
    assert torch.equal(critic.predict(rows), before)
    assert not torch.allclose(critic(rows.copy())[keys.ACTION_VALUE], written[keys.ACTION_VALUE])
