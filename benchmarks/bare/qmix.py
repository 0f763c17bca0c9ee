"""QMIX (Rashid et al. 2018) as one bare loop: values of the agents' own actions, their monotone mixture, replay, hard targets.

    python -m benchmarks.bare.qmix --agents 4

A stopwatch, not a reference: an environment that ends early is not reset before the others, and exploration does not fade.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bare import stopwatch
from benchmarks.bare.replay import Replay
from benchmarks.bare.simulator import Simulator
from benchmarks.bare.stopwatch import option

EPISODE = 100
CAPACITY = 100_000
UNIFORM_SHARE = 1.0
GAMMA = 0.9
INTERVAL = 200
EMBEDDING, MIXER_HIDDEN = 32, 64
LEARNING_RATE, EPSILON, MAX_GRAD_NORM = 5e-4, 1e-8, 10.0


@dataclass(frozen=True)
class Work:
    """Sizes of the work."""

    iterations: ClassVar[int] = 110
    warm_up: ClassVar[int] = 10
    turn: ClassVar[int] = 10
    agents: int = option(3, "env.scenario_options.n_agents={0}")
    envs: int = option(32, "env.num_envs={0}")
    steps: int = option(10, "data.steps={0}")
    hidden: int = option(64, "actor.hidden=[{0},{0}]")
    updates: int = option(10, "data.updates={0}")
    batch: int = option(256, "data.batch_size={0}")


class Batch(NamedTuple):
    """Stored joint steps, agents on the second axis; ``action`` are numbers, ``reward`` is the team's."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    following: Tensor
    terminated: Tensor


class Agent(nn.Module):
    """``Q_i`` of every own action, ``[R, N, A]``: one perceptron, which is told whose observation it sees by a learnt bias."""

    def __init__(self, agents: int, features: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, actions)
        self.identity = nn.Parameter(torch.randn(agents, hidden) * (features + agents) ** -0.5)

    def forward(self, observation: Tensor) -> Tensor:
        """``[R, N, O] -> [R, N, A]``."""
        entered = (self.first(observation) + self.identity).tanh()
        found: Tensor = self.last(self.second(entered).tanh())
        return found


class Mixer(nn.Module):
    """``Q = |w'(s)| . ELU(|w(s)| q + b(s)) + b'(s)``."""

    def __init__(self, agents: int, state: int) -> None:
        super().__init__()

        def two_layers(hidden: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(state, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

        self.weight = two_layers(MIXER_HIDDEN, agents * EMBEDDING)
        self.bias = nn.Linear(state, EMBEDDING)
        self.final_weight = two_layers(MIXER_HIDDEN, EMBEDDING)
        self.final_bias = two_layers(EMBEDDING, 1)

    def forward(self, own: Tensor, state: Tensor) -> Tensor:
        """The team's value ``[R]`` of the agents' ``[R, N]`` in a state ``[R, S]``."""
        weight = self.weight(state).abs().view(*own.shape, EMBEDDING)
        hidden = F.elu(torch.bmm(own.unsqueeze(1), weight).squeeze(1) + self.bias(state))
        value: Tensor = (hidden * self.final_weight(state).abs()).sum(-1) + self.final_bias(state).squeeze(-1)
        return value


class Networks(nn.Module):
    """The agents and their mixture."""

    def __init__(self, agents: int, features: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.agent = Agent(agents, features, hidden, actions)
        self.mixer = Mixer(agents, agents * features)

    def team_value(self, observation: Tensor, action: Tensor) -> Tensor:
        """``Q`` ``[R]`` of a joint action ``[R, N]``."""
        own = self.agent(observation).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        value: Tensor = self.mixer(own, observation.flatten(1))
        return value


class Qmix:
    """The loop.

    Args:
        work: how much.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.simulator = Simulator("navigation", work.envs, device, continuous=False, n_agents=work.agents, collisions=False)
        self.agents, features, self.actions = self.simulator.agents, self.simulator.features, self.simulator.actions
        self.networks = Networks(self.agents, features, work.hidden, self.actions).to(device)
        self.copies = copy.deepcopy(self.networks).requires_grad_(False)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            self.networks.parameters(), LEARNING_RATE, eps=EPSILON, fused=True
        )
        shapes = {"observation": (self.agents, features), "following": (self.agents, features), "action": (self.agents,)}
        self.replay = Replay(CAPACITY // work.envs, work.envs, shapes | {"reward": (), "terminated": ()}, device)
        self.observation = self.simulator.reset()
        self.taken = 0

    @torch.no_grad()
    def collect(self) -> None:
        """Play some steps; all environments are reset at their time limit."""
        for _ in range(self.work.steps):
            if self.replay.played % EPISODE == 0:
                self.observation = self.simulator.reset()
            greedy = self.networks.agent(self.observation).argmax(-1)
            at_random = torch.rand(greedy.shape, device=self.device) < UNIFORM_SHARE
            action = torch.where(at_random, torch.randint_like(greedy, self.actions), greedy)
            following, reward, done = self.simulator.step(action.unsqueeze(-1))
            self.replay.add(
                observation=self.observation, action=action, reward=reward.mean(1), following=following, terminated=done.float()
            )
            self.observation = following

    def update(self) -> None:
        """Some batches, each for one step."""
        for _ in range(self.work.updates):
            drawn = self.replay.draw(self.work.batch)
            self.learn(Batch(*(self.replay.take(name, *drawn) for name in Batch._fields)))

    def learn(self, batch: Batch) -> None:
        """One step on the squared errors, and a copy now and then."""
        with torch.no_grad():
            chosen = self.networks.agent(batch.following).argmax(-1)
            value = self.copies.team_value(batch.following, chosen)
            target = batch.reward + GAMMA * (1 - batch.terminated) * value
        loss = (self.networks.team_value(batch.observation, batch.action.long()) - target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        for network in (self.networks.agent, self.networks.mixer):
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM, foreach=True)
        self.optimizer.step()
        self.taken += 1
        if self.taken % INTERVAL == 0:
            self.copies.load_state_dict(self.networks.state_dict())


if __name__ == "__main__":
    stopwatch.run("qmix", Work, Qmix)
