"""Equal to public implementations on small fixed batches, to 1e-12 of double precision.

The numbers are in ``tests/golden/public_code.json``; ``tests/golden/make_public_code.py`` has made them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, learner_of, random_script
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from marlkit import keys
from marlkit.actors.epsilon_greedy import EpsilonGreedyActor
from marlkit.actors.transformer import TransformerActor
from marlkit.critics.factorised import FactorisedCritic
from marlkit.critics.transformer import TransformerCritic
from marlkit.data.replay import ReplayData
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.functional import trust_region
from marlkit.functional.counterfactual import executed_value, policy_value
from marlkit.functional.losses import policy_gradient_loss, ppo_clip_loss, value_loss
from marlkit.functional.returns import generalised_advantage, lambda_return
from marlkit.learning import Learning, Metrics
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.optim.q_learning import QLearningUpdate
from marlkit.spec import Discrete, TeamSpec
from marlkit.targets.hard import HardTargets
from marlkit.training.learner import Learner

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "public_code.json").read_text())


def case(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given and what was found, as tensors."""
    both = GOLDEN["cases"][name]
    given, found = ({key: _tensor(value) for key, value in both[part].items()} for part in ("given", "found"))
    return given, found


def _tensor(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tensor(entry) for key, entry in value.items()}
    read = torch.tensor(value)
    return read.double() if read.is_floating_point() or read.dtype == torch.bool else read


@pytest.fixture(autouse=True)
def _in_double_precision() -> Any:
    # So that JSON's numbers are read as they were written.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=tolerance, atol=tolerance)


def test_generalised_advantage_is_that_of_mappo_and_of_mat() -> None:
    given, found = case("gae")
    # They have time first, and note of a step whether the next one belongs to the episode.
    reward, value, mask = (given[name].transpose(0, 1) for name in ("reward", "value", "mask"))
    done = mask[:, 1:] == 0
    options = {"gamma": 0.99, "lmbda": 0.95}
    _, target = generalised_advantage(reward, value[:, :-1], value[:, 1:], done, done, **options)
    close(target.transpose(0, 1), found["returns"])
    team = value.mean(-2, keepdim=True).expand_as(value)
    advantage, _ = generalised_advantage(reward, team[:, :-1], team[:, 1:], done, done, **options)
    close(advantage.transpose(0, 1), found["team_advantage"])


def test_the_value_normaliser_is_that_of_mappo() -> None:
    given, found = case("value_norm")
    norm = ValueNormaliser(enabled=True).double()
    for batch, mean, variance in zip(given["batches"], found["mean"], found["variance"], strict=True):
        norm.update(batch)
        # Theirs holds the weight of the first batch, 1 - 0.99999, to at least 1e-5, from which it differs by 5e-12 of itself.
        first = norm.weight < 1.5e-5
        close(norm.mean, mean, 1e-11 if first else 1e-12)
        close(norm.variance, variance, 1e-10 if first else 1e-12)
    normalised = norm.normalise(given["batches"][-1])
    close(normalised, found["normalised"])
    close(norm.denormalise(normalised), found["back"])


def test_clipped_losses_are_those_of_mappo() -> None:
    given, found = case("ppo")
    log_prob, value, alive = given["log_prob"].requires_grad_(), given["value"].requires_grad_(), given["alive"]
    policy = ppo_clip_loss(log_prob, given["old_log_prob"], given["advantage"], alive, clip_epsilon=0.2)
    close(policy, found["policy_loss"])
    close(torch.autograd.grad(policy, log_prob)[0], found["policy_gradient"])
    critic = value_loss(value, given["old_value"], given["target"], alive, clip=0.2, huber_delta=1.0)
    close(critic, found["value_loss"])
    close(torch.autograd.grad(critic, value)[0], found["value_gradient"])


def test_the_loss_after_other_agents_is_that_of_happo() -> None:
    given, found = case("happo")
    log_prob = given["log_prob"].requires_grad_()
    own, old = (each.sum(-1, keepdim=True) for each in (log_prob, given["old_log_prob"]))
    loss = ppo_clip_loss(own, old, given["factor"] * given["advantage"], given["alive"], clip_epsilon=0.2)
    close(loss, found["loss"])
    close(torch.autograd.grad(loss, log_prob)[0], found["gradient"])


