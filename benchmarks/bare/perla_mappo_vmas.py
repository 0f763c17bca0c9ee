"""PERLA on MAPPO (Jafferjee et al. 2022) as one bare loop: a shared policy, values averaged over samples of the others' actions.

    python -m benchmarks.bare.perla_mappo_vmas --samples 20

A stopwatch, not a reference: an environment that ends early is not reset before the others. Memory grows with the samples of a
minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
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
    samples: int = option(10, "critic.samples={0}")
    epochs: int = option(5, "update.epochs={0}")
    minibatch: int = option(2400, "update.minibatch_size={0}")


class Policy(nn.Module):
    """One policy for all agents, which differ by a bias of the first layer."""

    def __init__(self, agents: int, features: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.identity = nn.Parameter(0.1 * torch.randn(agents, hidden))
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, actions))
        self.log_std = nn.Parameter(torch.zeros(actions))

    def forward(self, observation: Tensor) -> Tensor:
        """``[*, N, O] -> [*, N, D]``, the means."""
        mean: Tensor = self.rest(self.first(observation) + self.identity)
        return mean


class Critic(nn.Module):
    """``mean_k V_i(s, a_-i^(k))``; the state enters once per row, and the last layer, which is linear, reads the mean."""

    def __init__(self, agents: int, features: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.state = nn.Linear(agents * features, hidden)
        self.identity = nn.Parameter(0.1 * torch.randn(agents, hidden))
        self.action = nn.Parameter(0.1 * torch.randn(agents, actions, hidden))
        self.middle = nn.Sequential(nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.last = nn.Linear(hidden, 1)

    def forward(self, state: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        """State ``[R, S]``, the policies ``[R, N, D]`` and noise ``[R, K, N, D]`` give values ``[R, N]``."""
        entered = self.state(state).unsqueeze(1) + self.identity
        sampled = torch.addcmul(loc.unsqueeze(1), scale.unsqueeze(1), noise).clamp(-1, 1)
        each = torch.einsum("rknd,ndh->rknh", sampled, self.action)
        entering = (each.sum(2, keepdim=True) - each).add_(entered.unsqueeze(1))
        value: Tensor = self.last(self.middle(entering).mean(1))
        return value.squeeze(-1)


class PerlaMappo:
    """The loop.

    Args:
        work: its sizes.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.simulator = Simulator("balance", work.envs, device, n_agents=work.agents)
        agents, features, actions = self.simulator.agents, self.simulator.features, self.simulator.actions
        self.agents = agents
        self.policy = Policy(agents, features, work.hidden, actions).to(device)
        self.critic = Critic(agents, features, work.hidden, actions).to(device)
        self.parameters = [list(self.policy.parameters()), list(self.critic.parameters())]
        self.step = adam(chain(*self.parameters))
        self.units = Units(device)
        self.observation = torch.empty(work.steps + 1, work.envs, agents, features, device=device)
        self.action = torch.empty(work.steps, work.envs, agents, actions, device=device)
        self.loc = torch.empty(work.steps + 1, work.envs, agents, actions, device=device)
        self.log_prob = torch.empty(work.steps, work.envs, agents, device=device)
        self.reward = torch.empty(work.steps, work.envs, 1, device=device)
        self.done = torch.empty(work.steps, work.envs, 1, dtype=torch.bool, device=device)

    @torch.no_grad()
    def collect(self) -> None:
        """One rollout from a reset on."""
        scale = self.policy.log_std.clamp(-5.0, 2.0).exp()
        self.observation[0] = self.simulator.reset()
        for t in range(self.work.steps):
            loc = self.policy(self.observation[t])
            action = loc + scale * torch.randn_like(loc)
            self.loc[t], self.action[t] = loc, action
            self.log_prob[t] = log_density(action, loc, self.policy.log_std)
            following, reward, done = self.simulator.step(action)
            self.observation[t + 1], self.reward[t], self.done[t] = following, reward.mean(1, keepdim=True), done.unsqueeze(1)

    def update(self) -> None:
        """Values, advantages, then the epochs."""
        rows = self.work.envs * self.work.steps
        with torch.no_grad():
            self.loc[-1] = self.policy(self.observation[-1])
            scale = self.policy.log_std.clamp(-5.0, 2.0).exp().expand_as(self.loc[0, :1])
            old_value, target, advantage = self._annotated(scale)
        batch = [self.observation[:-1], self.action, self.loc[:-1], self.log_prob, old_value, target, advantage]
        batch = [tensor.flatten(0, 1) for tensor in batch]
        for _ in range(self.work.epochs):
            for i in torch.randperm(rows, device=self.device).split(self.work.minibatch):
                self._step([tensor[i] for tensor in batch], scale)

    def _annotated(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, loc = self.observation.flatten(0, 1).flatten(1), self.loc.flatten(0, 1)
        blocks = zip(state.split(self.work.minibatch), loc.split(self.work.minibatch), strict=True)
        predicted = torch.cat([self.critic(s, m, scale, self._noise(m)) for s, m in blocks])
        predicted = predicted.unflatten(0, self.observation.shape[:2])
        value = self.units.out_of(predicted)
        advantage = advantages(self.reward, self.done, value)
        return predicted[:-1], advantage + value[:-1], standardised(advantage)

    def _noise(self, loc: Tensor) -> Tensor:
        return torch.randn(len(loc), self.work.samples, *loc.shape[1:], device=self.device)

    def _step(self, rows: Sequence[Tensor], scale: Tensor) -> None:
        observation, action, loc, log_prob, old, target, advantage = rows
        self.units.update(target)
        loss = clipped_loss(log_density(action, self.policy(observation), self.policy.log_std), log_prob, advantage)
        value = self.critic(observation.flatten(1), loc, scale, self._noise(loc))
        loss = loss + value_loss(value, old, self.units.into(target))
        self.step.zero_grad()
        loss.backward()
        for parameters in self.parameters:
            nn.utils.clip_grad_norm_(parameters, on_policy.MAX_GRAD_NORM, foreach=True)
        self.step.step()


if __name__ == "__main__":
    stopwatch.run("perla_mappo_vmas", Work, PerlaMappo)
