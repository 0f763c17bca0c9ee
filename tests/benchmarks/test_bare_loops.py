"""The bare loops that marlkit is timed against do its work: the same options, and the same parameters after the same batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.bare import consensus, f2a2_ddpg, happo, maddpg, mind, on_policy, perla_mappo_vmas, qmix
from benchmarks.bare.stopwatch import overrides
from marlkit import keys
from marlkit.functional import marginal
from marlkit.learning import Adjust, Learning, Metrics
from marlkit.recipe import load_recipe
from marlkit.training.assembly import build_environment, build_learner

WORKS: dict[str, Any] = {
    "happo": happo.Work, "perla_mappo_vmas": perla_mappo_vmas.Work, "maddpg": maddpg.Work, "f2a2_ddpg": f2a2_ddpg.Work,
    "qmix": qmix.Work,
}  # fmt: skip
CPU = torch.device("cpu")
RATE = 0.05


@pytest.mark.parametrize("recipe", WORKS)
def test_the_work_is_the_recipes_own(recipe: str) -> None:
    assert load_recipe(recipe, overrides(WORKS[recipe]())).config == load_recipe(recipe).config


def test_the_options_that_cannot_be_set_are_the_recipes_too() -> None:
    for recipe in ("happo", "perla_mappo_vmas"):
        config = load_recipe(recipe).config
        step = config["update"].step if recipe == "happo" else config["update"]
        assert (step.clip_epsilon, step.value_clip, step.huber_delta) == (on_policy.CLIP, on_policy.VALUE_CLIP, on_policy.HUBER)
        assert (step.max_grad_norm, config.optimizer.lr) == (on_policy.MAX_GRAD_NORM, on_policy.LEARNING_RATE)
        assert (config.estimator.gamma, config.estimator.lmbda) == (on_policy.GAMMA, on_policy.LAMBDA)
    for recipe in ("maddpg", "f2a2_ddpg"):
        config = load_recipe(recipe).config
        assert (config.estimator.gamma, config.targets.tau, config.targets.actor) == (maddpg.GAMMA, maddpg.TAU, True)
        assert (config.optimizer.lr, config.data.capacity) == (maddpg.LEARNING_RATE, maddpg.CAPACITY)
        assert (config.optimizer.critic_lr, config.optimizer.eps) == (maddpg.CRITIC_LEARNING_RATE, maddpg.EPSILON)
        assert (config.env.max_steps, config.actor.exploration) == (maddpg.EPISODE, maddpg.EXPLORATION)
    update, opponents = config["update"], config["opponents"]
    assert (update.penalty, update.interval_mean, update.topology) == (consensus.PENALTY, consensus.INTERVAL_MEAN, "ring")
    step = update.step
    assert (step.actor_weight, step.critic_weight) == (f2a2_ddpg.ACTOR_WEIGHT, f2a2_ddpg.CRITIC_WEIGHT)
    assert (step.ratio_limit, step.coefficient_floor) == (f2a2_ddpg.RATIO_LIMIT, f2a2_ddpg.COEFFICIENT_FLOOR)
    assert (step.max_grad_norm, update.interval_std) == (f2a2_ddpg.MAX_GRAD_NORM, consensus.INTERVAL_DEVIATION)
    assert load_recipe("maddpg").config["update"].max_grad_norm == maddpg.MAX_GRAD_NORM
    assert (opponents.memory, opponents.memory_layers, list(opponents.hidden)) == (mind.MEMORY, mind.LAYERS, [mind.HIDDEN])
    assert (opponents.history, opponents.every) == (f2a2_ddpg.HISTORY, f2a2_ddpg.EVERY)
    assert (opponents.characters, opponents.character_length) == (f2a2_ddpg.CHARACTERS, f2a2_ddpg.CHARACTER_LENGTH)
    assert (opponents.character_batch, opponents.recent) == (f2a2_ddpg.CHARACTER_BATCH, f2a2_ddpg.LATEST_PAIRS)
    assert (opponents.fit_rows, opponents.max_grad_norm) == (f2a2_ddpg.FIT_ROWS, f2a2_ddpg.MINDS_GRAD_NORM)


def test_the_options_of_qmix_that_cannot_be_set_are_the_recipes_too() -> None:
    recipe = load_recipe("qmix")
    config, critic = recipe.config, recipe.options("critic")
    assert (config.estimator.gamma, config.targets.interval) == (qmix.GAMMA, qmix.INTERVAL)
    assert (critic["embedding"], critic["hidden"]) == (qmix.EMBEDDING, [qmix.MIXER_HIDDEN])
    assert (config.optimizer.lr, config.optimizer.eps, config.data.capacity) == (
        qmix.LEARNING_RATE, qmix.EPSILON, qmix.CAPACITY
    )  # fmt: skip
    assert (config["update"].max_grad_norm, config.env.max_steps) == (qmix.MAX_GRAD_NORM, qmix.EPISODE)
    assert config.actor.uniform_share == qmix.UNIFORM_SHARE


@pytest.fixture(autouse=True)
def same_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in order and no surprises, so that both sides see the same whatever they draw."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))


def learner_of(recipe: str, work: Any, *more: str) -> Any:
    loaded = load_recipe(recipe, [*overrides(work), *more])
    return build_learner(loaded, build_environment(loaded, CPU, 0))


def descending(learner: Any) -> Learning:
    """Plain gradient descent, which hides no difference between two gradients."""

    def minimise(loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        groups = {name: getattr(learner, name) for name in ("actor", "critic", "opponents")}
        for module in groups.values():
            module.zero_grad()
        loss.backward()
        reached = {name: [p for p in module.parameters() if p.grad is not None] for name, module in groups.items()}
        for parameters in filter(None, reached.values()):
            nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
        if adjust is not None:
            adjust()
        with torch.no_grad():
            for parameter in chain(*reached.values()):
                parameter.sub_(RATE * parameter.grad)
        learner.targets.follow([name for name, parameters in reached.items() if parameters])
        return {}

    return Learning(learner.actor, learner.critic, learner.opponents, minimise, 0.0, learner.targets.follow)


def descent(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, RATE)


def team(observation: Tensor, action: Tensor | None = None) -> dict[keys.Key, Tensor]:
    """What marlkit's environments say of observations ``[B, T, N, O]`` beside rewards and ends."""
    shape = observation.shape[:-1]
    found: dict[keys.Key, Tensor] = {
        keys.OBSERVATION: observation,
        keys.STATE: observation.flatten(-2),
        keys.ALIVE: torch.ones(*shape, 1, dtype=torch.bool),
        keys.ACTION_DIMS: torch.ones(*shape, 2, dtype=torch.bool),
        keys.IS_FIRST: torch.zeros(*shape[:-1], 1, dtype=torch.bool),
    }
    return found if action is None else found | {keys.ACTION: action}


