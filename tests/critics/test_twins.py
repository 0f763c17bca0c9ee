"""Twin critics: both networks predict, the smaller value counts, and what holds of one network holds of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from marlkit import keys
from marlkit.component import Critic
from marlkit.critics.attention import AttentionCritic
from marlkit.critics.counterfactual import CounterfactualCritic
from marlkit.critics.joint import JointCritic
from marlkit.critics.local import LocalCritic
from marlkit.functional.counterfactual import policy_value
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import fake_batch

DISCRETE, CONTINUOUS = TeamSpec(3, 4, Discrete(5)), TeamSpec(3, 4, Continuous(2))
KINDS: list[Any] = [
    pytest.param(JointCritic, CONTINUOUS, {}, id="joint"),
    pytest.param(JointCritic, DISCRETE, {"share": "none"}, id="joint-discrete"),
    pytest.param(CounterfactualCritic, DISCRETE, {"share": "none"}, id="counterfactual"),
    pytest.param(AttentionCritic, DISCRETE, {}, id="attention"),
    pytest.param(LocalCritic, CONTINUOUS, {}, id="local"),
    pytest.param(LocalCritic, DISCRETE, {"style": "q", "share": "none"}, id="local-q"),
]


def critic_of(kind: type[Critic], spec: TeamSpec, options: dict[str, Any], **more: Any) -> Critic:
    torch.manual_seed(0)
    critic = kind(spec, hidden=[4], **options, **more)
    with torch.no_grad():  # the last layers of some begin small
        for parameter in critic.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return critic


def batch_for(critic: Critic) -> TensorDict:
    torch.manual_seed(1)
    return fake_batch(critic.spec, (64,), list(critic.reads))


def second_of(critic: Critic) -> Critic:
    twin = critic.get_submodule("twin")
    assert isinstance(twin, Critic)
    return twin


@pytest.mark.parametrize(("kind", "spec", "options"), KINDS)
def test_the_smaller_value_of_two_networks_counts(kind: Any, spec: TeamSpec, options: dict[str, Any]) -> None:
    critic = critic_of(kind, spec, options, twins=True, value_norm=False)
    batch = batch_for(critic)
    alone = kind(spec, hidden=[4], value_norm=False, **options)
    alone.load_state_dict({name: held for name, held in critic.state_dict().items() if not name.startswith("twin.")})
    second = second_of(critic)
    assert sum(p.numel() for p in critic.parameters()) == 2 * sum(p.numel() for p in alone.parameters())
    first_values, second_values = (one.predictions(batch.clone())[0] for one in (alone, second))
    torch.testing.assert_close(critic.predictions(batch.clone()), torch.stack([first_values, second_values]))
    assert (first_values < second_values).any()
    assert (second_values < first_values).any()
    written = critic(batch.clone())
    torch.testing.assert_close(written[critic.predicts], torch.minimum(first_values, second_values))
    if "action_values" in critic.traits:
        smaller = torch.minimum(*(one.action_values(batch.clone())[0] for one in (alone, second)))
        torch.testing.assert_close(written[keys.ACTION_VALUES], smaller)
        torch.testing.assert_close(written[keys.STATE_VALUE], policy_value(smaller, batch[keys.LOGITS]))


@pytest.mark.parametrize(("kind", "spec", "options"), KINDS)
def test_both_networks_are_rewritten_when_units_change(kind: Any, spec: TeamSpec, options: dict[str, Any]) -> None:
    critic = critic_of(kind, spec, options, twins=True, value_norm="popart")
    batch = batch_for(critic)

    def values() -> Tensor:
        return critic.normaliser.denormalise(critic.predictions(batch.clone())).detach()

    critic.learn_scale(torch.tensor([1.0, 5.0]))
    before = values()
    critic.learn_scale(torch.tensor([-300.0, 100.0]))
    torch.testing.assert_close(values(), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "spec", "options"), [case for case in KINDS if case.values[2].get("share") == "none"])
def test_an_agent_has_both_of_its_networks_for_itself(kind: Any, spec: TeamSpec, options: dict[str, Any]) -> None:
    critic = critic_of(kind, spec, options, twins=True)
    own = [set(map(id, critic.agent_parameters([agent]))) for agent in range(spec.n_agents)]
    in_twin = set(map(id, nn.ModuleList([second_of(critic)]).parameters()))
    assert set.union(*own) == set(map(id, critic.parameters()))
    for agent, parameters in enumerate(own):
        assert len(parameters & in_twin) == len(parameters) / 2
        assert all(parameters.isdisjoint(other) for other in own[agent + 1 :])
