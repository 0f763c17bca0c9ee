"""With one agent every system of the recipes is single-agent PPO, written out here once more and on its own."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from scripted import FixedData, ScriptedEnvironment, fit, random_script
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.nn.networks import TeamNetwork
from marlkit.recipe import load_recipe
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.training.assembly import build_learner
from marlkit.training.learner import Learner

GAMMA, LMBDA, CLIP, ENTROPY, EPOCHS, ITERATIONS, LR, MAX_NORM = 0.97, 0.9, 0.05, 0.02, 4, 2, 2e-3, 0.3
SYSTEMS = ("happo", "ippo", "mappo", "perla_ippo_vmas", "perla_mappo_vmas")
SPECS = {
    "discrete": TeamSpec(1, 4, Discrete(3), team_reward=True),
    "continuous": TeamSpec(1, 4, Continuous(2, ((-1.0, 0.0),), ((1.0, 3.0),)), team_reward=True),
}


def learner_of_recipe(name: str, spec: TeamSpec) -> Learner:
    """The learner of a shipped recipe, small, around one scripted agent."""
    step = "update.step" if name == "happo" else "update"
    overrides = [
        "env.scenario=simple", "env.scenario_options={}", "actor.hidden=[8, 6]", "actor.output_gain=1.0", "critic.hidden=[7]",
        f"estimator.gamma={GAMMA}", f"estimator.lmbda={LMBDA}", f"{step}.clip_epsilon={CLIP}", f"{step}.entropy_coef={ENTROPY}",
        f"{step}.epochs={EPOCHS}", f"{step}.minibatch_size=null", f"{step}.max_grad_norm={MAX_NORM}", f"optimizer.lr={LR}",
        f"trainer.iterations={ITERATIONS}", "seed=3",
    ]  # fmt: skip
    env = ScriptedEnvironment(spec, random_script(spec, envs=5, steps=24))
    return build_learner(load_recipe(name, overrides), env)


@cache
def batches(kind: str) -> list[TensorDict]:
    """Two rollouts of the first policy, the same for every system; episodes end in both ways."""
    learner = learner_of_recipe("ippo", SPECS[kind])
    found = [learner.data.collect(learner.env, learner.actor)[:, :12].clone() for _ in range(ITERATIONS)]
    assert all(batch[flag].sum() >= 3 for batch in found for flag in (keys.TERMINATED, keys.TRUNCATED))
    return found


def policy_parameters(learner: Learner) -> list[Tensor]:
    """Weight and bias of every layer, then the deviation where actions are continuous."""
    return list(learner.actor.parameters())


def value_parameters(learner: Learner) -> list[Tensor]:
    """Weight and bias of every layer, without a marginalised critic's layer for the actions of others, of whom there are none."""
    network = learner.critic.get_submodule("network")
    assert isinstance(network, TeamNetwork)
    return list(network.parameters())


def trained(name: str, kind: str) -> Learner:
    learner = learner_of_recipe(name, SPECS[kind])
    learner.data = FixedData(learner.env.spec, batches(kind))
    fit(learner, ITERATIONS)
    return learner


