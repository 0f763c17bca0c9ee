"""The joint critic against one that builds every agent's input and runs every agent's network on its own."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from marlkit import keys
from marlkit.critics.joint import JointCritic
from marlkit.nn.networks import TeamLinear, group_of_agents
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import fake_batch

N, F, ROWS = 3, 2, 5
CONTINUOUS = TeamSpec(N, 4, Continuous(F), state=6)
UNEQUAL = TeamSpec(N, 4, Continuous(F), state=6, action_sizes=(2, 1, 2))
DISCRETE = TeamSpec(N, 4, Discrete(F), state=6)
SHARES: list[Any] = ["all", "none", [[0, 2], [1]]]


def critic_of(spec: TeamSpec = CONTINUOUS, **options: Any) -> JointCritic:
    torch.manual_seed(0)
    critic = JointCritic(spec, **{"hidden": [7, 5], "value_norm": False, **options}).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return critic


def situation(views: int = 1, seed: int = 0, n_agents: int = N) -> tuple[TensorDict, Tensor, Tensor]:
    """What is valued, own actions, joint actions."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, dtype=torch.float64, generator=draw)

    batch = TensorDict({keys.STATE: normal(6), "agents": {"observation": normal(n_agents, 4)}}, batch_size=[ROWS])
    return batch, normal(n_agents, F), normal(views, n_agents, F)


def plainly(critic: JointCritic, share: Any, batch: TensorDict, own: Tensor, joint: Tensor) -> Tensor:
    """Agent by agent: one input vector of the view and the joint action, one network."""
    n_agents = critic.spec.n_agents
    groups = group_of_agents(share, n_agents)
    values = []
    for agent in range(n_agents):
        viewed = joint[:, agent if joint.shape[1] > 1 else 0].clone()
        viewed[:, agent] = own[:, agent]
        view = batch[keys.STATE] if critic.view == "state" else batch[keys.OBSERVATION][:, agent]
        first, *rest = cast(list[TeamLinear], list(critic.network.layers))
        weight = torch.cat([first.weights[groups[agent]], critic.action_layer.weights[groups[agent]]], -1)
        x = torch.cat([view, viewed.flatten(1)], -1) @ weight.T + first.biases[groups[agent]]
        identity = critic.network.identity
        if identity is not None:
            x = x + identity[agent]
        for layer in rest:
            x = x.tanh() @ layer.weights[groups[agent]].T + layer.biases[groups[agent]]
        values.append(x)
    return torch.stack(values, 1)


@pytest.mark.parametrize("hidden", [[7, 5], []])
@pytest.mark.parametrize("view", ["state", "own"])
@pytest.mark.parametrize("views", [1, N])
@pytest.mark.parametrize("share", SHARES)
def test_the_split_first_layer_is_the_whole_one(share: Any, views: int, view: str, hidden: list[int]) -> None:
    critic = critic_of(share=share, view=view, hidden=hidden)
    batch, own, joint = situation(views)
    own.requires_grad_()
    got, expected = critic.action_value(batch, own, joint)[0], plainly(critic, share, batch, own, joint)
    assert got.shape == (ROWS, N, 1)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weight = torch.arange(1.0, N + 1, dtype=torch.float64).unsqueeze(-1)
    gradients = [torch.autograd.grad((weight * value).sum(), [own, *critic.parameters()]) for value in (got, expected)]
    for first, second in zip(*gradients, strict=True):
        assert second.abs().sum() > 0
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


