"""Uniformly random play: frequencies and log-probabilities, whatever the actor wants."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from scripted import ScriptedEnvironment, random_script
from tensordict import TensorDictBase

from marlkit import keys, rng
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Runtime
from marlkit.data.uniform_play import UniformPlayData
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.recorder.steps import StepRecorder
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import check_component


@pytest.mark.parametrize(
    "spec",
    [TeamSpec(2, 4, Discrete(3)), TeamSpec(2, 4, Continuous(2, ((-1.0, 0.0),) * 2, ((1.0, 0.5),) * 2))],
    ids=["discrete", "continuous"],
)
def test_it_keeps_the_rules_of_data(spec: TeamSpec) -> None:
    check_component(UniformPlayData(spec))


def played(spec: TeamSpec, actor: StochasticActor, envs: int, steps: int) -> TensorDictBase:
    rng.seed_all(0)
    return UniformPlayData(spec, steps=steps).collect(ScriptedEnvironment(spec, random_script(spec, envs, steps)), actor)


def test_every_joint_action_is_equally_likely_however_sharp_the_policy_is() -> None:
    env = MatrixGameEnvironment(Runtime(torch.device("cpu"), 0), num_envs=9000)
    actor = StochasticActor(env.spec)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.normal_(std=10.0)
    rng.seed_all(0)
    batch = UniformPlayData(env.spec, steps=1).collect(env, actor)
    action = batch[keys.ACTION].flatten(0, 1)
    counts = torch.bincount(action[:, 0] * 3 + action[:, 1], minlength=9).double()
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 26.1  # 8 degrees of freedom, p = 0.001
    assert batch[keys.LOG_PROB].allclose(torch.tensor(-math.log(3)))
    wanted = actor.distribution(batch).parameters()
    assert batch[keys.LOGITS].equal(wanted[keys.LOGITS])


def test_unavailable_actions_are_never_played_and_count_for_nothing() -> None:
    spec = TeamSpec(2, 4, Discrete(4), action_sizes=(4, 2))
    batch = played(spec, StochasticActor(spec), envs=50, steps=20)
    first, second = batch[keys.ACTION].unbind(-1)
    assert set(first.unique().tolist()) == {0, 1, 2, 3}
    assert set(second.unique().tolist()) == {0, 1}
    assert batch[keys.LOG_PROB][..., 0].allclose(torch.tensor([-math.log(4), -math.log(2)]))


def test_continuous_actions_fill_their_bounds() -> None:
    low, high = ((-1.0, 0.0), (2.0, 0.0)), ((1.0, 0.5), (6.0, 0.0))
    spec = TeamSpec(2, 4, Continuous(2, low, high), action_sizes=(2, 1))
    batch = played(spec, StochasticActor(spec), envs=100, steps=20)
    action = batch[keys.ACTION].flatten(0, 1)
    assert ((action >= torch.tensor(low)) & (action <= torch.tensor(high))).all()
    assert action.mean(0)[0].allclose(torch.tensor([0.0, 0.25]), atol=0.05)
    assert action[:, 1, 1].eq(0).all()
    expected = torch.tensor([-math.log(2 * 0.5), -math.log(4)])
    assert batch[keys.LOG_PROB][..., 0].allclose(expected)


def test_actions_without_bounds_lie_between_minus_one_and_one() -> None:
    spec = TeamSpec(2, 4, Continuous(2))
    batch = played(spec, StochasticActor(spec), envs=100, steps=20)
    assert batch[keys.ACTION].abs().amax() <= 1
    assert batch[keys.ACTION].abs().mean().allclose(torch.tensor(0.5), atol=0.02)
    assert batch[keys.LOG_PROB].allclose(torch.tensor(-2 * math.log(2)))


@pytest.mark.parametrize("action", [Discrete(3), Continuous(2)], ids=["discrete", "continuous"])
def test_its_steps_are_recorded(action: Discrete | Continuous) -> None:
    spec = TeamSpec(2, 4, action)
    actor, data = StochasticActor(spec), UniformPlayData(spec, steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.collect(ScriptedEnvironment(spec, random_script(spec, 3, 5)), actor, StepRecorder("record", actor))