def batch_of(
    observation: Tensor, action: Tensor, log_prob: Tensor, reward: Tensor, following: Tensor, terminated: Tensor
) -> TensorDict:
    """A batch ``[B, T]``; rewards ``[B, T, N]`` and ends ``[B, T]``."""
    batch = TensorDict({}, batch_size=observation.shape[:2])
    for key, value in team(observation, action).items():
        batch.set(key, value)
    for key, value in team(following).items():
        batch.set(keys.following(key), value)
    ends = terminated.bool().unsqueeze(-1)
    batch.set(keys.LOG_PROB, log_prob.unsqueeze(-1)).set(keys.REWARD, reward.unsqueeze(-1))
    batch.set(keys.TERMINATED, ends).set(keys.TRUNCATED, torch.zeros_like(ends)).set(keys.DONE, ends)
    return batch


def rollout_of(loop: happo.Happo | perla_mappo_vmas.PerlaMappo) -> TensorDict:
    """What a bare on-policy loop has played, stored time-major as marlkit does."""
    steps = [loop.observation[:-1], loop.action, loop.log_prob, loop.reward.expand(*loop.log_prob.shape)]
    steps += [loop.observation[1:], loop.done.squeeze(-1)]
    return batch_of(*steps).transpose(0, 1)


def unsettle(loop: happo.Happo | perla_mappo_vmas.PerlaMappo) -> None:
    """Some early ends, and a policy that has moved."""
    loop.done = torch.rand(loop.done.shape) < 0.2
    loop.log_prob += 0.2 * torch.randn_like(loop.log_prob)


