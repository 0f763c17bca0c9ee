"""What estimators and updates may read of the actor under ``next``, and actors whose values a critic mixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, learner_of, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Critic, Estimator
from marlkit.contract import Contract
from marlkit.data.replay import ReplayData
from marlkit.data.rollout import RolloutData
from marlkit.learning import Learning
from marlkit.nn.distributions import CategoricalTeam, TeamDistribution
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.spec import Discrete, TeamSpec
from marlkit.targets.soft import SoftTargets
from marlkit.training.learner import Learner

B, T, N = 3, 5, 2
SPEC = TeamSpec(N, 4, Discrete(3), team_reward=True)
NEXT_LOG_PROB = keys.following(keys.LOG_PROB)
NEXT_ACTION = keys.following(keys.ACTION)
NEXT_TEMPERATURE = keys.following(keys.TEMPERATURE)


# --- the actor's choice under next -----------------------------------------------------------------------------------------


class TemperedActor(StochasticActor):
    """A policy with a weight of its entropy, which it learns or keeps for itself."""

    contract = Contract(
        reads=(keys.OBSERVATION, keys.ACTION_MASK),
        writes=(keys.ACTION, keys.LOG_PROB, keys.LOGITS, keys.TEMPERATURE),
        traits=("stochastic", "independent_agents"),
    )

    def __init__(self, spec: TeamSpec, *, temperature: float = 0.3) -> None:
        super().__init__(spec, hidden=[4])
        self.temperature = nn.Parameter(torch.tensor(temperature))

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        super().forward(batch, deterministic)
        weight = self.temperature.detach().expand(*batch.batch_size, N, 1)
        return batch.set(keys.TEMPERATURE, weight.clone())


class SoftEstimator(Estimator):
    """``y = r + gamma (1 - terminated) (V(s') - temperature log pi(a' | s'))``."""

    contract = Contract(
        reads=(keys.REWARD, keys.TERMINATED, keys.following(keys.STATE_VALUE), NEXT_LOG_PROB, NEXT_TEMPERATURE, NEXT_ACTION),
        writes=(keys.ADVANTAGE, keys.VALUE_TARGET),
    )

    def __init__(self, spec: TeamSpec, *, gamma: float = 0.9) -> None:
        super().__init__()
        self.spec = spec
        self.gamma = gamma

    @torch.no_grad()
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        value = batch[keys.following(keys.STATE_VALUE)] - batch[NEXT_TEMPERATURE] * batch[NEXT_LOG_PROB]
        target = batch[keys.REWARD] + self.gamma * value * ~batch[keys.TERMINATED].unsqueeze(-1)
        return batch.set(keys.VALUE_TARGET, target).set(keys.ADVANTAGE, target)


def soft_learner(*, replay: bool, lagging: bool = False) -> Learner:
    torch.manual_seed(0)
    env = ScriptedEnvironment(SPEC, random_script(SPEC, B, 4 * T))
    data = ReplayData(SPEC, steps=T, batch_size=12, capacity=60, warm_up=0) if replay else RolloutData(SPEC, steps=T)
    targets = SoftTargets(SPEC, tau=0.5, actor=True) if lagging else None
    actor = TemperedActor(SPEC)
    return learner_of(env, actor, estimator=SoftEstimator(SPEC), data=data, targets=targets)


def annotated(learner: Learner) -> TensorDict:
    played = learner.data.collect(learner.env, learner.actor)
    batch = next(learner.data.batches(played, learner.actor))
    learner.annotate(batch)
    return batch


def log_probs(actor: StochasticActor, observation: Tensor, action: Tensor) -> Tensor:
    logits = actor.network(observation)
    return logits.log_softmax(-1).gather(-1, action.unsqueeze(-1))


@pytest.mark.parametrize("replay", [False, True], ids=["rollout", "replay"])
def test_the_log_probability_under_next_belongs_to_the_action_chosen_there(replay: bool) -> None:
    learner = soft_learner(replay=replay)
    batch = annotated(learner)
    assert isinstance(learner.actor, StochasticActor)
    with torch.no_grad():
        expected = log_probs(learner.actor, batch[keys.following(keys.OBSERVATION)], batch[NEXT_ACTION])
    going_on = ~batch[keys.TERMINATED].unsqueeze(-1).expand_as(expected)
    torch.testing.assert_close(batch[NEXT_LOG_PROB][going_on], expected[going_on], rtol=1e-5, atol=1e-6)
    assert batch[NEXT_LOG_PROB][~going_on].abs().sum() == 0
    torch.testing.assert_close(batch[NEXT_TEMPERATURE][going_on], torch.full_like(expected, 0.3)[going_on])


def test_on_policy_the_next_action_is_the_one_that_was_executed_there() -> None:
    batch = annotated(soft_learner(replay=False))
    within = ~batch[keys.DONE][:, :-1].expand(-1, -1, N)
    assert within.any()
    assert torch.equal(batch[NEXT_ACTION][:, :-1][within], batch[keys.ACTION][:, 1:][within])
    assert torch.equal(batch[NEXT_LOG_PROB][:, :-1, :, 0][within], batch[keys.LOG_PROB][:, 1:, :, 0][within])


def test_off_policy_the_next_action_is_that_of_the_target_policy() -> None:
    learner = soft_learner(replay=True, lagging=True)
    with torch.no_grad():
        for parameter in learner.actor.parameters():
            parameter.add_(torch.randn_like(parameter))  # the copy stays behind
    batch = annotated(learner)
    target = learner.targets.actor()
    assert isinstance(target, StochasticActor)
    with torch.no_grad():
        expected = log_probs(target, batch[keys.following(keys.OBSERVATION)], batch[NEXT_ACTION])
    going_on = ~batch[keys.TERMINATED].unsqueeze(-1).expand_as(expected)
    torch.testing.assert_close(batch[NEXT_LOG_PROB][going_on], expected[going_on], rtol=1e-5, atol=1e-6)


def test_soft_targets_by_hand() -> None:
    learner = soft_learner(replay=False)
    batch = annotated(learner)
    value, log_prob, reward = (batch[key] for key in (keys.following(keys.STATE_VALUE), NEXT_LOG_PROB, keys.REWARD))
    learner.estimate(batch)
    for b in range(B):
        for t in range(T):
            for i in range(N):
                expected = float(reward[b, t, i])
                if not batch[keys.TERMINATED][b, t]:
                    expected += 0.9 * (float(value[b, t, i]) - 0.3 * float(log_prob[b, t, i]))
                assert float(batch[keys.VALUE_TARGET][b, t, i]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_no_component_reads_under_next_is_not_written() -> None:
    torch.manual_seed(0)
    env = ScriptedEnvironment(SPEC, random_script(SPEC, B, 2 * T))
    batch = annotated(learner_of(env, TemperedActor(SPEC)))
    written = batch.keys(include_nested=True, leaves_only=True)
    assert NEXT_LOG_PROB not in written
    assert NEXT_TEMPERATURE not in written


# --- an actor that owns the values that a critic mixes ---------------------------------------------------------------------


class GreedyActor(StochasticActor):
    """Acts by action values of its own; :meth:`distribution` renews them with their gradient."""

    contract = Contract(
        reads=(keys.OBSERVATION, keys.ACTION_MASK),
        writes=(keys.ACTION, keys.LOG_PROB, keys.LOGITS, keys.ACTION_VALUES),
        traits=("stochastic", "independent_agents"),
    )

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        values = self.network(batch[keys.OBSERVATION])
        batch.set(keys.ACTION_VALUES, values)
        return CategoricalTeam(values.detach(), batch[keys.ACTION_MASK])

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        policy = self.distribution(batch)
        return self.write_choice(batch, policy, policy.sample())


class SummingCritic(Critic):
    """The team's value is the sum of the values of the agents' actions (Sunehag et al. 2018)."""

    contract = Contract(reads=(keys.ACTION_VALUES, keys.ACTION), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)

    def predict(self, batch: TensorDictBase) -> Tensor:
        own = batch[keys.ACTION_VALUES].gather(-1, batch[keys.ACTION].unsqueeze(-1))
        return own.sum(-2, keepdim=True).expand(*batch.batch_size, N, 1)


def mixing_learner(**options: Any) -> Learner:
    torch.manual_seed(0)
    env = ScriptedEnvironment(SPEC, random_script(SPEC, B, 4 * T))
    return learner_of(env, GreedyActor(SPEC, hidden=[4]), critic=SummingCritic(SPEC), **options)


def test_the_critics_loss_trains_the_actors_action_values_through_the_key() -> None:
    update = PolicyGradientUpdate(SPEC, value_coef=1.0, value_clip=None, huber_delta=None)
    learner = mixing_learner(update=update)
    batch = annotated(learner)
    learner.estimate(batch)
    found: list[Tensor] = []

    def minimise(loss: Tensor, max_grad_norm: float | None, adjust: Any = None) -> dict[str, Tensor]:
        found.extend(torch.autograd.grad(loss, list(learner.actor.parameters())))
        return {}

    learner.update.update(batch, Learning(learner.actor, learner.critic, learner.opponents, minimise, 0.0))
    # Of the policy itself no gradient comes, because the logits are detached: only the regression of the sum is left.
    rows = batch.flatten()
    own = learner.actor.network(rows[keys.OBSERVATION]).gather(-1, rows[keys.ACTION].unsqueeze(-1))  # type: ignore[operator]
    error = own.sum(-2, keepdim=True).expand(-1, N, 1) - rows[keys.VALUE_TARGET]
    expected = torch.autograd.grad(0.5 * error.square().mean(), list(learner.actor.parameters()))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_off_policy_the_action_values_of_a_batch_are_those_of_the_current_actor() -> None:
    learner = mixing_learner(data=ReplayData(SPEC, steps=T, batch_size=12, capacity=60, warm_up=0))
    played = learner.data.collect(learner.env, learner.actor)
    with torch.no_grad():
        for parameter in learner.actor.parameters():
            parameter.add_(torch.randn_like(parameter))
    batch = next(learner.data.batches(played, learner.actor))
    learner.annotate(batch)
    with torch.no_grad():
        current = learner.actor.network(batch[keys.OBSERVATION])  # type: ignore[operator]
    torch.testing.assert_close(batch[keys.ACTION_VALUES], current, rtol=1e-5, atol=1e-6)