class PlainPpo:
    """PPO of one agent in double precision, with plain tensors: no components, no agent axis, no shared code."""

    def __init__(self, learner: Learner) -> None:
        self.actor = [p.detach().double().requires_grad_() for p in policy_parameters(learner)]
        self.critic = [p.detach().double().requires_grad_() for p in value_parameters(learner)]
        self.space = learner.env.spec.action
        groups = [{"params": self.actor, "lr": LR}, {"params": self.critic, "lr": LR}]
        self.optimizer = torch.optim.Adam(groups, eps=1e-5, fused=False, foreach=False)
        self.mean = self.square = self.weight = torch.zeros((), dtype=torch.float64)

    @staticmethod
    def perceptron(layers: list[Tensor], x: Tensor) -> Tensor:
        for index in range(0, len(layers), 2):
            x = (x.tanh() if index else x) @ layers[index].T + layers[index + 1]
        return x

    def policy(self, seen: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy."""
        if isinstance(self.space, Discrete):
            chosen = torch.distributions.Categorical(logits=self.perceptron(self.actor, seen))
            return chosen.log_prob(action), chosen.entropy()
        assert isinstance(self.space, Continuous)
        low, high = (torch.tensor(bound[0], dtype=torch.float64) for bound in (self.space.low or (), self.space.high or ()))
        middle, half = (low + high) / 2, (high - low) / 2
        *layers, deviation = self.actor
        normal = torch.distributions.Normal(middle + half * self.perceptron(layers, seen), half * deviation.exp())
        return normal.log_prob(action).sum(-1), normal.entropy().sum(-1)

    def statistics(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.clamp(min=1e-5)
        return self.mean / weight, (self.square / weight - (self.mean / weight) ** 2).clamp(min=1e-2).sqrt()

    def value(self, seen: Tensor) -> Tensor:
        return self.perceptron(self.critic, seen).squeeze(-1)

    def update(self, batch: TensorDict) -> None:
        seen, following = batch[keys.OBSERVATION][:, :, 0].double(), batch["next", "agents", "observation"][:, :, 0].double()
        action, old = batch[keys.ACTION][:, :, 0], batch[keys.LOG_PROB][:, :, 0, 0].double()
        reward, ended = batch[keys.REWARD][:, :, 0, 0].double(), batch[keys.TERMINATED][..., 0].double()
        done = batch[keys.DONE][..., 0].double()
        with torch.no_grad():
            mean, deviation = self.statistics()
            before = self.value(seen)
            error = reward + GAMMA * (1 - ended) * (self.value(following) * deviation + mean) - (before * deviation + mean)
            advantage = torch.zeros_like(error)
            for t in reversed(range(error.shape[1])):
                later = 0 if t + 1 == error.shape[1] else advantage[:, t + 1]
                advantage[:, t] = error[:, t] + GAMMA * LMBDA * (1 - done[:, t]) * later
            target = advantage + before * deviation + mean
            advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
        for _ in range(EPOCHS):
            beta = 0.99999
            self.mean = beta * self.mean + (1 - beta) * target.mean()
            self.square = beta * self.square + (1 - beta) * (target**2).mean()
            self.weight = beta * self.weight + (1 - beta)
            mean, deviation = self.statistics()
            goal, value = (target - mean) / deviation, self.value(seen)
            clipped = before + (value - before).clamp(-0.2, 0.2)
            worst = torch.max(*(torch.nn.functional.huber_loss(v, goal, reduction="none", delta=10.0) for v in (value, clipped)))
            log_prob, entropy = self.policy(seen, action)
            ratio = (log_prob - old).exp()
            gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            self.optimizer.zero_grad()
            (worst.mean() - gain.mean() - ENTROPY * entropy.mean()).backward()
            for own in (self.actor, self.critic):
                torch.nn.utils.clip_grad_norm_(own, MAX_NORM)
            self.optimizer.step()


@cache
def plain(kind: str) -> PlainPpo:
    ppo = PlainPpo(learner_of_recipe("ippo", SPECS[kind]))
    for batch in batches(kind):
        ppo.update(batch)
    return ppo


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_one_agent_is_single_agent_ppo(name: str, kind: str) -> None:
    start, expected = learner_of_recipe(name, SPECS[kind]), plain(kind)
    learner = trained(name, kind)
    ended = policy_parameters(learner), value_parameters(learner)
    begun = policy_parameters(start), value_parameters(start)
    for own, first, wanted in zip(ended, begun, (expected.actor, expected.critic), strict=True):
        assert len(own) == len(wanted)
        for got, before, should in zip(own, first, wanted, strict=True):
            assert (got - before).abs().max() > 1e-3, "all of it was trained"
            torch.testing.assert_close(got.detach().double(), should.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SPECS)
def test_the_comparison_notices_a_different_batch(kind: str) -> None:
    ppo = PlainPpo(learner_of_recipe("ippo", SPECS[kind]))
    for batch in reversed(batches(kind)):
        ppo.update(batch)
    differences = [(a - b).abs().max().item() for a, b in zip(ppo.actor, plain(kind).actor, strict=True)]
    assert max(differences) > 1e-4