def copy_linear(linear: nn.Linear, layer: Any, group: int = 0) -> None:
    with torch.no_grad():
        linear.weight.copy_(layer.weights[group])
        linear.bias.copy_(layer.biases[group])


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=2e-6)


def test_happo_learns_the_same() -> None:
    work = happo.Work(envs=4, steps=6, hidden=8, epochs=2, minibatch=24)
    learner, loop = learner_of("happo", work), happo.Happo(work, CPU)
    network = learner.actor.network

    def pairs() -> list[tuple[nn.Linear, Any, int]]:
        found = [(linears(p)[k], network.layers[k], agent) for agent, p in enumerate(loop.policies) for k in range(3)]
        return found + [(linears(loop.critic)[k], learner.critic.network.layers[k], 0) for k in range(3)]

    for linear, layer, group in pairs():
        copy_linear(linear, layer, group)
    loop.collect()
    unsettle(loop)
    loop.policy_steps, loop.critic_step = [descent(p.parameters()) for p in loop.policies], descent(loop.critic.parameters())
    batch = rollout_of(loop)
    before = linears(loop.critic)[0].weight.clone()
    learner.annotate(batch)
    learner.update.update(learner.estimator(batch), descending(learner))
    loop.update()
    for linear, layer, group in pairs():
        assert close(linear.weight, layer.weights[group])
        assert close(linear.bias, layer.biases[group])
    for agent, policy in enumerate(loop.policies):
        assert close(policy.log_std, learner.actor.log_deviation[agent])
    assert not torch.equal(before, linears(loop.critic)[0].weight)


def test_perla_mappo_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    work = perla_mappo_vmas.Work(envs=4, steps=6, hidden=8, samples=5, epochs=2, minibatch=24)
    learner, loop = learner_of("perla_mappo_vmas", work), perla_mappo_vmas.PerlaMappo(work, CPU)
    uniform = torch.rand(5 * 3 * 2)
    noise = marginal.normal_from_uniform(uniform).view(5, 3, 2)
    monkeypatch.setattr(marginal, "counter_uniform", lambda s, first, count: uniform[first : first + count].expand(len(s), -1))
    monkeypatch.setattr(loop, "_noise", lambda loc: noise.expand(len(loc), -1, -1, -1))
    actor, critic = learner.actor, learner.critic
    pairs = [*zip(linears(loop.policy), actor.network.layers, strict=True)]
    pairs += zip(linears(loop.critic), critic.network.layers, strict=True)
    for linear, layer in pairs:
        copy_linear(linear, layer)
    with torch.no_grad():
        loop.policy.identity.copy_(actor.network.identity)
        loop.critic.identity.copy_(critic.network.identity)
        loop.critic.action.copy_(critic.action_layer.weights[0].T.view(3, 2, 8))
    loop.collect()
    unsettle(loop)
    loop.step = descent(chain(*loop.parameters))
    batch = rollout_of(loop)
    batch.set(keys.LOC, loop.loc[:-1].transpose(0, 1)).set(keys.SCALE, torch.ones_like(batch[keys.ACTION]))
    learner.annotate(batch)
    learner.update.update(learner.estimator(batch), descending(learner))
    before = loop.critic.action.clone()
    loop.update()
    for linear, layer in pairs:
        assert close(linear.weight, layer.weights[0])
        assert close(linear.bias, layer.biases[0])
    assert close(loop.policy.log_std, actor.log_deviation[0])
    assert close(loop.policy.identity, actor.network.identity)
    assert close(loop.critic.identity, critic.network.identity)
    assert close(loop.critic.action.flatten(0, 1).T, critic.action_layer.weights[0])
    assert not torch.equal(before, loop.critic.action)


