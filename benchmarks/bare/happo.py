"""HAPPO (Kuba et al. 2022) as one bare loop: a policy per agent, updated in random order, and one team value.

    python -m benchmarks.bare.happo --agents 4

A stopwatch, not a reference: an environment that ends early is not reset before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.bare import on_policy, stopwatch
from benchmarks.bare.on_policy import Units, adam, advantages, clipped_loss, log_density, standardised, value_loss
from benchmarks.bare.simulator import Simulator
from benchmarks.bare.stopwatch import option


@dataclass(frozen=True)
class Work:
    """Sizes of the work."""

    iterations: ClassVar[int] = 6
    warm_up: ClassVar[int] = 1
    turn: ClassVar[int] = 1
    agents: int = option(3, "env.scenario_options.n_agents={0}")
    envs: int = option(96, "env.num_envs={0}")
    steps: int = option(100, "data.steps={0} env.max_steps={0}")
    hidden: int = option(128, "actor.hidden=[{0},{0}] critic.hidden=[{0},{0}]")
    epochs: int = option(5, "update.step.epochs={0}")
    minibatch: int = option(2400, "update.step.minibatch_size={0}")


class Policy(nn.Module):
    """One agent's policy: the mean of its action, and a deviation that does not depend on the observation."""

    def __init__(self, features: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.mean = _perceptron(features, hidden, actions)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Log-probabilities ``[R]``."""
        return log_density(action, self.mean(observation), self.log_std)


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class TeamMean:
    """The means of all policies in one product per layer, from a copy of their parameters."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        layers = zip(*([layer for layer in policy.mean if isinstance(layer, nn.Linear)] for policy in policies), strict=True)
        self.layers = [
            (torch.stack([layer.weight.T for layer in each]), torch.stack([layer.bias for layer in each]).unsqueeze(1))
            for each in layers
        ]

    def __call__(self, observation: Tensor) -> Tensor:
        """``[B, N, O] -> [B, N, D]``."""
        x = observation.transpose(0, 1)
        for number, (weight, bias) in enumerate(self.layers):
            x = torch.baddbmm(bias, x.tanh_() if number else x, weight)
        return x.transpose(0, 1)


class Happo:
    """The loop.

    Args:
        work: its sizes.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work = work
        self.simulator = Simulator("balance", work.envs, device, n_agents=work.agents)
        agents, features, actions = self.simulator.agents, self.simulator.features, self.simulator.actions
        self.agents = agents
        self.policies = [Policy(features, work.hidden, actions).to(device) for _ in range(agents)]
        self.critic = _perceptron(agents * features, work.hidden, 1).to(device)
        self.units = Units(device)
        self.policy_steps = [adam(policy.parameters()) for policy in self.policies]
        self.critic_step = adam(self.critic.parameters())
        self.device = device
        self.observation = torch.empty(work.steps + 1, work.envs, agents, features, device=device)
        self.action = torch.empty(work.steps, work.envs, agents, actions, device=device)
        self.log_prob = torch.empty(work.steps, work.envs, agents, device=device)
        self.reward = torch.empty(work.steps, work.envs, 1, device=device)
        self.done = torch.empty(work.steps, work.envs, 1, dtype=torch.bool, device=device)

    @torch.no_grad()
    def collect(self) -> None:
        """One rollout from a reset on."""
        mean = TeamMean(self.policies)
        log_std = torch.stack([policy.log_std for policy in self.policies])
        self.observation[0] = self.simulator.reset()
        for t in range(self.work.steps):
            loc = mean(self.observation[t])
            action = loc + log_std.clamp(-5.0, 2.0).exp() * torch.randn_like(loc)
            self.action[t] = action
            self.log_prob[t] = log_density(action, loc, log_std)
            following, reward, done = self.simulator.step(action)
            self.observation[t + 1], self.reward[t], self.done[t] = following, reward.mean(1, keepdim=True), done.unsqueeze(1)

    def update(self) -> None:
        """Advantages, then agent after agent, then the critic."""
        state = self.observation[:-1].flatten(0, 1).flatten(1)
        with torch.no_grad():
            predicted = self.critic(self.observation.flatten(2))
            value = self.units.out_of(predicted)
            advantage = advantages(self.reward, self.done, value)
            target, old_value = (advantage + value[:-1]).flatten(), predicted[:-1].flatten()
            advantage = standardised(advantage).flatten()
        for agent in torch.randperm(self.agents).tolist():
            advantage = self._fit_policy(agent, advantage)
        self._fit_critic(state, old_value, target)

    def _fit_policy(self, agent: int, advantage: Tensor) -> Tensor:
        """Fit one agent's policy; return the advantage for the next agent."""
        policy, step = self.policies[agent], self.policy_steps[agent]
        observation = self.observation[:-1, :, agent].flatten(0, 1)
        action, old = self.action[:, :, agent].flatten(0, 1), self.log_prob[:, :, agent].flatten()

        def loss(i: Tensor) -> Tensor:
            return clipped_loss(policy.log_prob(observation[i], action[i]), old[i], advantage[i])

        self._fit(policy, step, loss)
        with torch.no_grad():
            return advantage * (policy.log_prob(observation, action) - old).exp()

    def _fit_critic(self, state: Tensor, old_value: Tensor, target: Tensor) -> None:
        def loss(i: Tensor) -> Tensor:
            goal = target[i]
            self.units.update(goal)
            return value_loss(self.critic(state[i]).squeeze(-1), old_value[i], self.units.into(goal))

        self._fit(self.critic, self.critic_step, loss)

    def _fit(self, module: nn.Module, step: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor]) -> None:
        parameters = list(module.parameters())
        for _ in range(self.work.epochs):
            for i in torch.randperm(self.work.envs * self.work.steps, device=self.device).split(self.work.minibatch):
                step.zero_grad()
                loss(i).backward()
                nn.utils.clip_grad_norm_(parameters, on_policy.MAX_GRAD_NORM, foreach=True)
                step.step()


if __name__ == "__main__":
    stopwatch.run("happo", Work, Happo)
