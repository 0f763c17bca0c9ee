"""The policy gradient update against differences of an exact return, and with one agent against A2C written out on its own."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scripted import FixedData, ScriptedEnvironment, fit, learner_of, random_script
from stepping import Descent, learning
from tensordict import TensorDict
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.local import LocalCritic
from marlkit.data.rollout import RolloutData
from marlkit.estimators.gae import GaeEstimator
from marlkit.nn.networks import TeamLinear, TeamNetwork
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.optim.sequential import SequentialUpdate
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.training.learner import Learner

# --- PG-1: two agents, two steps, tables ------------------------------------------------------------------------------------

STATES, ACTIONS, START = 3, 2, 0
JOINT = list(itertools.product(range(ACTIONS), repeat=2))
QUARTERS = np.array([[[1, 3], [2, 2], [3, 1]], [[2, 2], [1, 3], [3, 1]]]) / 4
"""Probabilities ``[N, S, A]``: every play is a whole number of times in 256."""


class TwoSteps:
    """A team reward at the start, a joint action that leads to one of two states, and a reward there."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.reward = generator.normal(size=(STATES, ACTIONS, ACTIONS))
        self.leads_to = generator.integers(1, 3, size=(ACTIONS, ACTIONS))
        self.leads_to[0, 0], self.leads_to[1, 1] = 1, 2

    def expected_return(self, logits: np.ndarray) -> float:
        """The undiscounted return of ``logits`` ``[N, S, A]``, by plain loops."""
        policy = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        total = 0.0
        for a, b in JOINT:
            later = self.leads_to[a, b]
            first = policy[0, START, a] * policy[1, START, b]
            total += first * self.reward[START, a, b]
            for c, d in JOINT:
                total += first * policy[0, later, c] * policy[1, later, d] * self.reward[later, c, d]
        return total

    def gradient(self, logits: np.ndarray) -> Tensor:
        """Differences of the return, fourth order in the step."""
        found, step = np.zeros_like(logits), 1e-3
        for index in np.ndindex(*logits.shape):
            for multiple, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                moved = logits.copy()
                moved[index] += multiple * step
                found[index] += factor * self.expected_return(moved) / (12 * step)
        return torch.from_numpy(found)

    def batch(self, spec: TeamSpec, baseline: np.ndarray) -> TensorDict:
        """Every pair of joint actions as often as it happens in 256 plays; returns to go less a baseline of the state."""
        plays = []
        for (a, b), (c, d) in itertools.product(JOINT, JOINT):
            later = self.leads_to[a, b]
            probability = QUARTERS[0, START, a] * QUARTERS[1, START, b] * QUARTERS[0, later, c] * QUARTERS[1, later, d]
            second = self.reward[later, c, d]
            to_go = (self.reward[START, a, b] + second - baseline[START], second - baseline[later])
            plays += [((START, later), ((a, b), (c, d)), to_go)] * round(256 * probability)
        assert len(plays) == 256
        states, actions, advantages = (torch.tensor(np.array(column)) for column in zip(*plays, strict=True))
        batch = TensorDict({}, batch_size=list(states.shape))
        seen = nn.functional.one_hot(states, STATES).double()
        batch.set(keys.OBSERVATION, seen.unsqueeze(-2).expand(-1, -1, 2, -1)).set(keys.STATE, seen)
        batch.set(keys.ACTION, actions)
        batch.set(keys.ACTION_MASK, torch.ones(*states.shape, 2, ACTIONS, dtype=torch.bool))
        batch.set(keys.ALIVE, torch.ones(*states.shape, 2, 1, dtype=torch.bool))
        for key in (keys.ADVANTAGE, keys.VALUE_TARGET, keys.STATE_VALUE):
            batch.set(key, advantages[..., None, None].expand(-1, -1, 2, 1))
        agents = torch.arange(2)
        probabilities = torch.from_numpy(QUARTERS)[agents, states.unsqueeze(-1), actions]
        return batch.set(keys.LOG_PROB, probabilities.log().unsqueeze(-1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sequential", [False, True])
def test_gradient_is_that_of_the_return(seed: int, sequential: bool) -> None:
    game = TwoSteps(seed)
    spec = TeamSpec(2, STATES, Discrete(ACTIONS), state=STATES, team_reward=True)
    actor = StochasticActor(spec, hidden=[], share="none").double()
    layer = actor.network.layers[0]
    assert isinstance(layer, TeamLinear)
    with torch.no_grad():
        for weight, bias, table in zip(layer.weights, layer.biases, QUARTERS, strict=True):
            weight.copy_(torch.from_numpy(table).log().T)
            bias.zero_()
    step = PolicyGradientUpdate(spec, entropy_coef=0.0, value_coef=0.0)
    update = SequentialUpdate(spec, step=step) if sequential else step
    descent = Descent(layer.weights)
    batch = game.batch(spec, np.random.default_rng(seed + 10).normal(size=STATES))
    update.update(batch, learning(actor, CentralisedCritic(spec, hidden=[4]).double(), descent))
    expected = game.gradient(np.log(QUARTERS))
    assert expected.abs().max() > 0.05
    # A mean over two steps, and over two agents where both learn at once.
    count = 2 if sequential else 4
    for agent in range(2):
        found = next(g for g in (each[agent] for each in descent.gradients) if g is not None)
        torch.testing.assert_close(-count * found.T, expected[agent], rtol=0, atol=1e-10)


# --- HAA2C: several epochs ----------------------------------------------------------------------------------------------------

EIGHTHS = np.array([[1, 7], [5, 3], [2, 6]]) / 8
"""Probabilities ``[N, A]`` of three agents in one state: every joint action is a whole number of times in 512."""


def expected_payoff(payoff: np.ndarray, logits: np.ndarray) -> float:
    """``sum_a prod_i pi_i(a_i) r(a)`` of ``logits`` ``[N, A]``, by a plain loop."""
    policy = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return float(sum(np.prod([policy[i, a] for i, a in enumerate(joint)]) * payoff[joint] for joint in np.ndindex(payoff.shape)))


def every_joint_action(spec: TeamSpec, payoff: np.ndarray) -> TensorDict:
    """Every joint action of the one state, as often as it happens in 512 plays of :data:`EIGHTHS`."""
    counts = [round(512 * np.prod([EIGHTHS[i, a] for i, a in enumerate(joint)])) for joint in np.ndindex(payoff.shape)]
    actions = torch.tensor([joint for joint, n in zip(np.ndindex(payoff.shape), counts, strict=True) for _ in range(n)])
    shape = (len(actions), 1)
    batch = TensorDict({keys.ACTION: actions.unsqueeze(1), keys.STATE: torch.ones(*shape, 1).double()}, batch_size=shape)
    batch.set(keys.OBSERVATION, torch.ones(*shape, 3, 1).double())
    batch.set(keys.ACTION_MASK, torch.ones(*shape, 3, 2, dtype=torch.bool))
    batch.set(keys.ALIVE, torch.ones(*shape, 3, 1, dtype=torch.bool))
    gained = torch.from_numpy(payoff)[tuple(actions.T)].view(*shape, 1, 1).expand(-1, -1, 3, -1)
    for key in (keys.ADVANTAGE, keys.VALUE_TARGET, keys.STATE_VALUE):
        batch.set(key, gained)
    played = torch.from_numpy(EIGHTHS)[torch.arange(3), actions].log()
    return batch.set(keys.LOG_PROB, played.view(*shape, 3, 1))


@pytest.mark.parametrize(("surrogate", "right"), [("ratio", 9), ("log_prob", 3)])
@pytest.mark.parametrize("order", [[2, 0, 1], "fixed", "random"])
def test_every_step_of_haa2c_follows_the_return_at_the_policies_as_they_are(surrogate: Any, right: int, order: Any) -> None:
    """Also in later epochs and after others have moved; without the ratio, in the first step of each agent alone."""
    payoff = np.random.default_rng(0).normal(size=(2, 2, 2))
    spec = TeamSpec(3, 1, Discrete(2), team_reward=True)
    actor = StochasticActor(spec, hidden=[], share="none").double()
    layer = actor.network.layers[0]
    assert isinstance(layer, TeamLinear)
    with torch.no_grad():
        for weight, bias, row in zip(layer.weights, layer.biases, EIGHTHS, strict=True):
            weight.zero_()
            bias.copy_(torch.from_numpy(row).log())
    agreed: list[bool] = []
    turns: list[int] = []

    def minimise(loss: Tensor, max_grad_norm: float | None) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(layer.biases), allow_unused=True)
        (agent,) = [i for i, gradient in enumerate(found) if gradient is not None]
        gradient = found[agent]
        assert gradient is not None
        logits, wanted = np.stack([bias.detach().numpy() for bias in layer.biases]), np.zeros(2)
        for index in range(2):
            for multiple, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                moved = logits.copy()
                moved[agent, index] += multiple * 1e-3
                wanted[index] += factor * expected_payoff(payoff, moved) / (12 * 1e-3)
        agreed.append(np.allclose(-gradient.numpy(), wanted, rtol=0, atol=1e-10))
        turns.append(agent)
        with torch.no_grad():
            layer.biases[agent].sub_(gradient, alpha=2.0)
        return {}

    step = PolicyGradientUpdate(spec, surrogate=surrogate, epochs=3, entropy_coef=0.0)
    update = SequentialUpdate(spec, step=step, order=order)
    learn = learning(actor, CentralisedCritic(spec, hidden=[4]).double(), minimise)
    step.fit_critic = lambda batch, learning: {}  # type: ignore[method-assign]
    update.update(every_joint_action(spec, payoff), learn)
    assert len(agreed) == 9
    assert sum(agreed) == right
    assert all(agreed[::3])
    assert turns[::3] == {"[2, 0, 1]": [2, 0, 1], "fixed": [0, 1, 2]}.get(str(order), turns[::3])


# --- one agent --------------------------------------------------------------------------------------------------------------

GAMMA, LMBDA, ENTROPY, VALUE, LR, MAX_NORM, ITERATIONS = 0.9, 0.8, 0.05, 0.5, 3e-3, 0.3, 3
SOLO = {
    "discrete": TeamSpec(1, 4, Discrete(3), team_reward=True),
    "continuous": TeamSpec(1, 4, Continuous(2), team_reward=True),
}


def solo_learner(kind: str, critic: type[LocalCritic] | type[CentralisedCritic], sequential: bool, **options: Any) -> Learner:
    spec = SOLO[kind]
    torch.manual_seed(5)
    actor = StochasticActor(spec, hidden=[6], share="none", output_gain=1.0)
    step = PolicyGradientUpdate(spec, **{"entropy_coef": ENTROPY, "value_coef": VALUE, "max_grad_norm": MAX_NORM, **options})
    return learner_of(
        ScriptedEnvironment(spec, random_script(spec, envs=5, steps=12 * ITERATIONS)),
        actor,
        critic=critic(spec, hidden=[5], value_norm=False),
        estimator=GaeEstimator(spec, gamma=GAMMA, lmbda=LMBDA),
        update=SequentialUpdate(spec, step=step) if sequential else step,
        data=RolloutData(spec, steps=12),
        optimizer=AdamOptimizer(spec, lr=LR),
    )


class PlainA2c:
    """Advantage actor-critic of one agent in double precision, with plain tensors."""

    def __init__(self, learner: Learner) -> None:
        network = learner.critic.get_submodule("network")
        assert isinstance(network, TeamNetwork)
        self.actor = [p.detach().double().requires_grad_() for p in learner.actor.parameters()]
        self.critic = [p.detach().double().requires_grad_() for p in network.parameters()]
        self.discrete = learner.env.spec.discrete
        self.optimizer = torch.optim.Adam([*self.actor, *self.critic], lr=LR, eps=learner.optimizer.options["eps"])

    @staticmethod
    def perceptron(layers: list[Tensor], x: Tensor) -> Tensor:
        first, second, third, fourth = layers
        return (x @ first.T + second).tanh() @ third.T + fourth

    def policy(self, seen: Tensor) -> torch.distributions.Distribution:
        if self.discrete:
            return torch.distributions.Categorical(logits=self.perceptron(self.actor, seen))
        *layers, deviation = self.actor
        return torch.distributions.Independent(torch.distributions.Normal(self.perceptron(layers, seen), deviation.exp()), 1)

    def update(self, batch: TensorDict) -> None:
        seen, following = batch[keys.OBSERVATION][:, :, 0].double(), batch["next", "agents", "observation"][:, :, 0].double()
        reward, ended = batch[keys.REWARD][:, :, 0, 0].double(), batch[keys.TERMINATED][..., 0].double()
        done, action = batch[keys.DONE][..., 0].double(), batch[keys.ACTION][:, :, 0]
        value = self.perceptron(self.critic, seen)[..., 0]
        with torch.no_grad():
            later = self.perceptron(self.critic, following)[..., 0]
            error = reward + GAMMA * (1 - ended) * later - value
            advantage = torch.zeros_like(error)
            trace = torch.zeros_like(error[:, 0])
            for t in reversed(range(error.shape[1])):
                trace = error[:, t] + GAMMA * LMBDA * (1 - done[:, t]) * trace
                advantage[:, t] = trace
            goal = advantage + value
        policy = self.policy(seen)
        gain = (policy.log_prob(action) * advantage).mean() + ENTROPY * policy.entropy().mean()
        self.optimizer.zero_grad()
        (VALUE * ((value - goal) ** 2).mean() / 2 - gain).backward()
        for own in (self.actor, self.critic):
            torch.nn.utils.clip_grad_norm_(own, MAX_NORM)
        self.optimizer.step()


@pytest.mark.parametrize("kind", SOLO)
@pytest.mark.parametrize("critic", [LocalCritic, CentralisedCritic])
@pytest.mark.parametrize("sequential", [False, True])
def test_one_agent_is_plain_a2c(kind: str, critic: type[LocalCritic] | type[CentralisedCritic], sequential: bool) -> None:
    """IA2C and MAA2C, at once or in turn."""
    learner = solo_learner(kind, critic, sequential)
    plain = PlainA2c(learner)
    begun = [p.clone() for p in (*plain.actor, *plain.critic)]
    batches = [learner.data.collect(learner.env, learner.actor).clone() for _ in range(ITERATIONS)]
    assert all(batch[flag].sum() >= 2 for batch in batches for flag in (keys.TERMINATED, keys.TRUNCATED))
    learner.data = FixedData(learner.env.spec, batches)
    fit(learner, ITERATIONS)
    for batch in batches:
        plain.update(batch)
    network = learner.critic.get_submodule("network")
    ended = [*learner.actor.parameters(), *network.parameters()]
    for got, first, wanted in zip(ended, begun, (*plain.actor, *plain.critic), strict=True):
        assert (got - first).abs().max() > 1e-3, "all of it was trained"
        torch.testing.assert_close(got.detach().double(), wanted.detach(), rtol=0, atol=2e-6)


def test_policy_loss_knows_no_ratio_and_the_divergence_is_watched() -> None:
    """Once the policy has moved, the gradient is still that of its own log-probability."""
    learner = solo_learner("discrete", LocalCritic, sequential=False, value_coef=0.0, entropy_coef=0.0)
    learner.train(False)
    batch = learner.data.collect(learner.env, learner.actor)
    learner.annotate(batch)
    learner.estimator(batch)
    actor = learner.actor
    batch.set(keys.LOG_PROB, batch[keys.LOG_PROB] - 0.5)
    descent = Descent(actor)
    metrics = learner.update.update(batch, learning(actor, learner.critic, descent))
    log_prob = actor.distribution(batch).log_prob(batch[keys.ACTION])
    expected = torch.autograd.grad(-(log_prob * batch[keys.ADVANTAGE]).mean(), list(actor.parameters()))
    for got, wanted in zip(descent.gradients[0], expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert metrics["actor/kl"].item() == pytest.approx(np.exp(0.5) - 1 - 0.5, rel=1e-4)