def flat(layers: Sequence[Any], first: Sequence[Any] = ()) -> Tensor:
    """Parameters ``[N, P]`` of unshared networks in the order of the bare loops; ``first`` also reads the first layer's input."""
    rows = []
    for agent in range(len(layers[0].weights)):
        entering = torch.cat([layer.weights[agent] for layer in (layers[0], *first)], 1)
        weights = [entering, *(layer.weights[agent] for layer in layers[1:])]
        biases = [layer.biases[agent] for layer in layers]
        rows.append(torch.cat([part.flatten() for pair in zip((w.T for w in weights), biases, strict=True) for part in pair]))
    return torch.stack(rows).detach()


def critic_parameters(critic: Any) -> Tensor:
    return flat(list(critic.network.layers), [critic.action_layer])


def take_over(loop: maddpg.Maddpg | f2a2_ddpg.F2a2Ddpg, learner: Any) -> None:
    loop.actor = flat(list(learner.actor.network.layers)).requires_grad_()
    loop.critic = critic_parameters(learner.critic).requires_grad_()
    # Behind the online networks, as copies soon are.
    with torch.no_grad():
        for name, copied in (("actor", learner.targets.actor()), ("critic", learner.targets.critic())):
            for parameter in copied.parameters():
                parameter.mul_(0.9)
            setattr(loop, f"{name}_copy", 0.9 * getattr(loop, name).detach())
    loop.actor_step, loop.critic_step = descent([loop.actor]), descent([loop.critic])


def assert_equal_parameters(loop: maddpg.Maddpg | f2a2_ddpg.F2a2Ddpg, learner: Any) -> None:
    for name, actor, critic in (
        ("", learner.actor, learner.critic),
        ("_copy", learner.targets.actor(), learner.targets.critic()),
    ):
        assert close(getattr(loop, f"actor{name}").detach(), flat(list(actor.network.layers)))
        assert close(getattr(loop, f"critic{name}").detach(), critic_parameters(critic))


def test_maddpg_learns_the_same() -> None:
    work = maddpg.Work(envs=4, steps=5, hidden=8, updates=1, batch=16)
    learner, loop = learner_of("maddpg", work, "data.warm_up=0"), maddpg.Maddpg(work, CPU)
    take_over(loop, learner)
    loop.collect()
    drawn = loop.replay.draw(work.batch)
    kept = maddpg.Batch(*(loop.replay.take(name, *drawn) for name in maddpg.Batch._fields))
    kept = kept._replace(terminated=(torch.rand(16) < 0.3).float())
    steps = [kept.observation, kept.action, torch.zeros_like(kept.reward), kept.reward, kept.following, kept.terminated]
    batch = batch_of(*(tensor.unsqueeze(1) for tensor in steps))
    learner.annotate(batch)
    learner.update.update(learner.estimator(batch), descending(learner))
    before = loop.actor.detach().clone()
    loop.learn(kept)
    assert_equal_parameters(loop, learner)
    assert not close(before, loop.actor.detach())


def pairs_of_qmix(networks: qmix.Networks, actor: Any, critic: Any) -> list[tuple[Tensor, Tensor]]:
    """The bare loop's parameters beside marlkit's."""
    linear: list[tuple[Any, Any]] = list(zip(list(networks.agent.children()), actor.network.layers, strict=True))
    for name, network in critic.networks.items():
        own = getattr(networks.mixer, name)
        linear += zip([own] if isinstance(own, nn.Linear) else [own[0], own[2]], network.layers, strict=True)
    pairs: list[tuple[Tensor, Tensor]] = [(networks.agent.identity, actor.network.identity)]
    for own, layer in linear:
        pairs += [(own.weight, layer.weights[0]), (own.bias, layer.biases[0])]
    return pairs