def test_the_step_in_the_trust_region_is_that_of_hatrpo() -> None:
    given, found = case("hatrpo")
    parameters = [nn.Parameter(given["weight"].clone()), nn.Parameter(torch.zeros(2))]
    weighted, alive = given["factor"] * given["advantage"], given["alive"]

    def policy() -> Normal:
        return Normal(given["observation"] @ parameters[0], parameters[1].exp())

    def gain() -> Tensor:
        ratio = (policy().log_prob(given["action"]) - given["old_log_prob"]).sum(-1, keepdim=True).exp()
        return (ratio * weighted * alive).sum() / alive.sum()

    old = Normal(policy().loc.detach(), policy().scale.detach())

    def divergence() -> Tensor:
        return kl_divergence(old, policy()).sum(-1).mean()

    start, first = trust_region.flatten([each.detach().clone() for each in parameters]), gain()
    slope = trust_region.flatten(torch.autograd.grad(first, parameters))
    product = trust_region.hessian_product(divergence(), parameters, damping=0.1)
    direction = trust_region.conjugate_gradient(product, slope, iterations=10, tolerance=0.0)
    step = trust_region.step_to_edge(direction, product, limit=0.01)

    def trial(fraction: float) -> tuple[float, float]:
        moved = trust_region.unflatten(start + fraction * step, parameters)
        with torch.no_grad():
            for own, new in zip(parameters, moved, strict=True):
                own.copy_(new)
        return divergence().item(), (gain() - first).item()

    chosen = trust_region.search_back(trial, slope.dot(step).item(), limit=0.01, accept_ratio=0.5, trials=10, factor=0.8)
    assert chosen.fraction > 0
    close(parameters[0], found["weight"])
    close(parameters[1], found["log_deviation"])
    close(torch.tensor([chosen.divergence, chosen.gain]), torch.stack([found["divergence"].squeeze(), found["gain"].squeeze()]))


def test_targets_and_policy_gradient_are_those_of_coma() -> None:
    given, found = case("coma")
    counted = given["counted"] != 0  # what comes after an episode's end is padding
    ended = given["terminated"] != 0
    taken = executed_value(given["target_q"], given["action"].squeeze(-1))[:, 1:]
    targets = lambda_return(given["reward"], taken, ended, ended, gamma=0.99, lmbda=0.8)
    close(targets.squeeze(-1) * counted, found["targets"] * counted)
    unavailable = given["available"] == 0
    logits = given["logits"].requires_grad_()
    masked = logits.masked_fill(unavailable, -1e10)[:, :-1]
    action, values = given["action"][:, :-1], given["q"][:, :-1]
    log_prob = masked.log_softmax(-1).gather(-1, action)
    advantage = executed_value(values, action.squeeze(-1)) - policy_value(values, masked)
    loss = policy_gradient_loss(log_prob, advantage, counted.unsqueeze(-1).expand_as(log_prob))
    close(torch.autograd.grad(loss, logits)[0], found["policy_gradient"])


def test_values_and_log_probabilities_are_those_of_the_multi_agent_transformer() -> None:
    given, found = case("mat")
    spec = TeamSpec(3, 5, Discrete(4), team_reward=True)
    actor = TransformerActor(spec, embedding=8, blocks=2, heads=2).double()
    critic = TransformerCritic(spec, encoder="actor", embedding=8, hidden=[8], value_norm=False).double()
    _load(actor, critic, given["weights"])
    action = given["action"].squeeze(-1)
    held = {keys.OBSERVATION: given["observation"], keys.ACTION_MASK: given["available"] != 0, keys.ACTION: action}
    batch = TensorDict(held, action.shape[:1])
    policy = actor.distribution(batch)
    close(policy.log_prob(action), found["log_prob"])
    close(critic.predict(batch), found["value"])


def _load(actor: TransformerActor, critic: TransformerCritic, weights: dict[str, Tensor]) -> None:
    """Give marlkit's networks the weights of theirs, every one of which is used."""
    left = {name: value for name, value in weights.items() if not name.startswith("encoder.head.2.")}

    def fill(ours: nn.Module, theirs: str) -> None:
        for name, parameter in ours.named_parameters():
            parameter.data.copy_(left.pop(f"{theirs}.{name}"))

    team = nn.ModuleDict({"encoder": actor.encoder, "decoder": actor.decoder})
    for ours, theirs in _pairs():
        fill(team.get_submodule(ours), theirs)
    for layer, theirs in ((0, "encoder.head.0"), (1, "encoder.head.3")):
        for ours in ("weight", "bias"):
            named = f"layers.{layer}.{ours}{'s' if ours == 'weight' else 'es'}.0"
            critic.head.get_parameter(named).data.copy_(left.pop(f"{theirs}.{ours}"))
    # Their decoder has an encoder of observations that it does not use.
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in left} <= {"decoder.obs_encoder"}