def test_one_agent_alone() -> None:
    critic = critic_of(TeamSpec(1, 4, Continuous(F), state=6), share="none")
    batch, own, joint = situation(1, n_agents=1)
    expected = plainly(critic, "none", batch, own, joint)
    torch.testing.assert_close(critic.action_value(batch, own, joint)[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("views", [1, N])
def test_own_takes_the_place_of_the_own_entry_and_of_no_other(views: int) -> None:
    critic = critic_of(share="none")
    batch, own, joint = situation(views)
    before = critic.action_value(batch, own, joint)[0]
    for viewer in range(views):
        for agent in range(N):
            moved = joint.clone()
            moved[:, viewer, agent] += 1.0
            change = (critic.action_value(batch, own, moved)[0] - before).abs().squeeze(-1)
            for valued in range(N):
                sees = (views == 1 or valued == viewer) and valued != agent
                assert (change[:, valued].min() > 1e-6) if sees else (change[:, valued].max() < 1e-12)


@pytest.mark.parametrize("spec", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
def test_a_prediction_is_the_value_of_the_actions_taken(spec: TeamSpec) -> None:
    critic = critic_of(spec, share="none")
    batch, own, _ = situation()
    taken = own.argmax(-1) if spec.discrete else own
    features = torch.stack([1.0 - taken, 1.0 * taken], -1).double() if spec.discrete else own
    batch.set(keys.ACTION, taken).set(keys.JOINT_ACTION, taken.unsqueeze(1))
    expected = plainly(critic, "none", batch, features, features.unsqueeze(1))
    torch.testing.assert_close(critic.predict(batch), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(critic(batch)[keys.ACTION_VALUE], expected, rtol=1e-10, atol=1e-12)


def test_predictions_are_normalised_and_written_values_are_real() -> None:
    critic = critic_of(value_norm=True)
    batch, own, _ = situation()
    batch.set(keys.ACTION, own).set(keys.JOINT_ACTION, own.unsqueeze(1))
    critic.normaliser.update(torch.tensor([10.0, 16.0], dtype=torch.float64))
    torch.testing.assert_close(critic(batch)[keys.ACTION_VALUE], 13.0 + 3.0 * critic.predict(batch), rtol=1e-6, atol=1e-6)


def test_padding_enters_nowhere() -> None:
    critic = critic_of(UNEQUAL)
    batch, own, joint = situation(N)
    own.requires_grad_()
    before = critic.action_value(batch, own, joint)[0]
    (gradient,) = torch.autograd.grad(before.sum(), own)
    assert (gradient[:, 1, 1] == 0).all()
    assert (gradient[:, 1, 0] != 0).all()
    moved_own, moved = own.detach().clone(), joint.clone()
    moved_own[:, 1, 1], moved[:, :, 1, 1] = 9.0, -9.0
    torch.testing.assert_close(critic.action_value(batch, moved_own, moved)[0], before.detach(), rtol=0, atol=0)


def test_separate_parameters_are_each_agents_own_and_in_one_order() -> None:
    critic = critic_of(share="none")
    assert "separate_parameters" in critic.traits
    assert "separate_parameters" not in critic_of(share="all").traits
    own = [critic.agent_parameters([agent]) for agent in range(N)]
    assert {id(p) for part in own for p in part} == {id(p) for p in critic.parameters()}
    assert len({tuple(p.shape for p in part) for part in own}) == 1
    batch, action, joint = situation()
    for agent in range(N):
        critic.zero_grad()
        critic.action_value(batch, action, joint)[0][:, agent].sum().backward()
        reached = {id(p) for p in critic.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == {id(p) for p in own[agent]}


def test_a_shared_critic_multiplies_state_and_joint_action_once() -> None:
    rows, width = 64, 16
    critic = JointCritic(CONTINUOUS, hidden=[width])
    batch = TensorDict({keys.STATE: torch.randn(rows, 6)}, batch_size=[rows])
    with FlopCounterMode(display=False) as counter:
        critic.action_value(batch, torch.randn(rows, N, F), torch.randn(rows, 1, N, F))
    once = 6 * width + N * F * width
    for_each_agent = N * (F * width + width)
    assert counter.get_total_flops() == 2 * rows * (once + for_each_agent)


def test_continuous_actions_are_valued_as_the_environment_executes_them() -> None:
    spec = TeamSpec(2, 3, Continuous(1, ((-1.0,), (-2.0,)), ((1.0,), (0.5,))))
    critic = JointCritic(spec, hidden=[5])
    batch = fake_batch(spec, [4], critic.reads)
    far = batch.clone()
    far[keys.ACTION] = torch.tensor([[[1.7], [-2.5]]]).expand(4, 2, 1).contiguous()
    far[keys.JOINT_ACTION] = far[keys.ACTION].unsqueeze(1)
    near = batch.clone()
    near[keys.ACTION] = torch.tensor([[[1.0], [-2.0]]]).expand(4, 2, 1).contiguous()
    near[keys.JOINT_ACTION] = near[keys.ACTION].unsqueeze(1)
    assert torch.equal(critic.predict(far), critic.predict(near))
