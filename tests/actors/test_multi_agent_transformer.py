"""The multi-agent transformer: who sees what, and that acting one by one is what the one pass of the training says it is."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_texts import problem
from scripted import ScriptedEnvironment, fit, learner_of, random_script
from tensordict import TensorDict
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.actors.transformer import TransformerActor
from marlkit.batches import units
from marlkit.component import Actor, Runtime
from marlkit.critics.transformer import TransformerCritic
from marlkit.data.rollout import RolloutData
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.errors import MarlkitError, OptionError, RecipeError
from marlkit.learning import Learning, Metrics
from marlkit.nn.actions import ActionRange
from marlkit.nn.transformer import Attention, ObservationEncoder
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.recipe import load_recipe, shipped
from marlkit.recipe.reading import SHIPPED
from marlkit.run.policy import Policy
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import fake_batch, spec_examples
from marlkit.training.dry_run import dry_run
from marlkit.training.learner import Learner

DISCRETE = TeamSpec(3, 5, Discrete(4), action_sizes=(4, 2, 3), team_reward=True)
BOUNDS = (((-1.0, -2.0), (0.0, -1.0), (-1.0, 0.0)), ((1.0, 2.0), (4.0, 1.0), (1.0, 0.0)))
CONTINUOUS = TeamSpec(3, 4, Continuous(2, *BOUNDS), action_sizes=(2, 2, 1), team_reward=True)
SPECS = [pytest.param(DISCRETE, id="discrete"), pytest.param(CONTINUOUS, id="continuous")]
ALL_SPECS = [pytest.param(spec, id=f"{spec.n_agents}x{type(spec.action).__name__}") for spec in [*spec_examples(), DISCRETE]]
SMALL: dict[str, Any] = {"embedding": 8, "blocks": 2, "heads": 2}


def scrambled(module: Any, seed: int = 0) -> Any:
    """The module in double precision, no weight so small that what it carries could pass unnoticed."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        size = 0.3 if parameter.dim() == 1 else 1.5 / math.sqrt(parameter.shape[1])
        parameter.data = size * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.weight.data += 1
    return module.double()


def actor_of(spec: TeamSpec, **options: Any) -> TransformerActor:
    actor = scrambled(TransformerActor(spec, **(SMALL | options)))
    assert isinstance(actor, TransformerActor)
    return actor


def batch_of(spec: TeamSpec, rows: int = 6, seed: int = 0) -> TensorDict:
    """Rows in double precision, with an action taken; one discrete action more is unavailable in some of them."""
    if not spec.discrete:
        batch = fake_batch(spec, [rows], [keys.OBSERVATION, keys.ACTION_DIMS], seed)
        draw = torch.Generator().manual_seed(seed + 1)
        shape = (rows, spec.n_agents, spec.action_features)
        batch.set(keys.ACTION, torch.randn(shape, generator=draw, dtype=torch.float64))
    else:
        batch = fake_batch(spec, [rows], [keys.OBSERVATION, keys.ACTION_MASK, keys.ACTION], seed)
        batch[keys.ACTION_MASK][::2, :, 0] = False
        batch.set(keys.ACTION, batch[keys.ACTION].clamp(min=1))
    return batch.set(keys.OBSERVATION, batch[keys.OBSERVATION].double())


def parameters_of(actor: Actor, batch: TensorDict) -> dict[keys.Key, Tensor]:
    return {key: value.detach() for key, value in actor.distribution(batch.clone()).parameters().items()}


def changes(before: Tensor, after: Tensor) -> list[bool]:
    """Which agents' entries of ``[rows, N, *]`` changed, in any row."""
    return [not torch.equal(a, b) for a, b in zip(before.unbind(1), after.unbind(1), strict=True)]