def test_qmix_learns_the_same() -> None:
    work = qmix.Work(envs=4, steps=5, hidden=8, updates=1, batch=16)
    learner, loop = learner_of("qmix", work, "data.warm_up=0", "actor.output_gain=1.0"), qmix.Qmix(work, CPU)
    online = (loop.networks, learner.actor, learner.critic)
    copied = (loop.copies, learner.targets.actor(), learner.targets.critic())
    with torch.no_grad():
        for parameter in (*learner.targets.actor().parameters(), *learner.targets.critic().parameters()):
            parameter.mul_(0.9)  # behind the online networks, as copies soon are
        for own, theirs in pairs_of_qmix(*online) + pairs_of_qmix(*copied):
            own.copy_(theirs)
    loop.optimizer = descent(loop.networks.parameters())
    loop.collect()
    drawn = loop.replay.draw(work.batch)
    kept = qmix.Batch(*(loop.replay.take(name, *drawn) for name in qmix.Batch._fields))
    kept = kept._replace(terminated=(torch.rand(16) < 0.3).float())
    reward = kept.reward.unsqueeze(-1).expand(-1, 3)
    steps = [kept.observation, kept.action.long(), torch.zeros_like(reward), reward, kept.following, kept.terminated]
    batch = batch_of(*(tensor.unsqueeze(1) for tensor in steps)).exclude(keys.ACTION_DIMS, keys.following(keys.ACTION_DIMS))
    for key in (keys.ACTION_MASK, keys.following(keys.ACTION_MASK)):
        batch.set(key, torch.ones(16, 1, 3, 9, dtype=torch.bool))
    learner.annotate(batch)
    learner.update.update(learner.estimator(batch), descending(learner))
    before = loop.networks.agent.last.weight.detach().clone()
    loop.learn(kept)
    assert not close(before, loop.networks.agent.last.weight.detach())
    for own, theirs in pairs_of_qmix(*online) + pairs_of_qmix(*copied):
        assert close(own.detach(), theirs.detach())


def copy_units(unit: nn.GRU, encoder: Any, network: int) -> None:
    with torch.no_grad():
        for number, layer in enumerate(encoder.layers):
            for name, linear in (("ih", layer.from_input), ("hh", layer.from_hidden)):
                getattr(unit, f"weight_{name}_l{number}").copy_(linear.weights[network])
                getattr(unit, f"bias_{name}_l{number}").copy_(linear.biases[network])


def head_parameters(head: Any) -> Tensor:
    return flat([head.seen, *head.rest], list(head.remembered))


def take_over_minds(loop: Any, networks: Any) -> None:
    for network in range(3):
        copy_units(loop.minds.character_units[network], networks.character_encoder, network)
        copy_units(loop.minds.mental_units[network], networks.mental_encoder, network)
    with torch.no_grad():
        # Predictions start near zero, where errors would hide.
        for head in (networks.natural_head, networks.impromptu_head):
            for weight in head.rest[-1].weights:
                weight.mul_(30)
        loop.minds.natural.copy_(head_parameters(networks.natural_head))
        loop.minds.impromptu.copy_(head_parameters(networks.impromptu_head))
    loop.minds_step = descent(loop.minds.parameters())


