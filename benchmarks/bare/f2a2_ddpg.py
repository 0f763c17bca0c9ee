"""F2A2-DDPG (Li et al. 2023) as one bare loop: joint actor-critic gradients, consensus of copies, a model of the others.

    python -m benchmarks.bare.f2a2_ddpg --agents 4

A stopwatch, not a reference: an environment that ends early is not reset before the others, and characters are made of the first
trajectories as if none did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bare import stopwatch
from benchmarks.bare.consensus import Agreement
from benchmarks.bare.maddpg import (
    CAPACITY,
    CRITIC_LEARNING_RATE,
    EPISODE,
    EXPLORATION,
    GAMMA,
    TAU,
    action_values,
    adam,
    mu,
    with_own,
)
from benchmarks.bare.mind import MEMORY, Minds, Normal, minds_loss
from benchmarks.bare.perceptron import initial
from benchmarks.bare.replay import Replay
from benchmarks.bare.simulator import Simulator
from benchmarks.bare.stopwatch import option

ACTOR_WEIGHT, CRITIC_WEIGHT, COEFFICIENT_FLOOR, MAX_GRAD_NORM = 1.0, 1000.0, 1.0, 10.0
RATIO_LIMIT = 0.1
HISTORY, EVERY = 5, 10
CHARACTERS, CHARACTER_LENGTH, CHARACTER_BATCH = 64, 25, 16
LATEST_PAIRS, FIT_ROWS, MINDS_GRAD_NORM = 1200, 512, 10.0


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
    """Stored joint steps, agents on the second axis, and the steps before each (``seen``) and before the next one."""

    observation: Tensor
    action: Tensor
    mean: Tensor
    log_prob: Tensor
    reward: Tensor
    following: Tensor
    terminated: Tensor
    seen: Tensor
    length: Tensor
    seen_after: Tensor
    length_after: Tensor


def log_inverse_ratio(action: Tensor, mean: Tensor) -> Tensor:
    """Logarithm of the ratio at ``action`` of the policy that played, around ``mean``, to the one around it, ``[N, R]``."""
    return (-0.5 * ((action - mean) / EXPLORATION).square()).sum(-1).T


def log_ratio(action: Tensor, mean: Tensor, log_prob: Tensor) -> Tensor:
    """Logarithm of the ratio of the current policy to the one that played, ``[N, R]``."""
    standard = (action - mean) / EXPLORATION
    now = (-0.5 * standard.square() - math.log(EXPLORATION) - 0.5 * math.log(2 * math.pi)).sum(-1)
    return (now - log_prob).T


def truncated(log: Tensor) -> Tensor:
    """The ratio with logarithm ``log``, truncated at its limit."""
    return log.clamp(max=math.log(RATIO_LIMIT)).exp()


def critic_loss(
    batch: Batch, critic: Tensor, widths: Sequence[int], target: Tensor, joint: Tensor, ratio: Tensor, inverse_ratio: Tensor
) -> Tensor:
    """The mean square of the errors, and the critic's term of the actor's objective; of ratios the logarithms."""
    value = action_values(critic, widths, batch.observation, batch.action)
    fresh = action_values(critic, widths, batch.observation, joint)
    error = value - target
    pull = (2 * CRITIC_WEIGHT * error.detach() * truncated(inverse_ratio) - ACTOR_WEIGHT) * fresh
    return (CRITIC_WEIGHT * error.square() + pull - ACTOR_WEIGHT * truncated(ratio) * value).mean()


def actor_loss(
    batch: Batch, own: Tensor, critic: Tensor, widths: Sequence[int], target: Tensor, joint: Tensor, inverse_ratio: Tensor
) -> Tensor:
    """``-mean(coefficient Q_i)`` of resampled actions, ``own`` ``[R, N, D]`` with gradient."""
    critic = critic.detach()
    with torch.no_grad():
        error = action_values(critic, widths, batch.observation, batch.action) - target
        coefficient = (ACTOR_WEIGHT - 2 * CRITIC_WEIGHT * error * truncated(inverse_ratio)).clamp(min=COEFFICIENT_FLOOR)
    return -(coefficient * action_values(critic, widths, batch.observation, with_own(joint, own))).mean()


class F2a2Ddpg:
    """The loop.

    Args:
        work: its sizes.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.simulator = Simulator("navigation", work.envs, device, n_agents=work.agents, collisions=False)
        agents, features, actions = self.simulator.agents, self.simulator.features, self.simulator.actions
        self.agents = agents
        self.actor_widths = (features, work.hidden, work.hidden, actions)
        self.critic_widths = (agents * (features + actions), work.hidden, work.hidden, 1)
        self.actor = initial(agents, self.actor_widths).to(device).requires_grad_()
        self.critic = initial(1, self.critic_widths).repeat(agents, 1).to(device).requires_grad_()
        self.actor_copy, self.critic_copy = (online.detach().clone() for online in (self.actor, self.critic))
        self.agreement = Agreement(self.critic)
        self.minds = Minds(agents, features, actions).to(device)
        self.actor_step, self.critic_step = adam([self.actor]), adam([self.critic], CRITIC_LEARNING_RATE)
        self.minds_step = adam(self.minds.parameters())
        self.replay = Replay(CAPACITY // work.envs, work.envs, _shapes(agents, features, actions), device)
        self.observation = self.simulator.reset()
        self.learnt = 0
        self.first = torch.zeros(CHARACTERS, CHARACTER_LENGTH, agents, features + actions, device=device)
        self.first_length = torch.zeros(CHARACTERS, dtype=torch.int64, device=device)
        self.character = torch.zeros(agents, agents, MEMORY, device=device)

    # --- playing --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> None:
        """Play some steps; all environments are reset at their time limit."""
        for _ in range(self.work.steps):
            age = self.replay.played % EPISODE
            if age == 0:
                self.observation = self.simulator.reset()
            mean = mu(self.actor, self.actor_widths, self.observation)
            noise = torch.randn_like(mean)
            action = mean + EXPLORATION * noise
            log_prob = (-0.5 * noise.square() - math.log(EXPLORATION) - 0.5 * math.log(2 * math.pi)).sum(-1)
            following, reward, done = self.simulator.step(action)
            seen = torch.cat([self.observation, action], -1)
            self._record_first(seen)
            self.replay.add(
                seen=seen, mean=mean, log_prob=log_prob, reward=reward, following=following, terminated=done.float(),
                age=torch.full((self.work.envs,), float(age), device=self.device),
            )  # fmt: skip
            self.observation = following
        if self.replay.played <= self._first_steps() + self.work.steps:
            self.character = self.minds.characters(*self._begun())

    def _first_steps(self) -> int:
        return CHARACTER_LENGTH * -(-CHARACTERS // self.work.envs)

    def _record_first(self, seen: Tensor) -> None:
        start, position = divmod(self.replay.played, CHARACTER_LENGTH)
        start *= self.work.envs
        count = min(CHARACTERS - start, self.work.envs)
        if count > 0:
            self.first[start : start + count, position] = seen[:count]
            self.first_length[start : start + count] = position + 1

    def _begun(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """All trajectories, or ``count`` of them at random."""
        begun = min(CHARACTERS, -(-self.replay.played // CHARACTER_LENGTH) * self.work.envs)
        index = torch.randperm(begun, device=self.device)[:count]
        return self.first[index], self.first_length[index]

    # --- learning -------------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Some batches, each for one step of the critics and one of the actors, and at intervals for one of the minds."""
        for _ in range(self.work.updates):
            batch = self._drawn()
            self.learn(batch)
            if self.learnt % EVERY == 0:
                self.fit_minds(batch)
            self.learnt += 1

    def _drawn(self) -> Batch:
        replay, features = self.replay, self.simulator.features
        step, env = replay.draw(self.work.batch)
        there = step - max(0, replay.played - replay.steps)
        age = replay.take("age", step, env).long()
        length, length_after = (torch.minimum(age + i, there + i).clamp(max=HISTORY) for i in (0, 1))
        ahead = torch.arange(HISTORY, device=self.device)
        # Left-aligned: steps after the first `length` are not read.
        seen = replay.take("seen", (step - length).unsqueeze(1) + ahead, env.unsqueeze(1))
        seen_after = replay.take("seen", (step + 1 - length_after).unsqueeze(1) + ahead, env.unsqueeze(1))
        observation, action = replay.take("seen", step, env).split([features, self.simulator.actions], -1)
        mean, log_prob, reward, following, terminated = (replay.take(name, step, env) for name in Batch._fields[2:7])
        return Batch(observation, action, mean, log_prob, reward, following, terminated, seen, length, seen_after, length_after)

    def learn(self, batch: Batch) -> None:
        """Critics, then actors."""
        own = mu(self.actor, self.actor_widths, batch.observation)
        with torch.no_grad():
            present, later = self.beliefs(batch)
            next_own = mu(self.actor_copy, self.actor_widths, batch.following)
            next_joint = with_own(later.loc, next_own)
            next_value = action_values(self.critic_copy, self.critic_widths, batch.following, next_joint)
            target = batch.reward.T + GAMMA * (1 - batch.terminated) * next_value
            joint = with_own(present.loc, own)
            ratio = log_ratio(batch.action, own, batch.log_prob)
            inverse_ratio = log_inverse_ratio(own, batch.mean)
        self._step_critic(critic_loss(batch, self.critic, self.critic_widths, target, joint, ratio, inverse_ratio))
        loss = actor_loss(batch, own, self.critic, self.critic_widths, target, joint, inverse_ratio)
        self._step(self.actor_step, loss, self.actor)
        self.actor_copy.lerp_(self.actor.detach(), TAU)

    def beliefs(self, batch: Batch) -> tuple[Normal, Normal]:
        """Beliefs at the present and at the next step, evaluated together."""
        minds, rows = self.minds, len(batch.action)
        observation = torch.cat([batch.observation, batch.following])
        mental = minds.mental_states(torch.cat([batch.seen, batch.seen_after]), torch.cat([batch.length, batch.length_after]))
        natural = minds.natural_prediction(observation, self.character, mental)
        both = minds.belief(natural, minds.impromptu_prediction(observation))
        present, later = (Normal(*(part[:, some] for part in both)) for some in (slice(rows), slice(rows, None)))
        return present, later

    def _step_critic(self, loss: Tensor) -> None:
        self.critic_step.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([self.critic], MAX_GRAD_NORM)
        self.agreement.add_gradient(self.critic)
        self.critic_step.step()
        self.critic_copy.lerp_(self.critic.detach(), TAU)
        self.agreement.after_step(self.critic)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor, online: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([online], MAX_GRAD_NORM)
        optimizer.step()

    def fit_minds(self, batch: Batch) -> None:
        """One step of the models of the others; recompute the characters."""
        some = slice(FIT_ROWS)
        character = self.minds.characters(*self._begun(CHARACTER_BATCH))
        mental = self.minds.mental_states(batch.seen[some], batch.length[some])
        loss = minds_loss(self.minds, batch.observation[some], batch.action[some], mental, character, self._latest())
        self.minds_step.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.minds.parameters(), MINDS_GRAD_NORM, foreach=True)
        self.minds_step.step()
        with torch.no_grad():
            self.character = self.minds.characters(*self._begun())

    def _latest(self) -> tuple[Tensor, Tensor]:
        count = -(-LATEST_PAIRS // self.agents)
        played = self.replay.played
        steps = torch.arange(max(0, played - -(-count // self.work.envs)), played, device=self.device) % self.replay.steps
        seen = self.replay.kept["seen"][steps].flatten(0, 1)[-count:]
        observation, action = seen.split([self.simulator.features, self.simulator.actions], -1)
        return observation, action


def _shapes(agents: int, features: int, actions: int) -> dict[str, tuple[int, ...]]:
    return {
        "seen": (agents, features + actions),
        "mean": (agents, actions),
        "log_prob": (agents,),
        "reward": (agents,),
        "following": (agents, features),
        "terminated": (),
        "age": (),
    }


if __name__ == "__main__":
    stopwatch.run("f2a2_ddpg", Work, F2a2Ddpg)