# --- MAT-1: who sees what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("changed", range(3))
def test_an_action_is_seen_by_the_agents_after_it_only(spec: TeamSpec, changed: int) -> None:
    actor, batch = actor_of(spec), batch_of(spec)
    other = batch.clone()
    taken = other[keys.ACTION]
    taken[:, changed] = 1 - taken[:, changed].clamp(max=1) if spec.discrete else taken[:, changed] + 0.3
    first, second = parameters_of(actor, batch), parameters_of(actor, other)
    key = keys.LOGITS if spec.discrete else keys.LOC
    assert changes(first[key], second[key]) == [agent > changed for agent in range(3)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("changed", range(3))
def test_an_observation_is_seen_by_all(spec: TeamSpec, changed: int) -> None:
    actor, batch = actor_of(spec), batch_of(spec)
    other = batch.clone()
    other[keys.OBSERVATION][:, changed] += 0.3
    first, second = actor(batch.clone(), deterministic=True), actor(other, deterministic=True)
    key = keys.LOGITS if spec.discrete else keys.LOC
    # Not bit for bit: the first agents' outputs depend on a later one through the encoder alone.
    assert changes(first[keys.ENCODING], second[keys.ENCODING]) == [True] * 3
    assert changes(first[key], second[key]) == [True] * 3


def test_the_policy_of_mat_dec_sees_the_own_observation_only_and_its_critic_all() -> None:
    spec = DISCRETE
    actor, batch = scrambled(StochasticActor(spec, hidden=[8], layer_norm=True)), batch_of(spec)
    critic = scrambled(TransformerCritic(spec, hidden=[8], **SMALL))
    other = batch.clone()
    other[keys.OBSERVATION][:, 1] += 0.3
    assert changes(parameters_of(actor, batch)[keys.LOGITS], parameters_of(actor, other)[keys.LOGITS]) == [False, True, False]
    assert changes(critic.predict(batch), critic.predict(other)) == [True, True, True]
    assert set(critic.reads) == {keys.OBSERVATION}


def test_policies_say_whether_the_team_must_be_asked_at_one_place() -> None:
    spec = TeamSpec(3, 5, Continuous(2))
    observations = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    other = observations.clone()
    other[:, 2] += 1.0
    for actor, centralised in ((TransformerActor(spec, **SMALL), True), (StochasticActor(spec, hidden=[8]), False)):
        policy = Policy(actor, spec)
        assert policy.centralised is centralised
        assert changes(policy(observations), policy(other)) == [centralised, centralised, True]


# --- MAT-2: acting is what the training evaluates -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL_SPECS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_acting_writes_is_what_teacher_forcing_finds(spec: TeamSpec, deterministic: bool) -> None:
    torch.manual_seed(0)
    actor, batch = actor_of(spec), batch_of(spec)
    acted = actor(batch.clone(), deterministic=deterministic)
    evaluated = acted.select(*actor.reads, keys.ACTION)
    policy = actor.distribution(evaluated)
    torch.testing.assert_close(acted[keys.LOG_PROB], policy.log_prob(acted[keys.ACTION]), rtol=0, atol=1e-10)
    torch.testing.assert_close(acted[keys.ENCODING], evaluated[keys.ENCODING], rtol=0, atol=0)
    for key, value in policy.parameters().items():
        torch.testing.assert_close(acted[key], value, rtol=0, atol=1e-10)
    if deterministic:
        torch.testing.assert_close(acted[keys.ACTION], policy.mode(), rtol=0, atol=1e-10)
    if spec.discrete:
        assert batch[keys.ACTION_MASK].gather(-1, acted[keys.ACTION].unsqueeze(-1)).all()


@pytest.mark.parametrize("spec", SPECS)
def test_remembering_the_tokens_changes_nothing(spec: TeamSpec) -> None:
    """The best actions by one full pass per agent, with nothing remembered, are those of acting."""
    actor, batch = actor_of(spec), batch_of(spec)
    step_by_step = batch.clone()
    for agent in range(spec.n_agents):
        best = actor.distribution(step_by_step.clone()).mode().detach()
        step_by_step[keys.ACTION][:, agent] = best[:, agent]
    acted = actor(batch.clone(), deterministic=True)
    torch.testing.assert_close(acted[keys.ACTION], step_by_step[keys.ACTION], rtol=0, atol=1e-10)
    assert not torch.equal(acted[keys.ACTION], batch[keys.ACTION])


def joint_probabilities(actor: TransformerActor, batch: TensorDict, n_actions: int) -> dict[tuple[int, ...], Tensor]:
    """The probability of every joint action in every row, from the teacher-forced log-probabilities."""
    found = {}
    for joint in itertools.product(range(n_actions), repeat=actor.spec.n_agents):
        forced = batch.clone()
        forced.set(keys.ACTION, torch.tensor(joint).expand(batch.batch_size[0], -1).contiguous())
        log_prob = actor.distribution(forced).log_prob(forced[keys.ACTION])
        found[joint] = log_prob.sum((-1, -2)).exp().detach()
    return found


def test_joint_probabilities_sum_to_one_and_are_those_of_the_samples() -> None:
    spec = TeamSpec(2, 3, Discrete(3))
    actor, batch = actor_of(spec), batch_of(spec, rows=2)
    assert not batch[keys.ACTION_MASK][0, 0, 0]
    probabilities = joint_probabilities(actor, batch, 3)
    torch.testing.assert_close(sum(probabilities.values()), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-10)
    assert all(p[0] == 0 for joint, p in probabilities.items() if 0 in joint)
    # The second agent's choice depends on the first one's: no product of marginals.
    second = torch.stack([torch.stack([probabilities[a, b][1] for b in range(3)]) for a in range(3)])
    conditional = second / second.sum(-1, keepdim=True)
    assert (conditional[0] - conditional[1]).abs().max() > 0.05
    torch.manual_seed(1)
    count = 4000
    repeated = batch.select(*actor.reads)[torch.arange(2).repeat_interleave(count)]
    action = actor(repeated)[keys.ACTION].view(2, count, 2)
    for joint, probability in probabilities.items():
        frequency = (action == torch.tensor(joint)).all(-1).double().mean(-1)
        assert ((frequency - probability).abs() <= 5 * (probability * (1 - probability) / count).sqrt() + 1e-12).all()


def tokens_read(actor: TransformerActor, batch: TensorDict) -> Tensor:
    """What the decoder is given in one teacher-forced pass."""
    seen: list[Tensor] = []
    handle = actor.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    actor.distribution(batch)
    handle.remove()
    return seen[0]


def test_discrete_tokens_are_a_start_flag_and_the_actions_before() -> None:
    spec = TeamSpec(3, 2, Discrete(3))
    actor, batch = actor_of(spec), batch_of(spec, rows=1)
    batch.set(keys.ACTION, torch.tensor([[2, 0, 1]]))
    expected = [[[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]]
    assert tokens_read(actor, batch).tolist() == expected
    assert actor.decoder.embed[0].bias is None


def test_continuous_tokens_are_the_actions_before_in_half_ranges_without_padding() -> None:
    actor, batch = actor_of(CONTINUOUS), batch_of(CONTINUOUS, rows=1)
    batch.set(keys.ACTION, torch.tensor([[[0.5, 3.0], [3.0, -1.0], [9.0, 9.0]]], dtype=torch.float64))
    # Agent 0 has bounds ±1 and ±2, agent 1 0 to 4 and ±1; no token holds the third agent's action.
    assert tokens_read(actor, batch).tolist() == [[[0.0, 0.0], [0.5, 1.5], [0.5, -1.0]]]
    padded = TeamSpec(2, 4, Continuous(2), action_sizes=(1, 2))
    actor, batch = actor_of(padded), batch_of(padded, rows=1)
    batch.set(keys.ACTION, torch.full((1, 2, 2), 7.0, dtype=torch.float64))
    assert tokens_read(actor, batch).tolist() == [[[0.0, 0.0], [7.0, 0.0]]]
    assert actor.decoder.embed[0].bias is not None


def test_padded_dimensions_and_unavailable_actions_count_for_nothing() -> None:
    """MASK-1: what stands in the padding of an action changes neither a log-probability nor a gradient."""
    spec = TeamSpec(3, 4, Continuous(2), action_sizes=(1, 2, 2))
    actor, batch = actor_of(spec), batch_of(spec)
    found = []
    for padding in (0.0, 1e6):
        batch[keys.ACTION][:, 0, 1] = padding
        actor.zero_grad()
        log_prob = actor.distribution(batch).log_prob(batch[keys.ACTION])
        log_prob.sum().backward()
        found.append([log_prob.detach(), *(parameter.grad for parameter in actor.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    spec = TeamSpec(2, 4, Discrete(3))
    actor, batch = actor_of(spec), batch_of(spec)
    assert (actor.distribution(batch).log_prob(torch.zeros(6, 2, dtype=torch.int64))[::2] < -1e9).all()


def test_the_deviation_is_in_half_ranges() -> None:
    actor = TransformerActor(CONTINUOUS, initial_std=0.25)
    batch = fake_batch(CONTINUOUS, [6], actor.reads)
    actor(batch)
    scale, loc = (batch[key] for key in (keys.SCALE, keys.LOC))
    torch.testing.assert_close(scale[0], 0.25 * torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]))
    # The last layer starts small, so that means start near the middle of the range.
    torch.testing.assert_close(loc[0], torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), rtol=0, atol=0.2)


def test_half_ranges_of_bounds_padding_and_no_bounds() -> None:
    action = Continuous(2, low=((-1.0, 0.0), (2.0, 0.0)), high=((3.0, 0.0), (4.0, 1.0)))
    dims = torch.tensor([[True, False], [True, True]])
    bounded = ActionRange(action, 2)
    assert bounded.scaled(torch.tensor([[3.0, 5.0], [2.5, 1.0]])).tolist() == [[1.0, 5.0], [-0.5, 1.0]]
    assert bounded.scaled(torch.tensor([[2.5, 1.0]]), [1]).tolist() == [[-0.5, 1.0]]
    normal = bounded.normal(torch.tensor([[0.5, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 9.0]), dims)
    assert normal.loc.tolist() == [[2.0, 0.0], [3.0, 1.0]]
    ceiling = math.exp(2.0)
    torch.testing.assert_close(normal.scale, torch.tensor([[2.0, ceiling], [1.0, 0.5 * ceiling]]))
    free = ActionRange(Continuous(1), 2)
    assert free.scaled(torch.tensor([[3.0], [-4.0]])).tolist() == [[3.0], [-4.0]]


def test_agents_are_not_evaluated_alone() -> None:
    with pytest.raises(MarlkitError, match="cannot be evaluated alone"):
        actor_of(DISCRETE).distribution(batch_of(DISCRETE), [0])


# --- the networks against plain loops -------------------------------------------------------------------------------------


def affine(layer: Any, x: list[float]) -> list[float]:
    weight, bias = layer.weight.tolist(), [0.0] * len(layer.weight) if layer.bias is None else layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def normalised(layer: Any, x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    standard = [(v - mean) / math.sqrt(variance + 1e-5) for v in x]
    return [v * w + b for v, w, b in zip(standard, layer.weight.tolist(), layer.bias.tolist(), strict=True)]


def gelu(x: list[float]) -> list[float]:
    return [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]


def plus(x: list[float], y: list[float]) -> list[float]:
    return [a + b for a, b in zip(x, y, strict=True)]


def attended(layer: Any, asking: list[list[float]], answering: list[list[float]], *, causal: bool) -> list[list[float]]:
    found = []
    for i, asker in enumerate(asking):
        query, gathered = affine(layer.query, asker), []
        size = len(query) // layer.heads
        for head in range(layer.heads):
            own = slice(head * size, (head + 1) * size)
            seen = answering[: i + 1] if causal else answering
            scores = [
                math.exp(sum(q * k for q, k in zip(query[own], affine(layer.key, x)[own], strict=True)) / math.sqrt(size))
                for x in seen
            ]
            values = [affine(layer.value, x)[own] for x in seen]
            gathered += [sum(s * v[d] for s, v in zip(scores, values, strict=True)) / sum(scores) for d in range(size)]
        found.append(affine(layer.output, gathered))
    return found


def perceived(layer: Any, x: list[float]) -> list[float]:
    return affine(layer[2], gelu(affine(layer[0], x)))


def encoded(encoder: Any, observations: list[list[float]], *, agent_id: bool = True) -> list[list[float]]:
    tokens = []
    for i, observation in enumerate(observations):
        x = observation + [float(i == j) for j in range(len(observations)) if agent_id]
        tokens.append(normalised(encoder.embed[2], gelu(affine(encoder.embed[0], normalised(encoder.normalise, x)))))
    for block in encoder.blocks:
        gathered = attended(block.attention, tokens, tokens, causal=False)
        tokens = [normalised(block.norms[0], plus(x, g)) for x, g in zip(tokens, gathered, strict=True)]
        tokens = [normalised(block.norms[1], plus(x, perceived(block.perceptron, x))) for x in tokens]
    return tokens


def decoded(decoder: Any, tokens: list[list[float]], encoding: list[list[float]]) -> list[list[float]]:
    tokens = [normalised(decoder.embed[2], gelu(affine(decoder.embed[0], x))) for x in tokens]
    for block in decoder.blocks:
        gathered = attended(block.among_actions, tokens, tokens, causal=True)
        tokens = [normalised(block.norms[0], plus(x, g)) for x, g in zip(tokens, gathered, strict=True)]
        gathered = attended(block.from_encoding, encoding, tokens, causal=True)
        tokens = [normalised(block.norms[1], plus(e, g)) for e, g in zip(encoding, gathered, strict=True)]
        tokens = [normalised(block.norms[2], plus(x, perceived(block.perceptron, x))) for x in tokens]
    head = decoder.head
    return [affine(head[3], normalised(head[2], gelu(affine(head[0], x)))) for x in tokens]


@pytest.mark.parametrize("agent_id", [True, False])
def test_encoder_is_that_of_plain_loops(agent_id: bool) -> None:
    spec = TeamSpec(3, 5, Discrete(2))
    encoder = scrambled(ObservationEncoder(spec, **SMALL, agent_id=agent_id))
    observation = batch_of(spec, rows=1)[keys.OBSERVATION]
    expected = encoded(encoder, observation[0].tolist(), agent_id=agent_id)
    torch.testing.assert_close(encoder(observation)[0].tolist(), expected, rtol=0, atol=1e-10)


def test_discrete_policy_is_that_of_plain_loops() -> None:
    spec = TeamSpec(3, 5, Discrete(4))
    actor, batch = actor_of(spec), batch_of(spec)[1:2]
    before = batch[keys.ACTION][0].tolist()
    tokens = [[1.0, 0.0, 0.0, 0.0, 0.0], *([0.0, *(float(a == b) for b in range(4))] for a in before[:-1])]
    encoding = encoded(actor.encoder, batch[keys.OBSERVATION][0].tolist())
    outputs = torch.tensor(decoded(actor.decoder, tokens, encoding), dtype=torch.float64)
    expected = outputs - outputs.exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(parameters_of(actor, batch)[keys.LOGITS][0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(actor(batch)[keys.ENCODING][0].tolist(), encoding, rtol=0, atol=1e-10)


def test_continuous_policy_is_that_of_plain_loops() -> None:
    spec = TeamSpec(3, 4, Continuous(2))
    actor, batch = actor_of(spec), batch_of(spec, rows=1)
    before = batch[keys.ACTION][0].tolist()
    encoding = encoded(actor.encoder, batch[keys.OBSERVATION][0].tolist())
    expected = decoded(actor.decoder, [[0.0, 0.0], *before[:-1]], encoding)
    torch.testing.assert_close(parameters_of(actor, batch)[keys.LOC][0].tolist(), expected, rtol=0, atol=1e-10)


def test_attention_to_a_memory_is_attention_to_all_before() -> None:
    layer = scrambled(Attention(8, 2))
    draw = torch.Generator().manual_seed(3)
    asking, answering = (torch.randn(2, 4, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    memory: Any = {}
    steps = [layer(asking[:, i : i + 1], answering[:, i : i + 1], memory=memory) for i in range(4)]
    expected = [attended(layer, asking[row].tolist(), answering[row].tolist(), causal=True) for row in range(2)]
    torch.testing.assert_close(torch.cat(steps, 1).tolist(), expected, rtol=0, atol=1e-10)


# --- initialisation, gradients, options -----------------------------------------------------------------------------------


def test_weights_start_orthogonal_with_the_gains_of_the_reference() -> None:
    torch.manual_seed(0)
    actor = TransformerActor(CONTINUOUS)
    before_gelu = ("embed.0", "perceptron.0", "head.0")
    layers = {name: layer for name, layer in actor.named_modules() if isinstance(layer, nn.Linear)}
    # Embedding, 4 of an attention and 2 of a perceptron; embedding, 2 x 4, 2, and 2 of the head.
    assert len(layers) == 7 + 13
    for name, layer in layers.items():
        weight = layer.weight.detach().double()
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        squared = 2.0 if name.endswith(before_gelu) else 1e-4
        torch.testing.assert_close(gram, squared * torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-5 * squared)
        assert layer.bias is not None
        assert not layer.bias.any(), name
    assert actor.log_deviation.tolist() == pytest.approx([math.log(0.37)] * 2)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_every_parameter(spec: TeamSpec) -> None:
    actor, batch = actor_of(spec), batch_of(spec)
    critic = scrambled(TransformerCritic(spec, encoder="actor", embedding=8, hidden=[8]))
    policy = actor.distribution(batch)
    (policy.log_prob(batch[keys.ACTION]).sum() + critic.predict(batch).square().sum()).backward()
    for name, parameter in [*actor.named_parameters(), *critic.named_parameters()]:
        assert parameter.grad is not None, name
        # The softmax of an attention does not feel what is added to all keys alike.
        assert (parameter.grad.abs().max() > 1e-9) != name.endswith("key.bias"), name


def test_one_agent_is_an_ordinary_policy() -> None:
    spec = TeamSpec(1, 3, Discrete(2))
    actor, batch = actor_of(spec), batch_of(spec)
    assert actor.encoder.identity.shape == (1, 0)
    logits = parameters_of(actor, batch)[keys.LOGITS]
    batch.set(keys.ACTION, 1 - batch[keys.ACTION])
    assert torch.equal(parameters_of(actor, batch)[keys.LOGITS], logits), "its own action decided its distribution"
    assert changes(logits.transpose(0, 1), logits.roll(1, 0).transpose(0, 1)) == [True] * 6
    critic = scrambled(TransformerCritic(spec, **SMALL))
    assert critic.predict(batch).shape == (6, 1, 1)


def test_agents_without_identity_are_told_apart_by_what_was_chosen_before_only() -> None:
    spec = TeamSpec(3, 1, Discrete(3))
    batch = batch_of(spec, rows=1)
    batch[keys.OBSERVATION].fill_(1.0)
    batch[keys.ACTION_MASK].fill_(True)
    batch.set(keys.ACTION, torch.tensor([[2, 1, 1]]))
    for agent_id in (True, False):
        actor = actor_of(spec, agent_id=agent_id)
        logits = parameters_of(actor, batch)[keys.LOGITS][0]
        encoding = actor(batch.clone())[keys.ENCODING][0]
        assert torch.allclose(encoding[0], encoding[1]) is not agent_id
        assert not torch.allclose(logits[0], logits[1])
        critic = scrambled(TransformerCritic(spec, agent_id=agent_id, **SMALL))
        values = critic.predict(batch)[0]
        assert torch.allclose(values[0], values[1]) is not agent_id


def test_an_observation_of_one_feature_is_not_normalised_away() -> None:
    spec = TeamSpec(2, 1, Discrete(2))
    encoder = scrambled(ObservationEncoder(spec, **SMALL, agent_id=False))
    low, high = (encoder(torch.full((1, 2, 1), value, dtype=torch.float64)) for value in (0.1, 0.9))
    assert not torch.allclose(low, high)


@pytest.mark.parametrize("team_reward", [True, False])
def test_each_agent_is_valued_by_an_mlp_of_its_encoding_as_it_is(team_reward: bool) -> None:
    """MAT's head is Linear, GELU, LayerNorm, Linear; the encoder has normalised its input, with a scale and a shift."""
    spec = TeamSpec(3, 5, Discrete(4), team_reward=team_reward)
    critic, batch = scrambled(TransformerCritic(spec, hidden=[8], **SMALL)), batch_of(spec)
    assert critic.encoder is not None
    encoding = critic.encoder(batch[keys.OBSERVATION])
    assert (encoding.std(-1, correction=0) - 1).abs().max() > 0.01
    (first, a), (last, b) = ((layer.weights[0], layer.biases[0]) for layer in critic.head.layers)
    inner = encoding @ first.T + a
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    centred = inner - inner.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = normal @ last.T + b
    assert (expected - expected.mean(1, keepdim=True)).abs().max() > 0.01
    torch.testing.assert_close(critic.predict(batch), expected, rtol=0, atol=1e-10)


def test_share_means_the_head() -> None:
    spec = TeamSpec(3, 5, Discrete(4))
    critic = scrambled(TransformerCritic(spec, share=[[0, 2], [1]], hidden=[8], **SMALL))
    batch = batch_of(spec)
    before = critic.predict(batch)
    critic.head.layers[-1].biases[1].data += 1.0
    assert changes(before, critic.predict(batch)) == [False, True, False]
    with pytest.raises(OptionError, match="share"):
        TransformerCritic(spec, share=[[0, 1]])


def test_heads_must_divide_the_embedding() -> None:
    with pytest.raises(OptionError, match="must divide embedding=8, got 3"):
        TransformerActor(DISCRETE, embedding=8, heads=3)
    with pytest.raises(RecipeError, match=r"actor\.heads: must divide embedding=64, got 5"):
        dry_run(load_recipe("mat", ["actor.heads=5"]))


def test_embeddings_of_actor_and_critic_must_agree() -> None:
    with pytest.raises(RecipeError, match=r"set critic\.embedding=16, or actor\.embedding=64") as caught:
        dry_run(load_recipe("mat", ["actor.embedding=16"]))
    (problem,) = caught.value.problems
    written = shipped()["mat"].read_text(encoding="utf-8").splitlines()
    assert (problem.where, problem.source) == ("critic.embedding", str(shipped()["mat"]))
    assert written[(problem.line or 0) - 1].startswith("  embedding: 64 ")
    with pytest.raises(RecipeError, match=r"override `critic\.embedding=32`: critic\.embedding: is 32, but the actor"):
        dry_run(load_recipe("mat", ["critic.embedding=32"]))
    dry_run(load_recipe("mat", ["actor.embedding=16", "critic.embedding=16"]))


def test_sharing_an_encoder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    text = (SHIPPED / "mat.yaml").read_text(encoding="utf-8")
    found = problem(tmp_path, text, ["actor=stochastic"])
    assert found.where == "critic"
    assert "reads agents.encoding" in found.message
    assert "transformer (`actor=transformer`)" in found.remedy


# --- in the learner -------------------------------------------------------------------------------------------------------


def learner_for(spec: TeamSpec, update: PpoClipUpdate, **critic: Any) -> Learner:
    env = ScriptedEnvironment(spec, random_script(spec, 3, 12))
    torch.manual_seed(0)
    # Single precision, like everywhere in training; weights that are large enough for every step to show.
    actor = scrambled(TransformerActor(spec, embedding=8, blocks=1, heads=2)).float()
    options: dict[str, Any] = {"encoder": "actor", "embedding": 8, "hidden": [8]}
    return learner_of(
        env, actor, critic=TransformerCritic(spec, **(options | critic)), update=update, data=RolloutData(spec, steps=8)
    )


def backward_only(loss: Tensor, max_grad_norm: float | None, adjust: Any = None) -> Metrics:
    loss.backward()
    return {}


def learning_without_steps(learner: Learner) -> Learning:
    return Learning(learner.actor, learner.critic, learner.opponents, backward_only, progress=0.0)


def estimated(learner: Learner) -> TensorDict:
    batch = learner.data.collect(learner.env, learner.actor)
    learner.annotate(batch)
    learner.estimator(batch)
    return batch


@pytest.mark.parametrize("spec", SPECS)
def test_stored_log_probabilities_are_those_of_the_first_minibatch(spec: TeamSpec) -> None:
    learner = learner_for(spec, PpoClipUpdate(spec))
    rows = units(learner.update.prepare(estimated(learner), learning_without_steps(learner)), None)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    stored = rows[keys.ENCODING].clone()
    log_prob = learner.actor.distribution(rows).log_prob(rows[keys.ACTION])
    torch.testing.assert_close(log_prob, rows[keys.LOG_PROB], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[keys.ENCODING], stored, rtol=1e-5, atol=1e-5)
    assert rows[keys.ENCODING].requires_grad
    assert not stored.requires_grad


def test_a_permuted_minibatch_gives_the_same_rows() -> None:
    """The team of a row is never divided, and rows do not depend on each other."""
    actor, batch = actor_of(DISCRETE), batch_of(DISCRETE, rows=7)
    order = torch.tensor([4, 0, 6, 2])
    whole, part = parameters_of(actor, batch)[keys.LOGITS], parameters_of(actor, batch[order])[keys.LOGITS]
    torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS)
def test_the_critic_loss_reaches_the_shared_encoder(spec: TeamSpec) -> None:
    """Without advantages the policy's loss is flat, and what is left is the gradient of ``mean((V - G)^2) / 2``."""
    update = PpoClipUpdate(
        spec, epochs=1, entropy_coef=0.0, normalise_advantage=False, value_clip=None, huber_delta=None, max_grad_norm=None
    )
    learner = learner_for(spec, update, value_norm=False)
    batch = estimated(learner)
    batch[keys.ADVANTAGE].zero_()
    actor, critic = learner.actor, learner.critic
    assert isinstance(actor, TransformerActor)
    assert isinstance(critic, TransformerCritic)
    values = critic.head(actor.encoder(batch[keys.OBSERVATION]))
    loss = 0.5 * (values - batch[keys.VALUE_TARGET]).square().mean()
    expected = torch.autograd.grad(loss, [*actor.encoder.parameters(), *critic.parameters()])
    update.update(batch, learning_without_steps(learner))
    found = [parameter.grad for parameter in (*actor.encoder.parameters(), *critic.parameters())]
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-7)
    assert sum(gradient.abs().sum() for gradient in expected[:2]) > 1e-4
    assert not any(parameter.grad.any() for parameter in actor.decoder.parameters() if parameter.grad is not None)


def test_the_teams_advantage_is_over_the_mean_of_the_agents_values() -> None:
    """Equation 5 of the paper: GAE with ``(1/N) sum_i V_i``; each ``V_i`` has its own target all the same."""
    learner = learner_for(DISCRETE, PpoClipUpdate(DISCRETE, team_advantage=True, normalise_advantage=False))
    batch = estimated(learner)
    batch[keys.ALIVE].fill_(True)
    prepared = learner.update.prepare(batch, learning_without_steps(learner))
    value, following = (batch[key].double().mean(2)[..., 0] for key in (keys.STATE_VALUE, keys.following(keys.STATE_VALUE)))
    reward, terminated, done = batch[keys.REWARD].mean(2)[..., 0], batch[keys.TERMINATED][..., 0], batch[keys.DONE][..., 0]
    expected, later = torch.zeros(batch.batch_size, dtype=torch.float64), torch.zeros(len(batch), dtype=torch.float64)
    for t in reversed(range(batch.batch_size[1])):
        error = reward[:, t] + 0.99 * ~terminated[:, t] * following[:, t] - value[:, t]
        later = expected[:, t] = error + 0.99 * 0.95 * ~done[:, t] * later
    for agent in range(3):
        torch.testing.assert_close(prepared[keys.ADVANTAGE][..., agent, 0].double(), expected, rtol=1e-5, atol=1e-5)
    own = batch[keys.ADVANTAGE] + batch[keys.STATE_VALUE]
    torch.testing.assert_close(prepared[keys.VALUE_TARGET], own, rtol=1e-5, atol=1e-5)
    assert (own - own.mean(2, keepdim=True)).abs().max() > 0.01


def test_the_policy_loss_reaches_the_encoder_too() -> None:
    update = PpoClipUpdate(DISCRETE, epochs=1, value_coef=0.0, entropy_coef=0.0)
    learner = learner_for(DISCRETE, update)
    update.update(estimated(learner), learning_without_steps(learner))
    assert isinstance(learner.actor, TransformerActor)
    assert all(p.grad is not None and p.grad.any() for p in learner.actor.encoder.embed[0].parameters())


@pytest.mark.parametrize("encoder", ["actor", "own"])
def test_one_optimiser_steps_every_parameter_once(encoder: str) -> None:
    learner = learner_for(DISCRETE, PpoClipUpdate(DISCRETE, epochs=3, minibatch_size=10), encoder=encoder)
    groups = learner.parameter_groups()
    own = {name: {id(p) for p in getattr(learner, name).parameters()} for name in ("actor", "critic")}
    assert {name: {id(p) for p in group} for name, group in groups.items()} == own
    assert not own["actor"] & own["critic"]
    assert isinstance(learner.actor, TransformerActor)
    assert {id(p) for p in learner.actor.encoder.parameters()} < own["actor"]
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    fit(learner, 2)
    still = {name for name, parameter in learner.named_parameters() if torch.equal(parameter, before[name])}
    assert {name for name in still if not name.endswith("key.bias")} == set()


# --- what the order is good for -------------------------------------------------------------------------------------------


def reward_of(actor: Actor, env: MatrixGameEnvironment) -> float:
    """Mean reward in ``r = [a_1 ≠ a_2]`` after a short training."""
    spec = env.spec
    learner = learner_of(
        env,
        actor,
        critic=TransformerCritic(spec, hidden=[8], embedding=8, agent_id=False),
        update=PpoClipUpdate(spec, epochs=5, entropy_coef=0.0),
        data=RolloutData(spec, steps=2),
        optimizer=AdamOptimizer(spec, lr=0.01),
        iterations=30,
    )
    fit(learner, 30)
    return learner.data.collect(env, learner.actor)[keys.REWARD].mean().item()


def test_who_knows_what_was_chosen_before_can_differ_from_an_equal() -> None:
    """Agents that see the same and have no identity: alike they agree half of the time at best, one after another never."""
    env = MatrixGameEnvironment(Runtime(torch.device("cpu"), 0), game="xor", num_envs=64)
    torch.manual_seed(0)
    assert reward_of(TransformerActor(env.spec, embedding=16, agent_id=False), env) > 0.97
    assert reward_of(StochasticActor(env.spec, hidden=[16], agent_id=False), env) < 0.65
