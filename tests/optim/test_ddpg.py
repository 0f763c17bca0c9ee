"""Deterministic policy gradients and F2A2's joint gradients, against derivatives written out (DPG-1, DPG-2, F2-1, F2-2, F2-4)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scripted import FixedData, ScriptedEnvironment, fit, learner_of, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.deterministic import DeterministicActor
from marlkit.component import Actor, Critic, Opponents, Runtime
from marlkit.contract import Contract
from marlkit.critics.joint import JointCritic
from marlkit.data.replay import ReplayData
from marlkit.data.rollout import RolloutData
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.errors import OptionError
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.functional.coupling import actor_coefficient, actor_loss, critic_coupling, truncated_ratio
from marlkit.learning import Adjust, Learning, Metrics
from marlkit.nn.distributions import CategoricalTeam, NormalTeam, TeamDistribution
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ddpg import DdpgUpdate
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.targets.soft import SoftTargets
from marlkit.testing import check_component, spec_examples
from marlkit.training.learner import Learner

PAIR = TeamSpec(2, 1, Continuous(1))
ROWS, DEVIATION = 7, 0.4
SUM = [-1.0, 2.0, 2.0, -1.0, -2.0, -1.0]
"""Coefficients of ``-(a1 + a2 - 1)^2``."""
DIFFERENCE = [-12.0, -12.0, 12.0, -3.0, 6.0, -3.0]
"""Coefficients of ``-3 (a1 - a2 + 2)^2``."""


def monomials(first: Any, second: Any) -> list[Any]:
    return [1 + 0 * first, first, second, first * first, first * second, second * second]


class Means(Actor):
    """Each agent plays the same mean whatever it sees, with noise: ``mu_i`` is the parameter itself."""

    contract = Contract(writes=(keys.ACTION, keys.LOG_PROB, keys.LOC, keys.SCALE), traits=("reparametrised",))

    def __init__(self, spec: TeamSpec, means: list[float]) -> None:
        super().__init__()
        self.spec = spec
        self.mu = nn.Parameter(torch.tensor(means, dtype=torch.float64).unsqueeze(-1))

    def distribution(self, batch: TensorDictBase, agents: Any = None) -> TeamDistribution:
        mu = self.mu.expand(*batch.batch_size, -1, -1)
        return NormalTeam(mu, torch.full_like(mu, DEVIATION))

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        raise AssertionError("nothing is played here")

    def bootstrap(self, batch: TensorDictBase) -> TensorDictBase:
        policy = self.distribution(batch)
        for key, value in policy.parameters().items():
            batch.set(key, value.detach())
        return batch.set(keys.ACTION, policy.mode().detach())

    def reparametrised(self, batch: TensorDictBase) -> Tensor:
        return self.mu.expand(*batch.batch_size, -1, -1)


class Quadratics(Critic):
    """``Q_i`` is a quadratic polynomial of the two actions; its coefficients are the parameters of agent i."""

    contract = Contract(
        reads=(keys.ACTION, keys.JOINT_ACTION), writes=(keys.ACTION_VALUE,), traits=("differentiable_in_action",),
        predicts=keys.ACTION_VALUE,
    )  # fmt: skip

    def __init__(self, spec: TeamSpec, coefficients: list[list[float]]) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)
        self.phi = nn.Parameter(torch.tensor(coefficients, dtype=torch.float64))

    def predict(self, batch: TensorDictBase) -> Tensor:
        return self.action_value(batch, batch[keys.ACTION], batch[keys.JOINT_ACTION])[0]

    def action_value(self, batch: TensorDictBase, own: Tensor, joint: Tensor) -> Tensor:
        joint = joint.expand(-1, 2, -1, -1)
        first = torch.stack(monomials(own[:, 0, 0], joint[:, 0, 1, 0]), -1) @ self.phi[0]
        second = torch.stack(monomials(joint[:, 1, 0, 0], own[:, 1, 0]), -1) @ self.phi[1]
        return torch.stack([first, second], -1).unsqueeze(-1).unsqueeze(0)


class Believers(Opponents):
    """Each agent believes something else of the other."""

    contract = Contract(reads=(keys.ACTION,), writes=(keys.JOINT_ACTION,))

    def __init__(self, spec: TeamSpec, beliefs: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.beliefs = beliefs
        self.asked: list[tuple[bool, Tensor]] = []

    def forward(self, batch: TensorDictBase, played: bool = True) -> TensorDictBase:
        self.asked.append((played, batch[keys.ACTION]))
        return batch.set(keys.JOINT_ACTION, self.beliefs)


class Descent:
    """A ``minimise`` that takes plain gradient steps and remembers losses and what they reach."""

    def __init__(self, actor: nn.Module, critic: nn.Module, rates: tuple[float, float] = (0.0, 0.0)) -> None:
        self.modules = {"actor": actor, "critic": critic}
        self.rates = dict(zip(self.modules, rates, strict=True))
        self.losses: list[Tensor] = []
        self.gradients: list[dict[str, list[Tensor | None]]] = []

    def __call__(self, loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)
        loss.backward()
        self.losses.append(loss.detach())
        self.gradients.append({name: [p.grad for p in module.parameters()] for name, module in self.modules.items()})
        with torch.no_grad():
            for name, module in self.modules.items():
                for parameter in module.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad, alpha=self.rates[name])
        return {}


def transitions(actor: Means, seed: int = 0, *, everyone: bool = False) -> TensorDict:
    """``[R, 1]`` steps of older policies, another one at each, with targets; some agents are not alive."""
    draw = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(ROWS, 1, 2, 1, dtype=torch.float64, generator=draw)

    batch = TensorDict({}, batch_size=[ROWS, 1])
    action = normal()
    batch.set(keys.ACTION, action).set(keys.JOINT_ACTION, action.unsqueeze(2)).set(keys.VALUE_TARGET, 3 * normal())
    alive = torch.rand(ROWS, 1, 2, 1, generator=draw) < 0.7
    batch.set(keys.ALIVE, alive | everyone)
    return played_from(batch, actor.mu.detach() + 0.5 * normal(), DEVIATION * (0.4 * normal()).exp())


def played_from(batch: TensorDict, loc: Tensor, scale: Tensor) -> TensorDict:
    """The batch as if its actions had been drawn from these normal distributions ``[R, 1, 2, 1]``."""
    batch.set(keys.BEHAVIOUR_LOC, loc).set(keys.BEHAVIOUR_SCALE, scale)
    return batch.set(keys.LOG_PROB, torch.distributions.Normal(loc, scale).log_prob(batch[keys.ACTION]))


def learning(actor: Actor, critic: Critic, minimise: Descent, opponents: Opponents | None = None) -> Learning:
    return Learning(actor, critic, opponents or TruePolicyOpponents(actor.spec), minimise, 0.0)


# --- the ordinary algorithm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", ["played", "believed"])
def test_the_actor_follows_its_own_critic_through_its_own_action(others: Any) -> None:
    """DPG-1: Q1 and Q2 differ, so that any gradient of Q1 that reached agent 2 would show."""
    mu = [0.3, -0.7]
    actor, critic = Means(PAIR, mu), Quadratics(PAIR, [SUM, DIFFERENCE])
    batch = transitions(actor, everyone=True)
    descent = Descent(actor, critic)
    DdpgUpdate(PAIR, others=others).update(batch, learning(actor, critic, descent))
    expected = [0.0, 0.0]
    for a1, a2 in batch[keys.ACTION][:, 0, :, 0].tolist():
        first, second = (a1, a2) if others == "played" else mu
        expected[0] += 2 * (mu[0] + second - 1) / (2 * ROWS)
        expected[1] += -6 * (first - mu[1] + 2) / (2 * ROWS)
    (gradient,) = descent.gradients[1]["actor"]
    assert gradient is not None
    assert gradient[:, 0].tolist() == pytest.approx(expected, abs=1e-12)


def test_agent_ones_loss_does_not_reach_agent_two() -> None:
    """DPG-1: with agent 2 out of the loss, the derivative by mu2 is exactly zero."""
    actor, critic = Means(PAIR, [0.3, -0.7]), Quadratics(PAIR, [SUM, DIFFERENCE])
    batch = transitions(actor)
    batch.set(keys.ALIVE, torch.tensor([[True], [False]]).expand(ROWS, 1, 2, 1))
    descent = Descent(actor, critic)
    for others in ("played", "believed"):
        DdpgUpdate(PAIR, others=others).update(batch, learning(actor, critic, descent))
        (gradient,) = descent.gradients[-1]["actor"]
        assert gradient is not None
        assert gradient[0] != 0
        assert gradient[1] == 0


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_each_step_reaches_its_own_network_and_leaves_the_other_free_to_learn(coupling: float) -> None:
    actor, critic = Means(PAIR, [0.3, -0.7]), Quadratics(PAIR, [SUM, DIFFERENCE])
    critic.register_parameter("fixed", nn.Parameter(torch.zeros(1), requires_grad=False))
    descent = Descent(actor, critic)
    DdpgUpdate(PAIR, coupling=coupling, others="believed").update(transitions(actor), learning(actor, critic, descent))
    critic_step, actor_step = descent.gradients
    assert critic_step["critic"][0] is not None
    assert critic_step["actor"] == [None]
    assert actor_step["actor"][0] is not None
    assert actor_step["critic"] == [None, None]
    assert [parameter.requires_grad for parameter in critic.parameters()] == [True, False]


@pytest.mark.parametrize("value_norm", [False, True])
@pytest.mark.parametrize("action", [Continuous(2), Discrete(3)], ids=["continuous", "discrete"])
def test_without_coupling_the_losses_are_plain_ddpgs_bit_for_bit(action: Any, value_norm: bool) -> None:
    spec = TeamSpec(3, 4, action)
    torch.manual_seed(0)
    actor = DeterministicActor(spec, hidden=[6], output_gain=1.0)
    critic = JointCritic(spec, hidden=[5], share="none", value_norm=value_norm)
    env = ScriptedEnvironment(spec, random_script(spec, envs=4, steps=8))
    batch = RolloutData(spec, steps=8).collect(env, actor)
    TruePolicyOpponents(spec)(batch)
    batch.set(keys.VALUE_TARGET, torch.randn(4, 8, 3, 1))
    descent = Descent(actor, critic, (0.0, 0.1))
    before = [parameter.clone() for parameter in critic.parameters()]
    torch.manual_seed(5)
    step = DdpgUpdate(spec, action_penalty=0.0 if spec.discrete else None, max_grad_norm=None)
    step.update(batch, learning(actor, critic, descent))

    rows = batch.transpose(0, 1).flatten(0, 1)
    after = [parameter.clone() for parameter in critic.parameters()]
    restore(critic, before)
    goal = critic.normaliser.normalise(rows[keys.VALUE_TARGET])
    loss = ((critic.predict(rows) - goal) ** 2).mean()
    assert torch.equal(descent.losses[0], loss.detach())
    for got, wanted in zip(descent.gradients[0]["critic"], torch.autograd.grad(loss, list(critic.parameters())), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)
    restore(critic, after)
    torch.manual_seed(5)
    played = rows[keys.ACTION]
    joint = (torch.nn.functional.one_hot(played, 3).float() if spec.discrete else played).unsqueeze(1)
    value = critic.action_value(rows, actor.reparametrised(rows), joint)[0].detach()
    assert torch.equal(descent.losses[1], -value.contiguous().sum() / goal.numel())


def restore(module: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)


def test_beliefs_are_of_freshly_chosen_actions_and_stay_inside_the_update() -> None:
    actor, critic = Means(PAIR, [0.3, -0.7]), Quadratics(PAIR, [SUM, DIFFERENCE])
    batch = transitions(actor)
    before = batch.clone()
    beliefs = torch.randn(ROWS, 2, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    opponents = Believers(PAIR, beliefs)
    DdpgUpdate(PAIR, others="believed", coupling=1.0).update(batch, learning(actor, critic, Descent(actor, critic), opponents))
    ((played, action),) = opponents.asked
    assert not played
    assert torch.equal(action, actor.mu.detach().expand(ROWS, 2, 1))
    assert set(before.keys(True, True)) == set(batch.keys(True, True))
    assert all(torch.equal(before[key], batch[key]) for key in before.keys(True, True))


def test_an_agent_that_is_not_alive_weighs_in_the_critics_regression_only() -> None:
    """MASK-1: what a dead agent did changes the regression (its target is the team's) and nothing else."""
    for coupling in (0.0, 1.0):
        found = []
        for shift in (0.0, 5.0):
            actor, critic = Means(PAIR, [0.3, -0.7]), Quadratics(PAIR, [SUM, DIFFERENCE])
            batch = transitions(actor)
            assert not batch[keys.ALIVE].all()
            batch.set(keys.LOG_PROB, batch[keys.LOG_PROB] + shift * ~batch[keys.ALIVE])
            target = batch[keys.VALUE_TARGET] + shift * ~batch[keys.ALIVE] if coupling == 0 else batch[keys.VALUE_TARGET]
            batch.set(keys.VALUE_TARGET, target)
            descent = Descent(actor, critic)
            DdpgUpdate(PAIR, coupling=coupling, others="believed").update(batch, learning(actor, critic, descent))
            found.append(descent)
        assert torch.equal(found[0].losses[1], found[1].losses[1])
        assert torch.equal(found[0].losses[0], found[1].losses[0]) == (coupling == 1.0)


def test_squared_logits_are_penalised_as_far_as_a_policy_has_them() -> None:
    spec = TeamSpec(3, 4, Discrete(3), action_sizes=(3, 2, 3))
    torch.manual_seed(0)
    actor, critic = DeterministicActor(spec, hidden=[6], output_gain=2.0), JointCritic(spec, hidden=[5])
    env = ScriptedEnvironment(spec, random_script(spec, envs=4, steps=8))
    batch = RolloutData(spec, steps=8).collect(env, actor)
    TruePolicyOpponents(spec)(batch)
    batch.set(keys.VALUE_TARGET, torch.randn(4, 8, 3, 1)).set(keys.ALIVE, torch.rand(4, 8, 3, 1) < 0.6)
    losses = {}
    for penalty in (0.0, 0.3, None):
        descent = Descent(actor, critic)
        torch.manual_seed(1)
        DdpgUpdate(spec, action_penalty=penalty).update(batch, learning(actor, critic, descent))
        losses[penalty] = descent.losses[1].item()
    squares: list[float] = []
    for alive, logits in zip(batch[keys.ALIVE].flatten(0, 1), actor.network(batch[keys.OBSERVATION]).flatten(0, 1), strict=True):
        for agent, size in enumerate((3, 2, 3)):
            own = logits[agent, :size]
            squares += (own - own.mean()).square().tolist() if alive[agent] else []
    mean = sum(squares) / len(squares)
    assert losses[0.3] - losses[0.0] == pytest.approx(0.3 * mean, rel=1e-4)
    assert losses[None] - losses[0.0] == pytest.approx(1e-3 * mean, rel=1e-2)


def test_there_are_no_logits_of_continuous_actions() -> None:
    with pytest.raises(OptionError, match=r"action_penalty.*must be 0 or null, got 0.1"):
        DdpgUpdate(PAIR, action_penalty=0.1)
    DdpgUpdate(PAIR, action_penalty=0.0)


@pytest.mark.parametrize("spec", spec_examples()[2:])
def test_with_coupling_it_keeps_the_rules_too(spec: TeamSpec) -> None:
    check_component(DdpgUpdate(spec, coupling=0.1, critic_weight=10.0))


# --- the joint gradients --------------------------------------------------------------------------------------------------


BEHAVIOUR = (keys.BEHAVIOUR_LOC, keys.BEHAVIOUR_SCALE)


class Proposition4:
    """The gradients of F2A2's Proposition 4 in the paper's costs: ``Qc = -Q``, ``delta_c = -delta``; loops over plain numbers."""

    def __init__(self, kappa: float, alpha1: float, alpha2: float, eps: float, huber: float | None) -> None:
        self.kappa, self.alpha1, self.alpha2, self.eps, self.huber = kappa, alpha1, alpha2, eps, huber

    def delta(self, a: list[float], phi: list[float], y: float) -> float:
        """``delta_c`` of one agent's stored step."""
        cost = -sum(p * m for p, m in zip(phi, monomials(*a), strict=True))
        return cost - -y if self.huber is None else max(-self.huber, min(self.huber, cost - -y))

    def ratios(self, mu: float, played: tuple[float, float], stored: float, fresh: float) -> tuple[float, float]:
        """``c = min(eps, pi / pi0)`` of the stored action (E0), and ``c' = min(eps, pi0 / pi)`` of the resampled one (E1).

        ``pi`` is normal around ``mu``, ``pi0`` the normal distribution ``played``.
        """
        c = density(stored, mu, DEVIATION) / density(stored, *played)
        return min(self.eps, c), min(self.eps, density(fresh, *played) / density(fresh, mu, DEVIATION))

    def gradients(
        self, batch: TensorDict, mu: list[float], phi: list[list[float]], fresh: Any
    ) -> tuple[list[float], list[list[float]]]:
        """By ``psi`` (the means) and ``phi``; ``fresh(row, agent)`` is the resampled joint action in the agent's view."""
        alive, count = batch[keys.ALIVE][:, 0, :, 0].tolist(), int(batch[keys.ALIVE].sum())
        psi, coefficients = [0.0, 0.0], [[0.0] * 6, [0.0] * 6]
        for row in range(ROWS):
            a = batch[keys.ACTION][row, 0, :, 0].tolist()
            for agent in range(2):
                y, *played = (batch[key][row, 0, agent, 0].item() for key in (keys.VALUE_TARGET, *BEHAVIOUR))
                delta, new = self.delta(a, phi[agent], y), fresh(row, agent)
                c, inverse = self.ratios(mu[agent], (played[0], played[1]), a[agent], new[agent])
                for k, value in enumerate(monomials(*a)):
                    coefficients[agent][k] += 2 * self.alpha2 * delta * -value / (2 * ROWS)
                if not alive[row][agent]:
                    continue
                joint = self.alpha1 + 2 * self.alpha2 * delta * inverse
                for k, (value, other) in enumerate(zip(monomials(*a), monomials(*new), strict=True)):
                    coefficients[agent][k] += self.kappa * (self.alpha1 * c * -value + joint * -other) / count
                partly = self.alpha1 + self.kappa * 2 * self.alpha2 * delta * inverse
                psi[agent] += partly * -slope(phi[agent], new, agent) / count
        return psi, coefficients


def density(action: float, mean: float, deviation: float) -> float:
    return math.exp(-(((action - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))


def slope(phi: list[float], a: list[float], agent: int) -> float:
    """``dQ / da_agent``."""
    square = phi[3] if agent == 0 else phi[5]
    return phi[1 + agent] + 2 * square * a[agent] + phi[4] * a[1 - agent]


CASES = [
    pytest.param(1.0, 1.0, 1.0, 1.0, None, id="paper"),
    pytest.param(1.0, 0.6, 1.7, 1.3, None, id="weighted"),
    pytest.param(0.3, 0.6, 1.7, 0.8, None, id="partly"),
    pytest.param(1.0, 1.0, 0.5, 1.0, 1.5, id="huber"),
    pytest.param(0.0, 0.7, 1.2, 1.0, None, id="uncoupled"),
]


@pytest.mark.parametrize("others", ["played", "believed"])
@pytest.mark.parametrize(("kappa", "alpha1", "alpha2", "eps", "huber"), CASES)
def test_the_losses_have_the_gradients_of_proposition_4(
    kappa: float, alpha1: float, alpha2: float, eps: float, huber: float | None, others: Any
) -> None:
    """F2-1, and F2-2: a gradient through ``c``, ``c'`` or ``delta`` would show, as they depend on all parameters."""
    mu, phi = [0.3, -0.7], [SUM, [0.1 * c for c in DIFFERENCE]]
    actor, critic = Means(PAIR, mu), Quadratics(PAIR, phi)
    batch = transitions(actor)
    beliefs = torch.randn(ROWS, 2, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen = batch[keys.ACTION] if others == "played" else beliefs

    def fresh(row: int, agent: int) -> list[float]:
        viewed = seen[row, 0 if others == "played" else agent, :, 0].tolist()
        viewed[agent] = mu[agent]
        return viewed

    step = DdpgUpdate(
        PAIR, others=others, coupling=kappa, actor_weight=alpha1, critic_weight=alpha2, ratio_limit=eps, huber_delta=huber
    )
    descent = Descent(actor, critic)
    step.update(batch, learning(actor, critic, descent, Believers(PAIR, beliefs)))
    psi, coefficients = Proposition4(kappa, alpha1, alpha2, eps, huber).gradients(batch, mu, phi, fresh)
    (got_phi,), (got_psi,) = descent.gradients[0]["critic"], descent.gradients[1]["actor"]
    assert got_phi is not None
    assert got_psi is not None
    torch.testing.assert_close(got_phi, torch.tensor(coefficients, dtype=torch.float64), rtol=1e-10, atol=1e-11)
    assert got_psi[:, 0].tolist() == pytest.approx(psi, rel=1e-10, abs=1e-11)


class Choices(Actor):
    """Each agent chooses among three actions whatever it sees; a resampled choice is the one that it was given."""

    contract = Contract(writes=(keys.ACTION, keys.LOG_PROB, keys.LOGITS), traits=("reparametrised",))

    def __init__(self, spec: TeamSpec, logits: Tensor, chosen: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.logits = nn.Parameter(logits)
        self.chosen = chosen

    def distribution(self, batch: TensorDictBase, agents: Any = None) -> TeamDistribution:
        return CategoricalTeam(self.logits.expand(*batch.batch_size, -1, -1))

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        raise AssertionError("nothing is played here")

    def reparametrised(self, batch: TensorDictBase) -> Tensor:
        soft = self.logits.softmax(-1).expand(*batch.batch_size, -1, -1)
        return torch.nn.functional.one_hot(self.chosen, 3).double() + soft - soft.detach()


class Table(Critic):
    """``Q_i`` of the actions' features ``x1``, ``x2``: ``x1 M_i x2``; the matrices are its parameters."""

    contract = Quadratics.contract

    def __init__(self, spec: TeamSpec, tables: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)
        self.tables = nn.Parameter(tables)

    def predict(self, batch: TensorDictBase) -> Tensor:
        own, joint = (torch.nn.functional.one_hot(batch[key], 3).double() for key in (keys.ACTION, keys.JOINT_ACTION))
        return self.action_value(batch, own, joint)[0]

    def action_value(self, batch: TensorDictBase, own: Tensor, joint: Tensor) -> Tensor:
        first = torch.einsum("ra,ab,rb->r", own[:, 0], self.tables[0], joint[:, 0, 1])
        second = torch.einsum("ra,ab,rb->r", joint[:, 0, 0], self.tables[1], own[:, 1])
        return torch.stack([first, second], -1).unsqueeze(-1).unsqueeze(0)


class Enumerated:
    """Two agents with three actions each, everything drawn at random: Proposition 4 in the paper's costs, in NumPy.

    E0 is over stored actions ``a``, E1 over resampled ``~a``; every pair has its probability, so that these are the expectations.
    """

    alpha1, alpha2, eps = 0.7, 1.3, 1.0

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.logits, self.old_logits = draw.normal(size=(2, 2, 3))
        self.values, self.targets = draw.normal(size=(2, 3, 3)), draw.normal(size=(2, 3, 3))
        self.pi, self.pi0 = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (self.logits, self.old_logits))
        pairs = list(itertools.product(range(3), repeat=2))
        self.cases = [(a, new, self.weight(a, new)) for a, new in itertools.product(pairs, pairs)]

    def weight(self, a: tuple[int, ...], new: tuple[int, ...]) -> float:
        return float(np.prod([self.pi0[i, a[i]] * self.pi[i, new[i]] for i in range(2)]))

    def gradients(self) -> tuple[Any, Any]:
        """By the logits of both policies and by both tables of Q."""
        psi, phi = np.zeros((2, 3)), np.zeros((2, 3, 3))
        for a, new, weight in self.cases:
            for i, viewed in enumerate([(new[0], a[1]), (a[0], new[1])]):
                cost, target = -self.values[i], -self.targets[i][a]
                delta = cost[a] - target
                c = min(self.eps, self.pi[i, a[i]] / self.pi0[i, a[i]])
                inverse = min(self.eps, self.pi0[i, new[i]] / self.pi[i, new[i]])
                joint = self.alpha1 + 2 * self.alpha2 * delta * inverse
                # The cost's derivative by Q is -1.
                phi[i][a] -= weight * (self.alpha1 * c + 2 * self.alpha2 * delta)
                phi[i][viewed] -= weight * joint
                slopes = cost[:, a[1]] if i == 0 else cost[a[0]]
                psi[i] += weight * joint * (np.diag(self.pi[i]) - np.outer(self.pi[i], self.pi[i])) @ slopes
        return psi, phi

    def transition(self, a: tuple[int, ...]) -> TensorDict:
        batch = TensorDict({}, batch_size=[1, 1])
        batch.set(keys.ACTION, torch.tensor([[a]])).set(keys.JOINT_ACTION, torch.tensor([[[a]]]))
        batch.set(keys.ALIVE, torch.ones(1, 1, 2, 1).bool()).set(keys.ACTION_MASK, torch.ones(1, 1, 2, 3).bool())
        batch.set(keys.VALUE_TARGET, torch.tensor([target[a] for target in self.targets]).view(1, 1, 2, 1))
        batch.set(keys.LOG_PROB, torch.tensor([self.pi0[i, a[i]] for i in range(2)]).log().view(1, 1, 2, 1))
        return batch.set(keys.BEHAVIOUR_LOGITS, torch.tensor(self.old_logits).view(1, 1, 2, 3))


def test_resampled_choices_are_weighed_by_how_likely_they_were() -> None:
    """F2-1 for discrete actions, by enumeration."""
    world, spec = Enumerated(), TeamSpec(2, 1, Discrete(3))
    psi, phi = np.zeros((2, 3)), np.zeros((2, 3, 3))
    weights: Any = {"actor_weight": world.alpha1, "critic_weight": world.alpha2, "ratio_limit": world.eps}
    step = DdpgUpdate(spec, coupling=1.0, action_penalty=0.0, **weights)
    for a, new, weight in world.cases:
        actor, critic = Choices(spec, torch.tensor(world.logits), torch.tensor(new)), Table(spec, torch.tensor(world.values))
        descent = Descent(actor, critic)
        step.update(world.transition(a), learning(actor, critic, descent))
        (of_tables,), (of_logits,) = descent.gradients[0]["critic"], descent.gradients[1]["actor"]
        assert of_tables is not None
        assert of_logits is not None
        # Losses are means over the two agents.
        phi += weight * 2 * of_tables.numpy()
        psi += weight * 2 * of_logits.numpy()
    expected = world.gradients()
    assert np.abs(psi - expected[0]).max() < 1e-12
    assert np.abs(phi - expected[1]).max() < 1e-12


def test_the_actor_follows_the_new_critic_in_its_error_too() -> None:
    mu = [0.3, -0.7]
    actor, critic = Means(PAIR, mu), Quadratics(PAIR, [SUM, DIFFERENCE])
    batch = transitions(actor)
    descent = Descent(actor, critic, (0.0, 1e-3))
    DdpgUpdate(PAIR, coupling=1.0).update(batch, learning(actor, critic, descent))
    new = critic.phi.detach().tolist()
    assert (critic.phi - torch.tensor([SUM, DIFFERENCE])).abs().max() > 1e-3

    def fresh(row: int, agent: int) -> list[float]:
        viewed = batch[keys.ACTION][row, 0, :, 0].tolist()
        viewed[agent] = mu[agent]
        return viewed

    psi, _ = Proposition4(1.0, 1.0, 1.0, 1.0, None).gradients(batch, mu, new, fresh)
    (got,) = descent.gradients[1]["actor"]
    assert got is not None
    assert got[:, 0].tolist() == pytest.approx(psi, rel=1e-10)


@pytest.mark.parametrize("floor", [None, 0.25])
def test_the_coefficient_is_reported_and_held_up_on_request(floor: float | None) -> None:
    actor, critic = Means(PAIR, [0.3, -0.7]), Quadratics(PAIR, [SUM, [0.1 * c for c in DIFFERENCE]])
    batch = transitions(actor)
    paper = Proposition4(1.0, 1.0, 1.0, 1.0, None)
    coefficients, inverses = [], []
    for row in range(ROWS):
        for agent in range(2):
            if batch[keys.ALIVE][row, 0, agent, 0]:
                a, phi = batch[keys.ACTION][row, 0, :, 0].tolist(), critic.phi[agent].tolist()
                y, *played = (batch[key][row, 0, agent, 0].item() for key in (keys.VALUE_TARGET, *BEHAVIOUR))
                mu = actor.mu[agent].item()
                _, inverse = paper.ratios(mu, (played[0], played[1]), a[agent], mu)
                coefficients.append(1 + 2 * paper.delta(a, phi, y) * inverse)
                inverses.append(inverse)
    assert min(coefficients) < 0 < max(coefficients)
    if floor is not None:
        coefficients = [max(floor, c) for c in coefficients]
    step = DdpgUpdate(PAIR, coupling=1.0, coefficient_floor=floor)
    metrics = step.update(batch, learning(actor, critic, Descent(actor, critic)))
    assert metrics["coupling/inverse_ratio"].item() == pytest.approx(sum(inverses) / len(inverses), rel=1e-12)
    assert metrics["coupling/coefficient"].item() == pytest.approx(sum(coefficients) / len(coefficients), rel=1e-12)
    assert metrics["coupling/coefficient_min"].item() == pytest.approx(min(coefficients), rel=1e-12)
    assert metrics["coupling/negative"].item() == pytest.approx(sum(c < 0 for c in coefficients) / len(coefficients))


@pytest.mark.parametrize("alpha2", [0.5, 2.0])
def test_the_actors_coefficient_vanishes_where_the_critic_is_stationary(alpha2: float) -> None:
    """F2-4: at the policy that played, for any alpha2; the critic is then ``alpha1 / (2 alpha2)`` above its targets."""
    mu = [0.3, -0.7]
    actor, critic = Means(PAIR, mu), Quadratics(PAIR, [SUM, [0.1 * c for c in DIFFERENCE]])
    batch = transitions(actor, everyone=True)
    played = actor.mu.detach().expand(ROWS, 1, 2, 1)
    batch.set(keys.ACTION, played).set(keys.JOINT_ACTION, played.unsqueeze(2))
    batch = played_from(batch, played, torch.full_like(played, DEVIATION))
    batch.set(keys.VALUE_TARGET, torch.full_like(played, 1.5))
    step = DdpgUpdate(PAIR, coupling=1.0, actor_weight=0.8, critic_weight=alpha2)
    descent = Descent(actor, critic, (0.0, 0.4 / alpha2))
    first = step.update(batch, learning(actor, critic, descent))
    for _ in range(100):
        last = step.update(batch, learning(actor, critic, descent))
    assert first["coupling/coefficient"].abs() > 0.1
    assert last["coupling/coefficient"].abs() < 1e-6
    assert last["coupling/coefficient_min"].abs() < 1e-6
    (gradient,) = descent.gradients[-1]["actor"]
    assert gradient is not None
    assert gradient.abs().max() < 1e-6
    rows = batch.flatten(0, 1)
    torch.testing.assert_close(critic.predict(rows) - 1.5, torch.full((ROWS, 2, 1), 0.8 / (2 * alpha2)).double())


def test_ratios_are_truncated_without_overflow() -> None:
    """F2-2: by hand, at differences that overflow if they are exponentiated first."""
    now, then = torch.tensor([0.0, -1.0, 0.5, 800.0, -800.0]), torch.zeros(5)
    assert truncated_ratio(now, then, 1.0).tolist() == pytest.approx([1.0, math.exp(-1), 1.0, 1.0, 0.0])
    assert truncated_ratio(then, now, 1.0).tolist() == pytest.approx([1.0, 1.0, math.exp(-0.5), 0.0, 1.0])
    assert truncated_ratio(now, then, 1.5).tolist() == pytest.approx([1.0, math.exp(-1), 1.5, 1.5, 0.0])


def test_nothing_flows_through_what_only_weighs() -> None:
    """F2-2: gradients reach the values alone."""
    draw = torch.Generator().manual_seed(0)
    value, other, error, c, inverse = (torch.randn(4, 2, 1, generator=draw, requires_grad=True) for _ in range(5))
    alive = torch.ones(4, 2, 1, dtype=torch.bool)
    assert not truncated_ratio(c, inverse, 1.0).requires_grad
    assert not actor_coefficient(error, inverse, coupling=1.0, actor_weight=1.0, critic_weight=1.0).requires_grad
    actor_loss(value, error, alive).backward()
    critic_coupling(value, other, error, c, inverse, alive, actor_weight=1.0, critic_weight=1.0).backward()
    assert [x.grad is None for x in (value, other, error, c, inverse)] == [False, False, True, True, True]


@pytest.mark.parametrize("action", [Continuous(2), Discrete(3)], ids=["continuous", "discrete"])
def test_replay_knows_how_likely_any_action_was_however_the_policy_moves(action: Any) -> None:
    """F2-2: of replayed steps, also after they were annotated for a policy that has moved on, the probabilities then and now."""
    spec = TeamSpec(2, 3, action, team_reward=True)
    torch.manual_seed(0)
    actor = DeterministicActor(spec, hidden=[5], output_gain=1.0, exploration=0.3)
    env = ScriptedEnvironment(spec, random_script(spec, envs=3, steps=10))
    data = ReplayData(spec, steps=10, capacity=60, batch_size=40, warm_up=0)
    update = DdpgUpdate(spec, coupling=1.0)
    learner = off_policy_learner(env, actor, data, JointCritic(spec, hidden=[4], share="none"), update=update)
    batch = next(data.batches(data.collect(env, actor), actor))
    another = batch[keys.ACTION].roll(1, 0)
    with torch.no_grad():
        then = [actor.distribution(batch).log_prob(of) for of in (batch[keys.ACTION], another)]
        for parameter in actor.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        actor.schedule(1.0)
    learner.annotate(batch)
    torch.testing.assert_close(batch[keys.LOG_PROB], then[0], rtol=1e-4, atol=1e-4)
    if spec.discrete:
        found = batch[keys.BEHAVIOUR_LOGITS].log_softmax(-1).gather(-1, another.unsqueeze(-1))
    else:
        normal = torch.distributions.Normal(*(batch[key] for key in BEHAVIOUR))
        found = normal.log_prob(another).sum(-1, keepdim=True)
    torch.testing.assert_close(found, then[1], rtol=1e-4, atol=1e-4)
    now = actor.distribution(batch).log_prob(another)
    assert ((now - found).abs() > 0.1).any(), "the policy has moved"


def test_a_replay_keeps_of_the_behaviour_what_is_read() -> None:
    spec = TeamSpec(2, 3, Continuous(2))
    kept = {}
    for coupling in (0.0, 1.0):
        actor, data = DeterministicActor(spec, hidden=[5]), ReplayData(spec, steps=4, capacity=12, batch_size=6, warm_up=0)
        env = ScriptedEnvironment(spec, random_script(spec, envs=3, steps=10))
        off_policy_learner(env, actor, data, JointCritic(spec, hidden=[4]), update=DdpgUpdate(spec, coupling=coupling))
        kept[coupling] = set(next(data.batches(data.collect(env, actor), actor)).keys(True, True))
    assert kept[1.0] - kept[0.0] == {keys.LOG_PROB, *BEHAVIOUR}


# --- in a training --------------------------------------------------------------------------------------------------------


def off_policy_learner(env: Any, actor: Actor, data: Any, critic: Critic, **options: Any) -> Learner:
    chosen: dict[str, Any] = {
        "targets": SoftTargets(env.spec, tau=0.05),
        "estimator": OneStepEstimator(env.spec, gamma=0.95, bootstrap="action_value"),
        "update": DdpgUpdate(env.spec),
        **options,
    }
    return learner_of(env, actor, data=data, critic=critic, **chosen)


def test_the_reward_of_a_terminal_step_is_learnt() -> None:
    """DPG-2: where every step ends the episode, Q is the reward, however large the discount factor."""
    payoff = [[1.0, -1.0], [0.0, 2.0]]
    env = MatrixGameEnvironment(Runtime(torch.device("cpu"), 0), payoff=payoff, num_envs=64)
    torch.manual_seed(0)
    actor, critic = DeterministicActor(env.spec), JointCritic(env.spec, hidden=[16], share="none", value_norm=False)
    data = ReplayData(env.spec, steps=2, capacity=1000, batch_size=64, updates=4, warm_up=100)
    optimizer = AdamOptimizer(env.spec, lr=1e-9, critic_lr=0.02)
    fit(off_policy_learner(env, actor, data, critic, optimizer=optimizer), 30)
    position = env.reset()[:4]
    moves = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    position.set(keys.ACTION, moves).set(keys.JOINT_ACTION, moves.unsqueeze(1))
    expected = torch.tensor(payoff).flatten().view(4, 1, 1).expand(4, 2, 1)
    torch.testing.assert_close(critic(position)[keys.ACTION_VALUE].detach(), expected, rtol=0, atol=0.05)


GAMMA, TAU, LR, CRITIC_LR, MAX_NORM = 0.95, 0.05, 2e-3, 3e-3, 0.4
ALONE = TeamSpec(1, 4, Continuous(2, ((-1.0, 0.0),), ((1.0, 3.0),)), team_reward=True)


class OldData(FixedData):
    """Batches of any age."""

    contract = Contract()


class PlainDdpg:
    """DDPG of one agent in double precision, with plain tensors: no components, no agent axis, no shared code."""

    def __init__(self, learner: Learner) -> None:
        self.actor = [p.detach().double().requires_grad_() for p in learner.actor.parameters()]
        self.critic = [p.detach().double().requires_grad_() for p in learner.critic.parameters()]
        self.targets = {id(own): [p.detach().clone() for p in own] for own in (self.actor, self.critic)}
        options = {"eps": learner.optimizer.options["eps"], "fused": False, "foreach": False}
        self.optimizers = [torch.optim.Adam(self.actor, lr=LR, **options), torch.optim.Adam(self.critic, lr=CRITIC_LR, **options)]

    @staticmethod
    def policy(layers: list[Tensor], seen: Tensor) -> Tensor:
        low, high = (torch.tensor(bound, dtype=torch.float64) for bound in ((-1.0, 0.0), (1.0, 3.0)))
        hidden = (seen @ layers[0].T + layers[1]).tanh()
        return (low + high) / 2 + (high - low) / 2 * (hidden @ layers[2].T + layers[3]).tanh()

    @staticmethod
    def value(layers: list[Tensor], seen: Tensor, action: Tensor) -> Tensor:
        first, bias, last, last_bias, of_action = layers
        hidden = (torch.cat([seen, action], -1) @ torch.cat([first, of_action], -1).T + bias).tanh()
        return (hidden @ last.T + last_bias).squeeze(-1)

    def step(self, index: int, loss: Tensor) -> None:
        own = (self.actor, self.critic)[index]
        self.optimizers[index].zero_grad()
        gradients = torch.autograd.grad(loss, own)
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(own, MAX_NORM)
        self.optimizers[index].step()
        for target, parameter in zip(self.targets[id(own)], own, strict=True):
            target.copy_((1 - TAU) * target + TAU * parameter.detach())

    def update(self, batch: TensorDict) -> None:
        seen, following = batch[keys.OBSERVATION][:, :, 0].double(), batch["next", "agents", "observation"][:, :, 0].double()
        action, reward = batch[keys.ACTION][:, :, 0].double(), batch[keys.REWARD][:, :, 0, 0].double()
        # What the environment executes of an action beyond its bounds.
        action = action.clamp(*torch.tensor([[-1.0, 0.0], [1.0, 3.0]], dtype=torch.float64))
        next_value = self.value(self.targets[id(self.critic)], following, self.policy(self.targets[id(self.actor)], following))
        target = reward + GAMMA * (1 - batch[keys.TERMINATED][..., 0].double()) * next_value
        self.step(1, (self.value(self.critic, seen, action) - target).square().mean())
        self.step(0, -self.value(self.critic, seen, self.policy(self.actor, seen)).mean())


def alone(batches: list[TensorDict] | None = None) -> Learner:
    torch.manual_seed(3)
    env = ScriptedEnvironment(ALONE, random_script(ALONE, envs=5, steps=24))
    actor = DeterministicActor(ALONE, hidden=[6], output_gain=1.0)
    critic = JointCritic(ALONE, hidden=[7], share="none", value_norm=False)
    return off_policy_learner(
        env, actor, OldData(ALONE, batches or []), critic,
        targets=SoftTargets(ALONE, tau=TAU), estimator=OneStepEstimator(ALONE, gamma=GAMMA, bootstrap="action_value"),
        update=DdpgUpdate(ALONE, max_grad_norm=MAX_NORM), optimizer=AdamOptimizer(ALONE, lr=LR, critic_lr=CRITIC_LR),
    )  # fmt: skip


def test_one_agent_is_ddpg() -> None:
    """MADDPG with N = 1, two iterations, against DDPG written out; the second sees moved targets of actor and critic."""
    start = alone()
    rollout = RolloutData(ALONE, steps=12)
    batches = [rollout.collect(start.env, start.actor).clone() for _ in range(2)]
    assert all(batch[flag].sum() >= 3 for batch in batches for flag in (keys.TERMINATED, keys.TRUNCATED))
    plain, learner = PlainDdpg(start), alone(batches)
    for batch in batches:
        plain.update(batch)
    fit(learner, 2)
    pairs: list[tuple[nn.Module, nn.Module, list[Tensor]]] = [
        (learner.actor, start.actor, plain.actor),
        (learner.critic, start.critic, plain.critic),
    ]
    pairs += [(learner.targets.actor(), start.actor, plain.targets[id(plain.actor)])]
    pairs += [(learner.targets.critic(), start.critic, plain.targets[id(plain.critic)])]
    for trained, begun, wanted in pairs:
        for got, before, expected in zip(trained.parameters(), begun.parameters(), wanted, strict=True):
            assert (got - before).abs().max() > 5e-5, "all of it was trained"
            torch.testing.assert_close(got.detach().double(), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha2", [0.5, 3.0])
def test_the_published_coupling_biases_bootstrapped_values(alpha2: float) -> None:
    """F2-4, warning 1: in one state the error settles at ``alpha1 / (2 alpha2)``, and Q is that over ``1 - gamma`` too high."""
    alpha1, gamma, reward = 0.8, 0.9, 0.3
    value = torch.zeros((), dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    for _ in range(200):
        error = value - (reward + gamma * value.detach())
        loss = alpha2 * error.square() + critic_coupling(
            value, value, error.detach(), one, one, one, actor_weight=alpha1, critic_weight=alpha2
        )
        (gradient,) = torch.autograd.grad(loss, value)
        with torch.no_grad():
            value -= 0.5 / alpha2 * gradient
    bias = value.item() - reward / (1 - gamma)
    assert bias == pytest.approx(alpha1 / (2 * alpha2 * (1 - gamma)), abs=1e-9)
