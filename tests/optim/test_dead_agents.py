"""What agents count for that are not alive: nothing in what trains policies, as much as others in the critic's regression."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys, rng
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Update
from marlkit.optim.ddpg import DdpgUpdate
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.optim.sequential import SequentialUpdate
from marlkit.optim.trust_region import TrustRegionUpdate
from marlkit.spec import Continuous, TeamSpec
from marlkit.testing.partners import Team

SPEC = TeamSpec(3, 4, Continuous(2), team_reward=True)
DEAD = 2
UPDATES: dict[str, Update] = {
    "ppo_clip": PpoClipUpdate(SPEC, epochs=1),
    "policy_gradient": PolicyGradientUpdate(SPEC),
    "trust_region": TrustRegionUpdate(SPEC, epochs=1),
    "sequential": SequentialUpdate(SPEC, step=PpoClipUpdate(SPEC, epochs=1)),
    "ddpg": DdpgUpdate(SPEC),
    "ddpg, coupled": DdpgUpdate(SPEC, coupling=1.0),
}


def learnt(name: str, changes: dict[Any, float]) -> tuple[Team, TensorDict, dict[str, Tensor]]:
    """A team after an update on a batch in which one agent is dead, with other numbers of that agent; and the metrics."""
    with rng.isolated(0):
        update = copy.deepcopy(UPDATES[name])
        team = Team(update)
        if name != "sequential" and not name.startswith("ddpg"):
            team.actor = StochasticActor(SPEC, hidden=[4], share="none")
        team.prepare()
        batch = team.batch()
        batch[keys.ALIVE][..., DEAD, :] = False
        for key, value in changes.items():
            batch[key][..., DEAD, :] += value
        metrics = update.update(batch, team.learning())
    return team, batch, metrics


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("name", [name for name in UPDATES if not name.startswith("ddpg")])
def test_advantage_and_log_probability_of_a_dead_agent_change_no_policy(name: str) -> None:
    first, second = (learnt(name, {keys.ADVANTAGE: by, keys.LOG_PROB: by})[0] for by in (0.0, 50.0))
    assert torch.equal(weights(first.actor), weights(second.actor))


@pytest.mark.parametrize("name", ["ppo_clip", "policy_gradient", "trust_region", "sequential"])
def test_loss_and_entropy_leave_the_policy_of_a_dead_agent_as_it_is(name: str) -> None:
    with rng.isolated(0):
        update = copy.deepcopy(UPDATES[name])
        team = Team(update)
        team.actor = StochasticActor(SPEC, hidden=[4], share="none")
        before = [parameter.clone() for parameter in team.actor.agent_parameters([DEAD])]
        living = [parameter.clone() for parameter in team.actor.agent_parameters([0])]
        team.prepare()
        batch = team.batch()
        batch[keys.ALIVE][..., DEAD, :] = False
        update.update(batch, team.learning())
    assert all(torch.equal(a, b) for a, b in zip(before, team.actor.agent_parameters([DEAD]), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(living, team.actor.agent_parameters([0]), strict=True))


@pytest.mark.parametrize("name", UPDATES)
def test_the_value_target_of_a_dead_agent_counts_in_the_critics_regression(name: str) -> None:
    first, second = (learnt(name, {keys.VALUE_TARGET: by})[0] for by in (0.0, 5.0))
    assert not torch.equal(weights(first.critic), weights(second.critic))
    assert first.critic.normaliser.mean != second.critic.normaliser.mean


def test_explained_variance_counts_dead_agents() -> None:
    first, second = (learnt("ppo_clip", {keys.VALUE_TARGET: by})[2]["critic/explained_variance"] for by in (0.0, 5.0))
    assert first != second


def test_the_deterministic_policy_climbs_the_values_of_the_living_only() -> None:
    with rng.isolated(0):
        update = copy.deepcopy(UPDATES["ddpg"])
        team = Team(update)
        before = weights(team.actor)
        team.prepare()
        batch = team.batch()
        batch[keys.ALIVE].zero_()
        critic = weights(team.critic)
        update.update(batch, team.learning())
    assert torch.equal(weights(team.actor), before)
    assert not torch.equal(weights(team.critic), critic)
