"""The attention critic: what it attends to, against a plain loop over heads and agents, and what it must not see."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.critics.attention import AttentionCritic
from marlkit.errors import OptionError
from marlkit.functional.attention import attended, weights_of_others
from marlkit.spec import Discrete, TeamSpec
from marlkit.testing import fake_batch

SPECS = [
    pytest.param(TeamSpec(4, 5, Discrete(3)), id="four"),
    pytest.param(TeamSpec(3, 5, Discrete(4), observation_sizes=(5, 3, 2), action_sizes=(4, 2, 3)), id="unequal"),
    pytest.param(TeamSpec(2, 3, Discrete(3)), id="two"),
    pytest.param(TeamSpec(1, 3, Discrete(2)), id="one"),
]
ROWS = 6


def critic_of(spec: TeamSpec, **options: Any) -> AttentionCritic:
    torch.manual_seed(1)
    chosen: dict[str, Any] = {"hidden": [7, 8], "heads": 2, "value_norm": False} | options
    critic = AttentionCritic(spec, **chosen)
    with torch.no_grad():  # biases start at zero, where a missing one would not be missed
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return critic.double()


def batch_of(spec: TeamSpec, views: int = 1) -> TensorDict:
    critic = AttentionCritic(spec)
    batch = fake_batch(spec, [ROWS], critic.reads)
    if views > 1:
        sizes = torch.tensor(spec.own_action_sizes)
        believed = (torch.rand(ROWS, views, spec.n_agents, generator=torch.Generator().manual_seed(3)) * sizes).long()
        mine = torch.eye(spec.n_agents, dtype=torch.bool)
        batch[keys.JOINT_ACTION] = torch.where(mine, batch[keys.ACTION].unsqueeze(1), believed)
    else:
        batch[keys.JOINT_ACTION] = batch[keys.ACTION].unsqueeze(1).clone()
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


# --- the attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 4])
def test_weights_sum_to_one_over_the_others(views: int) -> None:
    torch.manual_seed(0)
    weights = weights_of_others(torch.randn(5, 3, 4, 2, 6), torch.randn(5, 3, views, 4, 2, 6))
    assert weights.shape == (5, 3, 2, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 3, 2, 4))
    assert (weights.diagonal(dim1=-2, dim2=-1) == 0).all()
    assert (weights[..., ~torch.eye(4, dtype=torch.bool)] > 0).all()


def test_weights_by_hand() -> None:
    """One head of size four: scores 2 / 2 and 6 / 2 of the others."""
    query = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).unsqueeze(1)
    key = torch.tensor([[9.0, 0, 0, 0], [2, 5, 0, 0], [6, 0, 5, 0]]).unsqueeze(1)
    weights = weights_of_others(query, key.unsqueeze(0))[0]
    share = 1 / (1 + math.exp(2))
    torch.testing.assert_close(weights, torch.tensor([[0, share, 1 - share], [0.5, 0, 0.5], [0.5, 0.5, 0]]))


def test_of_two_agents_each_attends_wholly_to_the_other_and_a_single_agent_to_none() -> None:
    torch.manual_seed(0)
    pair = weights_of_others(torch.randn(5, 2, 3, 4), torch.randn(5, 1, 2, 3, 4))
    assert torch.equal(pair, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(5, 3, 2, 2))
    alone = weights_of_others(torch.randn(5, 1, 3, 4), torch.randn(5, 1, 1, 3, 4))
    assert torch.equal(alone, torch.zeros(5, 3, 1, 1))
    assert torch.equal(attended(alone, torch.randn(5, 1, 1, 3, 4)), torch.zeros(5, 1, 12))


def test_attended_by_hand() -> None:
    weights = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.5], [0.25, 0.0]]])
    value = torch.tensor([[[[1.0], [2.0]], [[4.0], [8.0]]]])  # one view, two agents, two heads of one feature
    assert attended(weights, value).tolist() == [[4.0, 4.0], [1.0, 0.5]]


# --- the critic against a plain loop --------------------------------------------------------------------------------------


def layer(module: Any, agent: int, features: Tensor) -> Tensor:
    group = module.groups[agent]
    product = module.weights[group] @ features
    return product + module.biases[group] if len(module.biases) else product


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.01 * x)


def encoded(critic: AttentionCritic, network: Any, agent: int, seen: Tensor, action: int | None) -> Tensor:
    found = layer(network.layers[0], agent, seen)
    if network.identity is not None:
        found = found + network.identity[agent]
    if action is not None:
        found = found + critic.action_layer.weights[critic.action_layer.groups[agent]][:, action]
    for module in network.layers[1:]:
        found = layer(module, agent, leaky(found))
    return leaky(found)


def plain(critic: AttentionCritic, batch: TensorDict) -> Tensor:
    """``Q_i`` of every own action, one row, agent and head at a time."""
    spec, size = critic.spec, 8 // critic.heads
    found = torch.zeros(ROWS, spec.n_agents, spec.action_features, dtype=torch.float64)
    for row in range(ROWS):
        seen, joint = batch[keys.OBSERVATION][row], batch[keys.JOINT_ACTION][row]
        for i in range(spec.n_agents):
            view = joint[i if len(joint) > 1 else 0].tolist()
            own = encoded(critic, critic.own_encoder, i, seen[i], None)
            others = {j: encoded(critic, critic.encoder, j, seen[j], view[j]) for j in range(spec.n_agents) if j != i}
            heads: list[Tensor] = []
            for head in range(critic.heads if others else 0):
                part = slice(head * size, (head + 1) * size)
                query = (critic.query.weights[0] @ own)[part]
                scores = [float(query @ (critic.key.weights[0] @ e)[part]) / math.sqrt(size) for e in others.values()]
                total = sum(map(math.exp, scores))
                values = [leaky(critic.value.weights[0] @ e + critic.value.biases[0])[part] for e in others.values()]
                heads.append(torch.stack([math.exp(s) / total * v for s, v in zip(scores, values, strict=True)]).sum(0))
            x = torch.cat(heads) if others else torch.zeros(8, dtype=torch.float64)
            inner = leaky(layer(critic.head.layers[0], i, torch.cat([own, x])))
            found[row, i] = layer(critic.head.layers[1], i, inner)
    return found


def shares(spec: TeamSpec) -> list[Any]:
    return ["all", "none", [[0], list(range(1, spec.n_agents))]] if spec.n_agents > 1 else ["all", "none"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("in_views", [False, True], ids=["one view", "own views"])
@pytest.mark.parametrize("agent_id", [True, False])
def test_equals_a_plain_loop(spec: TeamSpec, in_views: bool, agent_id: bool) -> None:
    batch = batch_of(spec, spec.n_agents if in_views else 1)
    for share in shares(spec):
        critic = critic_of(spec, share=share, agent_id=agent_id)
        with torch.no_grad():
            wanted = plain(critic, batch)
            found = critic(batch.clone())
        torch.testing.assert_close(found[keys.ACTION_VALUES], wanted)
        for row in range(ROWS):
            for i in range(spec.n_agents):
                assert found[keys.ACTION_VALUE][row, i, 0] == found[keys.ACTION_VALUES][row, i, batch[keys.ACTION][row, i]]
        policy = torch.exp(batch[keys.LOGITS] - batch[keys.LOGITS].logsumexp(-1, keepdim=True))
        torch.testing.assert_close(found[keys.STATE_VALUE], (policy * wanted).sum(-1, keepdim=True))
        torch.testing.assert_close(critic.predict(batch), found[keys.ACTION_VALUE])


def test_values_are_in_real_units_and_predictions_are_not() -> None:
    spec = TeamSpec(3, 5, Discrete(4))
    critic, batch = critic_of(spec, value_norm=True), batch_of(spec)
    critic.normaliser.update(torch.randn(50, 3, 1, dtype=torch.float64) * 10 + 100)
    with torch.no_grad():
        wanted = critic.normaliser.denormalise(plain(critic, batch))
        torch.testing.assert_close(critic(batch.clone())[keys.ACTION_VALUES], wanted)
        assert (wanted - plain(critic, batch)).abs().min() > 1


@pytest.mark.parametrize("spec", SPECS[:3])
@pytest.mark.parametrize("in_views", [False, True], ids=["one view", "own views"])
def test_row_sees_the_actions_of_the_others_and_never_its_own(spec: TeamSpec, in_views: bool) -> None:
    batch = batch_of(spec, spec.n_agents if in_views else 1)
    critic = critic_of(spec)
    with torch.no_grad():
        before = critic(batch.clone())[keys.ACTION_VALUES]
        for j in range(spec.n_agents):
            changed = batch.clone()
            for actions in (changed[keys.ACTION], changed[keys.JOINT_ACTION]):
                actions[..., j] = (actions[..., j] + 1) % spec.own_action_sizes[j]
            after = critic(changed)[keys.ACTION_VALUES]
            difference = (after - before).abs().amax(-1)
            assert (difference[:, j] < 1e-12).all()
            others = [i for i in range(spec.n_agents) if i != j]
            assert (difference[:, others] > 1e-7).all()


def test_each_agent_values_what_it_believes_itself() -> None:
    spec = TeamSpec(3, 5, Discrete(4))
    batch, critic = batch_of(spec, 3), critic_of(spec)
    changed = batch.clone()
    changed[keys.JOINT_ACTION][:, 1, 2] = (changed[keys.JOINT_ACTION][:, 1, 2] + 1) % 4
    with torch.no_grad():
        difference = (critic(changed)[keys.ACTION_VALUES] - critic(batch)[keys.ACTION_VALUES]).abs().amax(-1)
    assert (difference[:, 1] > 1e-7).all()
    assert (difference[:, [0, 2]] == 0).all()


def test_actions_that_an_agent_lacks_count_for_nothing() -> None:
    """However much the last layer makes of them."""
    spec = TeamSpec(3, 5, Discrete(4), action_sizes=(4, 2, 3))
    critic, batch = critic_of(spec, share="none"), batch_of(spec)
    last: Any = critic.head.layers[1]
    with torch.no_grad():
        before = critic(batch.clone())
        last.biases[1][2:] += 1e6
        after = critic(batch.clone())
    assert torch.equal(before[keys.STATE_VALUE], after[keys.STATE_VALUE])
    assert (after[keys.ACTION_VALUES][:, 1, 2:] > 1e5).all()


@pytest.mark.parametrize("spec", SPECS[:3])
@pytest.mark.parametrize("options", [{}, {"hidden": [8]}, {"layer_norm": True, "hidden": [7, 6, 8]}, {"activation": "tanh"}])
def test_the_loss_reaches_every_parameter(spec: TeamSpec, options: dict[str, Any]) -> None:
    for share in shares(spec):
        critic, batch = critic_of(spec, share=share, **options), batch_of(spec)
        critic.predict(batch).square().sum().backward()
        for name, parameter in critic.named_parameters():
            assert parameter.grad is not None, name
            reached = parameter.grad.abs().sum() > 0
            # With a single other agent its weight is one whatever is asked.
            assert reached or (spec.n_agents == 2 and name.startswith(("query", "key"))), name


def test_of_two_agents_query_and_key_change_nothing() -> None:
    spec = TeamSpec(2, 3, Discrete(3))
    critic, batch = critic_of(spec), batch_of(spec)
    with torch.no_grad():
        before = critic.predict(batch)
        for module in (critic.query, critic.key):
            module.weights[0].mul_(-3)
        torch.testing.assert_close(critic.predict(batch), before)
        critic.value.weights[0].mul_(-3)
        assert (critic.predict(batch) - before).abs().min() > 1e-6


@pytest.mark.parametrize("share", ["all", "none"])
def test_attention_is_common_to_all_whatever_is_shared(share: Any) -> None:
    spec = TeamSpec(3, 5, Discrete(4))
    critic = critic_of(spec, share=share)
    assert [len(module.weights) for module in (critic.query, critic.key, critic.value)] == [1, 1, 1]
    layers: list[Any] = [*critic.own_encoder.layers, *critic.encoder.layers, *critic.head.layers, critic.action_layer]
    assert {len(module.weights) for module in layers} == {1 if share == "all" else 3}
    assert "separate_parameters" not in critic.traits


@pytest.mark.parametrize(("hidden", "heads"), [([], 1), ([8], 3), ([6, 4], 3)])
def test_embeddings_that_heads_do_not_divide_are_refused(hidden: list[int], heads: int) -> None:
    with pytest.raises(OptionError, match=f"`hidden`: needs a last width that the {heads} heads divide"):
        AttentionCritic(TeamSpec(3, 5, Discrete(4)), hidden=hidden, heads=heads)
