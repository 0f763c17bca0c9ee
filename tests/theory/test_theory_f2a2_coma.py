"""F2A2's Proposition 3, enumerated in the paper's costs: a game of one step, two agents, three actions each, tables."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from stepping import Descent, learning
from tensordict import TensorDict
from torch import nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.critics.counterfactual import CounterfactualCritic
from marlkit.errors import OptionError
from marlkit.nn.networks import TeamLinear
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.spec import Discrete, TeamSpec

SPEC = TeamSpec(2, 1, Discrete(3), state=1, team_reward=False)
POLICY = np.array([[1, 1, 2], [2, 1, 1]]) / 4
"""Probabilities ``[N, A]``: every joint action is a whole number of times in 16."""

JOINT = list(itertools.product(range(3), repeat=2))
VALUE, TARGET = np.random.default_rng(0).normal(size=(2, 2, 3, 3))
"""``Q_i(a)`` and ``y_i(a)`` in rewards, ``[N, A, A]``."""


def own_first(agent: int, joint: tuple[int, ...]) -> tuple[int, int]:
    """The agent's own action and the other's."""
    return joint[agent], joint[1 - agent]


def in_costs(kappa: float, alpha2: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradients by the logits ``[N, A]``, and by the reward's ``Q_i(b, a_-i)`` ``[N, A, A]``; ``alpha1 = 1``.

    ``kappa`` weighs what COMA does not have: ``delta^2`` in the actor's gradient, ``alpha1`` in the critic's.
    """
    psi, phi = np.zeros((2, 3)), np.zeros((2, 3, 3))
    for joint in JOINT:
        probability = POLICY[0, joint[0]] * POLICY[1, joint[1]]
        for agent in range(2):
            own, other = own_first(agent, joint)
            cost, goal = -VALUE[agent][joint], -TARGET[agent][joint]
            alternatives = [(b, other) if agent == 0 else (other, b) for b in range(3)]
            baseline = sum(POLICY[agent, b] * -VALUE[agent][alternative] for b, alternative in enumerate(alternatives))
            delta = cost - goal
            score = np.eye(3)[own] - POLICY[agent]
            psi[agent] += probability * score * (cost - baseline + kappa * alpha2 * delta**2)
            # The cost's derivative by the reward's Q is -1.
            phi[agent, own, other] -= probability * (kappa + 2 * alpha2 * delta)
    return psi, phi


def plays() -> TensorDict:
    """Every joint action as often as it happens in 16 plays, with the values of the tables."""
    often = [joint for joint in JOINT for _ in range(round(16 * POLICY[0, joint[0]] * POLICY[1, joint[1]]))]
    assert len(often) == 16
    batch = TensorDict({}, batch_size=[16, 1])
    batch.set(keys.OBSERVATION, torch.zeros(16, 1, 2, 1).double()).set(keys.STATE, torch.zeros(16, 1, 1).double())
    action = torch.tensor(often).unsqueeze(1)
    batch.set(keys.ACTION, action).set(keys.JOINT_ACTION, action.unsqueeze(2))
    batch.set(keys.ACTION_MASK, torch.ones(16, 1, 2, 3).bool()).set(keys.ALIVE, torch.ones(16, 1, 2, 1).bool())

    def of(table: Any) -> torch.Tensor:
        found = np.array([[table(agent, joint) for agent in range(2)] for joint in often])
        return torch.from_numpy(found).view(16, 1, 2, 1)

    def advantage(agent: int, joint: tuple[int, ...]) -> float:
        others = [(b, joint[1]) if agent == 0 else (joint[0], b) for b in range(3)]
        return float(VALUE[agent][joint] - sum(POLICY[agent, b] * VALUE[agent][other] for b, other in enumerate(others)))

    batch.set(keys.LOG_PROB, of(lambda agent, joint: np.log(POLICY[agent, joint[agent]])))
    batch.set(keys.LOGITS, torch.from_numpy(np.log(POLICY)).expand(16, 1, 2, 3).clone())
    batch.set(keys.ACTION_VALUE, of(lambda agent, joint: VALUE[agent][joint]))
    batch.set(keys.VALUE_TARGET, of(lambda agent, joint: TARGET[agent][joint]))
    return batch.set(keys.ADVANTAGE, of(advantage))


def tables() -> tuple[StochasticActor, CounterfactualCritic]:
    """An actor and a critic whose parameters are the tables."""
    actor = StochasticActor(SPEC, hidden=[], share="none").double()
    critic = CounterfactualCritic(SPEC, hidden=[], share="none", value_norm=False).double()
    layer = actor.network.layers[0]
    assert isinstance(layer, TeamLinear)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.zero_()
        for agent in range(2):
            layer.biases[agent].copy_(torch.from_numpy(np.log(POLICY[agent])))
            table = torch.from_numpy(VALUE[agent] if agent == 0 else VALUE[agent].T)
            critic.action_layer.weights[agent][:, 3 * (1 - agent) : 3 * (2 - agent)] = table
    return actor, critic


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("value_coef", [0.5, 3.0])
def test_gradients_are_those_of_proposition_3(kappa: float, value_coef: float) -> None:
    actor, critic = tables()
    update = PolicyGradientUpdate(SPEC, coupling=kappa, value_coef=value_coef, entropy_coef=0.0)
    both = nn.ModuleList([actor, critic])
    descent = Descent(both)
    update.update(plays(), learning(actor, critic, descent))
    (found,) = descent.gradients
    by_name = dict(zip((name for name, _ in both.named_parameters()), found, strict=True))
    psi, phi = in_costs(kappa, value_coef / 2)
    for agent in range(2):  # the losses are means over two agents
        by_logits = by_name[f"0.network.layers.0.biases.{agent}"]
        by_values = by_name[f"1.action_layer.weights.{agent}"]
        assert by_logits is not None
        assert by_values is not None
        np.testing.assert_allclose(2 * by_logits.numpy(), psi[agent], atol=1e-12, rtol=0)
        others = slice(3 * (1 - agent), 3 * (2 - agent))
        np.testing.assert_allclose(2 * by_values[:, others].numpy(), phi[agent], atol=1e-12, rtol=0)


def test_the_unit_of_values_changes_no_gradient_but_by_a_factor() -> None:
    """In normalised units errors shrink by the deviation, and the actor's objective keeps its unit."""
    gradients = {}
    for deviation in (1.0, 2.0):
        actor, critic = tables()
        critic.normaliser = ValueNormaliser(enabled=True).double()
        critic.normaliser.variance.fill_(deviation**2)
        update = PolicyGradientUpdate(SPEC, coupling=1.0, value_coef=2.0, entropy_coef=0.0)
        prepared = update.prepare(plays(), learning(actor, critic, Descent(critic)))
        gradients[deviation] = prepared[keys.ADVANTAGE] - plays()[keys.ADVANTAGE]
    torch.testing.assert_close(gradients[1.0], 2 * gradients[2.0])
    assert gradients[1.0].max() < 0


def test_what_cannot_be_coupled_is_refused() -> None:
    with pytest.raises(OptionError, match="must be 0 where the critic's loss weighs nothing"):
        PolicyGradientUpdate(SPEC, coupling=1.0, value_coef=0.0)
    actor, _ = tables()
    critic = CounterfactualCritic(SPEC, hidden=[], twins=True, value_norm=False).double()
    with pytest.raises(OptionError, match="Proposition 3 couples one"):
        PolicyGradientUpdate(SPEC, coupling=1.0).update(plays(), learning(actor, critic, Descent(critic)))
