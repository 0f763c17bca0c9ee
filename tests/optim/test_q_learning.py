"""Q-learning of a team: targets by hand, the actor trained through its values, sequences, and Sarsa on policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, learner_of, random_script
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.actors.epsilon_greedy import EpsilonGreedyActor
from marlkit.critics.factorised import FactorisedCritic
from marlkit.data.replay import ReplayData
from marlkit.data.rollout import RolloutData
from marlkit.errors import OptionError
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.learning import Learning, Metrics
from marlkit.optim.q_learning import QLearningUpdate
from marlkit.spec import Discrete, TeamSpec
from marlkit.targets.hard import HardTargets
from marlkit.targets.online import OnlineTargets
from marlkit.training.learner import Learner

N, ACTIONS = 2, 3
SPEC = TeamSpec(N, 2, Discrete(ACTIONS), state=4, team_reward=True)
ONLINE = torch.tensor([[[0.0, 1.0, 5.0], [3.0, 2.0, 9.0]], [[4.0, 0.0, 0.0], [0.0, 0.0, 6.0]]])
"""Q_i of two states, ``[S, N, A]``: state 1 follows state 0; action 2 of the first agent is never available in state 1."""
COPY = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[-1.0, 7.0, 50.0], [8.0, 1.0, -2.0]]])


def tabular(mixing: Any, targets: Any, **options: Any) -> Learner:
    """Agents that see the number of the state as a unit vector, whose values are the tables."""
    torch.manual_seed(0)
    learner = learner_of(
        ScriptedEnvironment(SPEC, random_script(SPEC, 3, 4)),
        options.pop("actor", None) or EpsilonGreedyActor(SPEC, hidden=[], share="none"),
        critic=FactorisedCritic(SPEC, mixing=mixing, embedding=4, hidden=[4]),
        data=options.pop("data", None) or ReplayData(SPEC, steps=4, batch_size=12, capacity=60, warm_up=0),
        targets=targets,
        estimator=OneStepEstimator(SPEC, gamma=0.5, bootstrap="action_value"),
        update=QLearningUpdate(SPEC, **options),
    )
    return learner


def with_tables(learner: Learner) -> Learner:
    with torch.no_grad():
        for table, actor in ((COPY, learner.targets.actor()), (ONLINE, learner.actor)):
            for agent in range(N):
                weight, bias = actor.agent_parameters([agent])
                weight.copy_(table[:, agent].T)
                bias.zero_()
    return learner


def steps_from_state_0(*ends: str) -> TensorDict:
    """A step from state 0 to state 1 with each end, ``[R, 1]``, reward 1; the actions 2 and 0 were taken."""
    rows = len(ends)
    available = torch.ones(N, ACTIONS, dtype=torch.bool)
    later = available.clone()
    later[0, 2] = False

    def seen(state: int, mask: Tensor) -> dict[str, Any]:
        unit = torch.eye(2)[state].expand(rows, 1, N, -1)
        return {"observation": unit, "action_mask": mask.expand(rows, 1, -1, -1)}

    def flag(*which: str) -> Tensor:
        return torch.tensor([end in which for end in ends]).reshape(rows, 1, 1)

    following = {"agents": seen(1, later) | {"reward": torch.ones(rows, 1, N, 1)}, "state": torch.randn(rows, 1, 4)}
    following |= {"terminated": flag("terminated"), "truncated": flag("truncated"), "done": flag("terminated", "truncated")}
    agents = seen(0, available) | {"action": torch.tensor([2, 0]).expand(rows, 1, -1)}
    return TensorDict({"agents": agents, "state": torch.randn(rows, 1, 4), "next": following}, batch_size=[rows, 1])


@pytest.mark.parametrize(
    ("mixing", "double", "bootstrapped"),
    [
        # The online values choose the actions 0 and 2 in state 1, which the copies value -1 and -2; their own best are 7 and 8.
        ("none", None, [-1.0, -2.0]),
        ("sum", None, [-3.0, -3.0]),
        ("sum", True, [-3.0, -3.0]),
        ("none", False, [7.0, 8.0]),
        ("sum", False, [15.0, 15.0]),
    ],
)
def test_the_present_actor_chooses_what_the_copies_value(mixing: str, double: Any, bootstrapped: list[float]) -> None:
    learner = with_tables(tabular(mixing, HardTargets(SPEC, double=double)))
    batch = steps_from_state_0("none", "terminated", "truncated")
    learner.annotate(batch)
    learner.estimate(batch)
    cut = [1 + 0.5 * value for value in bootstrapped]
    assert batch[keys.VALUE_TARGET][:, 0, :, 0].tolist() == [cut, [1.0, 1.0], cut]


def test_without_copies_the_greedy_action_counts_with_its_own_value() -> None:
    learner = with_tables(tabular("sum", OnlineTargets(SPEC)))
    batch = steps_from_state_0("none")
    learner.annotate(batch)
    learner.estimate(batch)
    assert batch[keys.VALUE_TARGET].flatten().tolist() == [1 + 0.5 * (4 + 6)] * N


def test_the_mixture_is_bootstrapped_with_its_own_copy() -> None:
    learner = with_tables(tabular("monotone", HardTargets(SPEC)))
    with torch.no_grad():
        for parameter in learner.critic.parameters():
            parameter.add_(1.0)
    batch = steps_from_state_0("none")
    learner.annotate(batch)
    rows = TensorDict({"agents": {"action_values": COPY[1:], "action": torch.tensor([[0, 2]])}}, batch_size=[1])
    rows.set(keys.STATE, batch[keys.following(keys.STATE)][0])
    wanted = learner.targets.critic().predict(rows)
    torch.testing.assert_close(batch[keys.following(keys.ACTION_VALUE)][0], wanted)
    assert not torch.allclose(learner.critic.predict(rows), wanted)


def test_on_policy_the_action_that_was_taken_next_counts() -> None:
    data = RolloutData(SPEC, steps=4)
    learner = tabular("sum", OnlineTargets(SPEC), data=data, actor=EpsilonGreedyActor(SPEC, hidden=[4], output_gain=1.0))
    batch = learner.collect()
    learner.annotate(batch)
    learner.estimate(batch)
    taken = batch[keys.ACTION_VALUES].gather(-1, batch[keys.ACTION].unsqueeze(-1)).sum(2, keepdim=True)
    followed = ~batch[keys.DONE][:, :-1].unsqueeze(-1).expand(-1, -1, N, -1)
    wanted = batch[keys.REWARD][:, :-1] + 0.5 * taken[:, 1:]
    assert followed.any()
    torch.testing.assert_close(batch[keys.VALUE_TARGET][:, :-1][followed], wanted[followed])


def gradients(learner: Learner, batch: TensorDict) -> tuple[list[Tensor], Metrics]:
    """Of the one step that the update takes, by all parameters of actor and critic."""
    found: list[list[Tensor]] = []

    def minimise(loss: Tensor, max_grad_norm: float | None, adjust: Any = None) -> Metrics:
        found.append(list(torch.autograd.grad(loss, [*learner.actor.parameters(), *learner.critic.parameters()])))
        return {}

    metrics = learner.update.update(batch, Learning(learner.actor, learner.critic, learner.opponents, minimise, 0.0))
    (only,) = found
    return only, metrics


def test_one_step_trains_the_actor_through_the_value_of_the_action_taken() -> None:
    learner = with_tables(tabular("sum", HardTargets(SPEC)))
    batch = steps_from_state_0("none").set(keys.VALUE_TARGET, torch.full((1, 1, N, 1), 7.0))
    found, metrics = gradients(learner, batch)
    # Q = 5 + 3 is 1 above its target; d/dq_i of the mean over the agents of (Q - y)^2.
    assert metrics["critic/loss"].item() == 1.0
    assert metrics["critic/value"].item() == 8.0
    assert found[0].tolist() == [[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
    assert found[1].tolist() == [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_beyond_huber_delta_the_loss_grows_linearly() -> None:
    learner = with_tables(tabular("sum", HardTargets(SPEC), huber_delta=0.5))
    batch = steps_from_state_0("none").set(keys.VALUE_TARGET, torch.full((1, 1, N, 1), 5.0))
    found, metrics = gradients(learner, batch)
    assert metrics["critic/loss"].item() == pytest.approx(2 * 0.5 * (3 - 0.25))
    assert found[0][2, 0].item() == pytest.approx(2 * 0.5)


@pytest.mark.parametrize("mixing", ["none", "monotone"])
def test_a_loss_over_sequences_is_that_of_steps_unrolled_one_by_one(mixing: str) -> None:
    torch.manual_seed(0)
    actor = EpsilonGreedyActor(SPEC, hidden=[4], body="gru", sequence_length=3, output_gain=1.0)
    learner = tabular(mixing, HardTargets(SPEC), actor=actor)
    played = learner.collect()
    batch = next(learner.data.batches(played, actor))
    learner.annotate(batch)
    learner.estimate(batch)
    assert tuple(batch.batch_size) == (4, 3)
    found, _ = gradients(learner, batch)
    state, errors = batch[keys.HIDDEN][:, 0], []
    for step in range(3):
        row = batch[:, step].copy().set(keys.HIDDEN, state)
        outputs, state = actor.outputs(row, None)
        row.set(keys.ACTION_VALUES, outputs)
        errors.append(learner.critic.predict(row) - row[keys.VALUE_TARGET])
    loss = torch.stack(errors).square().mean()
    wanted = torch.autograd.grad(loss, [*actor.parameters(), *learner.critic.parameters()])
    for got, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-6)


def test_a_copy_of_the_mixture_alone_is_refused() -> None:
    with pytest.raises(OptionError, match="the critic reads what the actor owns: both have to lag"):
        tabular("sum", HardTargets(SPEC, actor=False))


def test_copies_that_were_looked_at_are_in_training_mode_again_when_training_starts() -> None:
    learner = learner_of(
        ScriptedEnvironment(SPEC, random_script(SPEC, 3, 4)),
        EpsilonGreedyActor(SPEC, hidden=[4]),
        critic=FactorisedCritic(SPEC),
        data=ReplayData(SPEC),
        targets=HardTargets(SPEC),
        estimator=OneStepEstimator(SPEC, bootstrap="action_value"),
        update=QLearningUpdate(SPEC),
    )
    assert all(module.training for module in learner.modules())