def right_aligned(seen: Tensor, length: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Steps ``[R, M, N, *]`` of which the first ``length`` count, as marlkit shows them: what counts comes last."""
    count = seen.shape[1]
    source = torch.arange(count) - (count - length).unsqueeze(1)
    valid = source >= 0
    shifted = seen[torch.arange(len(seen)).unsqueeze(1), source.clamp(min=0)] * valid[..., None, None]
    return shifted[..., :features], shifted[..., features:], valid


def test_f2a2_ddpg_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.5))
    work = f2a2_ddpg.Work(envs=4, steps=30, hidden=8, updates=1, batch=16)
    learner, loop = learner_of("f2a2_ddpg", work, "data.warm_up=0"), f2a2_ddpg.F2a2Ddpg(work, CPU)
    opponents: Any = learner.opponents
    take_over(loop, learner)
    take_over_minds(loop, opponents.networks)
    loop.collect()
    played = {name: tensor[:30].transpose(0, 1) for name, tensor in loop.replay.kept.items()}
    observation, action = played["seen"][..., :-2], played["seen"][..., -2:]
    rollout = batch_of(observation, action, played["log_prob"], played["reward"], played["following"], played["terminated"])
    opponents.observe(rollout)
    assert close(loop.character.transpose(0, 1), opponents.character)

    kept = loop._drawn()
    kept = kept._replace(
        terminated=(torch.rand(16) < 0.3).float(),
        log_prob=kept.log_prob + 0.3 * torch.randn(16, 3),
        mean=kept.mean + 0.3 * torch.randn(16, 3, 2),
    )
    assert kept.length.min() < 5
    steps = [kept.observation, kept.action, kept.log_prob, kept.reward, kept.following, kept.terminated]
    batch = batch_of(*(tensor.unsqueeze(1) for tensor in steps))
    batch.set(keys.BEHAVIOUR_LOC, kept.mean.unsqueeze(1))
    batch.set(keys.BEHAVIOUR_SCALE, torch.full_like(kept.mean, maddpg.EXPLORATION).unsqueeze(1))
    recent = (keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID)
    features = loop.simulator.features
    for key, now, later in zip(
        recent,
        right_aligned(kept.seen, kept.length, features),
        right_aligned(kept.seen_after, kept.length_after, features),
        strict=True,
    ):
        batch.set(key, now.unsqueeze(1)).set(keys.following(key), later.unsqueeze(1))

    update: Any = learner.update
    dual = torch.randn_like(loop.critic.detach())
    order = critic_order(learner.critic)
    loop.agreement.dual.copy_(dual)
    loop.agreement.view.zero_()
    update.copies["critic"].dual.copy_(dual[:, order])
    update.copies["critic"].view.zero_()
    loop.agreement.wait = torch.tensor([1.0, 1.0, 9.0])
    update.copies["critic"].waits = [1, 1, 9]

    learner.annotate(batch)
    learner.estimator(batch)
    update.update(batch, descending(learner))
    before = loop.minds.natural.detach().clone()
    loop.learn(kept)
    assert_equal_parameters(loop, learner)
    # The change alone: beside the duals it would be lost.
    assert close((loop.agreement.dual - dual)[:, order], update.copies["critic"].dual - dual[:, order])
    assert close(loop.agreement.view[:, order], update.copies["critic"].view)

    opponents.fit(batch, descending(learner))
    loop.fit_minds(kept)
    assert close(loop.minds.natural.detach(), head_parameters(opponents.networks.natural_head))
    assert close(loop.minds.impromptu.detach(), head_parameters(opponents.networks.impromptu_head))
    assert close(loop.character.transpose(0, 1), opponents.character)
    assert not close(before, loop.minds.natural.detach())


def critic_order(critic: Any) -> Tensor:
    """Where marlkit's flattened copy of an agent's critic keeps the entries of the bare loop's."""
    numbers = iter(range(10**6))
    with torch.no_grad():
        saved = [parameter.clone() for parameter in critic.parameters()]
        for parameter in critic.agent_parameters([0]):
            parameter.copy_(
                torch.tensor([next(numbers) for _ in range(parameter.numel())], dtype=torch.float32).view_as(parameter)
            )
        place = critic_parameters(critic)[0].long()
        for parameter, value in zip(critic.parameters(), saved, strict=True):
            parameter.copy_(value)
    return place.argsort()
