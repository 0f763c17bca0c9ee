"""MADDPG (Lowe et al. 2017) as one bare loop: a deterministic actor and a critic of all actions per agent, replay, soft targets.

    python -m benchmarks.bare.maddpg --agents 4

A stopwatch, not a reference: an environment that ends early is not reset before the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bare import stopwatch
from benchmarks.bare.perceptron import initial, perceptron
from benchmarks.bare.replay import Replay
from benchmarks.bare.simulator import Simulator
from benchmarks.bare.stopwatch import option

EPISODE = 100
CAPACITY = 100_000
EXPLORATION = 0.5
GAMMA = 0.9
TAU = 0.01
LEARNING_RATE, CRITIC_LEARNING_RATE, EPSILON, MAX_GRAD_NORM = 3e-4, 1e-3, 1e-8, 0.5


@dataclass(frozen=True)
class Work:
    """Sizes of the work."""

    iterations: ClassVar[int] = 110
    warm_up: ClassVar[int] = 10
    turn: ClassVar[int] = 10
    agents: int = option(3, "env.scenario_options.n_agents={0}")
    envs: int = option(32, "env.num_envs={0}")
    steps: int = option(10, "data.steps={0}")
    hidden: int = option(64, "actor.hidden=[{0},{0}] critic.hidden=[{0},{0}]")
    updates: int = option(10, "data.updates={0}")
    batch: int = option(256, "data.batch_size={0}")


class Batch(NamedTuple):
    """Stored joint steps, agents on the second axis."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    following: Tensor
    terminated: Tensor


def mu(actor: Tensor, widths: Sequence[int], observation: Tensor) -> Tensor:
    """Actions ``[R, N, D]`` of observations ``[R, N, O]``."""
    return perceptron(actor, widths, observation.transpose(0, 1)).tanh().transpose(0, 1)


def action_values(critic: Tensor, widths: Sequence[int], observation: Tensor, joint: Tensor) -> Tensor:
    """``Q_i`` ``[N, R]`` of the state and of a joint action ``[R, N, D]`` that is the same for all, or ``[N, R, N, D]``."""
    state, actions = observation.flatten(1), joint.clamp(-1.0, 1.0).flatten(-2)  # as the environment executes them
    if actions.dim() == 2:
        x = torch.cat([state, actions], -1).expand(len(critic), -1, -1)
    else:
        x = torch.cat([state.expand(len(critic), -1, -1), actions], -1)
    return perceptron(critic, widths, x).squeeze(-1)


def with_own(joint: Tensor, own: Tensor) -> Tensor:
    """``[N, R, N, D]``: for every agent the joint action ``[R, N, D]`` with its own action in place of the played one."""
    mine = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)[:, None, :, None]
    return torch.where(mine, own, joint)


def value_target(
    batch: Batch, actor: Tensor, critic: Tensor, actor_widths: Sequence[int], critic_widths: Sequence[int]
) -> Tensor:
    """``r_i + gamma (1 - terminated) Q_i(s', mu(s'))``, ``[N, R]``."""
    value = action_values(critic, critic_widths, batch.following, mu(actor, actor_widths, batch.following))
    return batch.reward.T + GAMMA * (1 - batch.terminated) * value


def critic_loss(batch: Batch, critic: Tensor, widths: Sequence[int], target: Tensor) -> Tensor:
    """Mean square of the errors."""
    return (action_values(critic, widths, batch.observation, batch.action) - target).square().mean()


def actor_loss(batch: Batch, actor: Tensor, critic: Tensor, actor_widths: Sequence[int], critic_widths: Sequence[int]) -> Tensor:
    """``-mean Q_i`` of the others' played actions and the agent's current one."""
    joint = with_own(batch.action, mu(actor, actor_widths, batch.observation))
    return -action_values(critic.detach(), critic_widths, batch.observation, joint).mean()


def adam(parameters: Iterable[Tensor], rate: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """The optimiser."""
    return torch.optim.Adam(parameters, rate, eps=EPSILON, fused=True)


def step(optimizer: torch.optim.Optimizer, loss: Tensor, online: Tensor, copy: Tensor) -> None:
    """One step of the only parameter ``online``, and of its copy after it."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([online], MAX_GRAD_NORM)
    optimizer.step()
    copy.lerp_(online.detach(), TAU)


class Maddpg:
    """The loop.

    Args:
        work: how much.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.simulator = Simulator("navigation", work.envs, device, n_agents=work.agents, collisions=False)
        agents, features, actions = self.simulator.agents, self.simulator.features, self.simulator.actions
        self.agents = agents
        self.actor_widths = (features, work.hidden, work.hidden, actions)
        self.critic_widths = (agents * (features + actions), work.hidden, work.hidden, 1)
        self.actor, self.critic = (
            initial(agents, widths).to(device).requires_grad_() for widths in (self.actor_widths, self.critic_widths)
        )
        self.actor_copy, self.critic_copy = (online.detach().clone() for online in (self.actor, self.critic))
        self.actor_step, self.critic_step = adam([self.actor]), adam([self.critic], CRITIC_LEARNING_RATE)
        each = {"observation": features, "action": actions, "following": features}
        shapes: dict[str, tuple[int, ...]] = {name: (agents, size) for name, size in each.items()}
        shapes |= {"reward": (agents,), "terminated": ()}
        self.replay = Replay(CAPACITY // work.envs, work.envs, shapes, device)
        self.observation = self.simulator.reset()

    @torch.no_grad()
    def collect(self) -> None:
        """Play some steps; all environments are reset at their time limit."""
        for _ in range(self.work.steps):
            if self.replay.played % EPISODE == 0:
                self.observation = self.simulator.reset()
            mean = mu(self.actor, self.actor_widths, self.observation)
            action = mean + EXPLORATION * torch.randn_like(mean)
            following, reward, done = self.simulator.step(action)
            self.replay.add(
                observation=self.observation, action=action, reward=reward, following=following, terminated=done.float()
            )
            self.observation = following

    def update(self) -> None:
        """Some batches, each for one step of the critics and one of the actors."""
        for _ in range(self.work.updates):
            drawn = self.replay.draw(self.work.batch)
            self.learn(Batch(*(self.replay.take(name, *drawn) for name in Batch._fields)))

    def learn(self, batch: Batch) -> None:
        """Critics, then actors."""
        with torch.no_grad():
            target = value_target(batch, self.actor_copy, self.critic_copy, self.actor_widths, self.critic_widths)
        step(self.critic_step, critic_loss(batch, self.critic, self.critic_widths, target), self.critic, self.critic_copy)
        loss = actor_loss(batch, self.actor, self.critic, self.actor_widths, self.critic_widths)
        step(self.actor_step, loss, self.actor, self.actor_copy)


if __name__ == "__main__":
    stopwatch.run("maddpg", Work, Maddpg)