def _pairs() -> Iterator[tuple[str, str]]:
    """Modules of marlkit's actor, and what they are called in theirs."""
    yield from (
        ("encoder.normalise", "encoder.obs_encoder.0"),
        ("encoder.embed.0", "encoder.obs_encoder.1"),
        ("encoder.embed.2", "encoder.ln"),
        ("decoder.embed.0", "decoder.action_encoder.0"),
        ("decoder.embed.2", "decoder.ln"),
    )
    yield from ((f"decoder.head.{layer}", f"decoder.head.{layer}") for layer in (0, 2, 3))
    attentions = {"encoder": {"attention": "attn"}, "decoder": {"among_actions": "attn1", "from_encoding": "attn2"}}
    for index, (part, named) in itertools.product(range(2), attentions.items()):
        block = f"{part}.blocks.{index}"
        for (ours, theirs), layer in itertools.product(named.items(), ("query", "key", "value", "output")):
            yield f"{block}.{ours}.{layer}", f"{block}.{theirs}.{'proj' if layer == 'output' else layer}"
        yield from ((f"{block}.perceptron.{layer}", f"{block}.mlp.{layer}") for layer in (0, 2))
        yield from ((f"{block}.norms.{number}", f"{block}.ln{number + 1}") for number in range(len(named) + 1))


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("mixing", ["none", "sum", "monotone"])
def test_losses_and_gradients_are_those_of_iql_vdn_and_qmix(mixing: str, double: bool) -> None:
    """A step of the whole system: annotation, estimation and update. EPyMARL clips actor and mixer together, marlkit each."""
    given, found = case("q_learning")
    found = found[f"{mixing}_{'double' if double else 'single'}"]
    learner = _tabular(given, mixing, double)
    batch = _transitions(given)
    gradients: list[Tensor] = []

    def minimise(loss: Tensor, max_grad_norm: float | None, adjust: Any = None) -> Metrics:
        parameters = [*learner.actor.parameters(), *learner.critic.parameters()]
        gradients.extend(torch.autograd.grad(loss, parameters))
        return {}

    learner.annotate(batch)
    learner.estimate(batch)
    metrics = learner.update.update(batch, Learning(learner.actor, learner.critic, learner.opponents, minimise, 0.0))
    close(metrics["critic/loss"], found["loss"])
    n_agents = given["q"].shape[2]
    weights, of_mixer = gradients[:n_agents], gradients[2 * n_agents :]
    close(torch.stack(weights).permute(2, 0, 1).reshape(given["q"].shape), found["gradient"])
    names = [name for name, _ in learner.critic.named_parameters()]
    assert len(of_mixer) == len(found["weights"])
    for name, gradient in zip(names, of_mixer, strict=True):
        close(gradient, found["weights"][_name_in_epymarl(name)])


def _tabular(given: dict[str, Any], mixing: Any, double: bool) -> Learner:
    """Actors whose action values of state k are column k of their weights, and mixtures with the given weights."""
    envs, steps, n_agents, actions = given["q"].shape
    spec = TeamSpec(n_agents, envs * steps, Discrete(actions), state=given["state"].shape[-1], team_reward=True)
    actor = EpsilonGreedyActor(spec, hidden=[], share="none")
    learner = learner_of(
        ScriptedEnvironment(spec, random_script(spec, 1, 4)),
        actor,
        critic=FactorisedCritic(spec, mixing=mixing, embedding=4, hidden=[6]),
        data=ReplayData(spec),
        targets=HardTargets(spec, double=double),
        estimator=OneStepEstimator(spec, gamma=0.875, bootstrap="action_value"),
        update=QLearningUpdate(spec),
    )
    networks = {
        "q": (learner.actor, learner.critic, "online"),
        "target_q": (learner.targets.actor(), learner.targets.critic(), "target"),
    }
    with torch.no_grad():
        for table, (own, critic, weights) in networks.items():
            for agent in range(n_agents):
                weight, bias = own.agent_parameters([agent])
                weight.copy_(given[table][:, :, agent].flatten(0, 1).T)
                bias.zero_()
            for name, parameter in critic.named_parameters():
                parameter.copy_(given[weights][_name_in_epymarl(name)])
    return learner


def _name_in_epymarl(name: str) -> str:
    """``networks.weight.layers.1.biases.0`` as ``hyper_w_1.2.bias``."""
    _, network, _, layer, kind, _ = name.split(".")
    theirs = {"weight": "hyper_w_1", "bias": "hyper_b_1", "final_weight": "hyper_w_final", "final_bias": "V"}[network]
    place = "" if network == "bias" else f".{2 * int(layer)}"
    return f"{theirs}{place}.{'weight' if kind == 'weights' else 'bias'}"


def _transitions(given: dict[str, Any]) -> TensorDict:
    """The steps that count, ``[R, 1]``; state k is observed as the k-th unit vector."""
    envs, steps, n_agents, _ = given["q"].shape
    seen = torch.eye(envs * steps).reshape(envs, steps, 1, -1).expand(-1, -1, n_agents, -1)
    available, ended = given["available"] != 0, given["terminated"] != 0
    values = {
        keys.OBSERVATION: seen[:, :-1], keys.following(keys.OBSERVATION): seen[:, 1:],
        keys.STATE: given["state"][:, :-1], keys.following(keys.STATE): given["state"][:, 1:],
        keys.ACTION_MASK: available[:, :-1], keys.following(keys.ACTION_MASK): available[:, 1:],
        keys.ACTION: given["action"][:, :-1].squeeze(-1), keys.REWARD: given["reward"].unsqueeze(2).expand(-1, -1, n_agents, -1),
        keys.TERMINATED: ended, keys.DONE: ended,
    }  # fmt: skip
    counted = given["counted"].squeeze(-1) != 0
    batch = TensorDict({}, batch_size=[int(counted.sum()), 1])
    for key, value in values.items():
        batch.set(key, value[counted].unsqueeze(1))
    return batch
