"""What environments around a simulator share: the keys that they write, options, time limits, pooling of rewards, resets."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Environment, Runtime
from marlkit.contract import When
from marlkit.errors import OptionError
from marlkit.options import PositiveInt
from marlkit.spec import TeamSpec

WRITES = (
    *(keys.OBSERVATION, keys.STATE, keys.ALIVE, keys.IS_FIRST),
    When("discrete", (keys.ACTION_MASK,)),
    When("continuous", (keys.ACTION_DIMS,)),
    *(keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE),
)
"""What the contract of every environment writes."""

POOLED = (When("reward=mean", ("team_reward",)), When("reward=sum", ("team_reward",)))
"""Traits that follow from the option ``reward``."""

Pooling = Literal["individual", "mean", "sum"]
"""Whether the agents receive their own rewards, or all of them their mean or sum."""

Seen = TypeVar("Seen")
"""What a simulator shows of its environments."""


class Outcome(NamedTuple, Generic[Seen]):
    """What a simulator returns of one joint step, before any reset.

    Attributes:
        seen: what it shows afterwards.
        reward: ``[B, N, 1]``.
        terminated: the episode truly ended, ``[B, 1]`` bool.
        truncated: the simulator cut the episode, ``[B, 1]`` bool.
        agents: whose own episode truly ended and whose ended in any way, now or before, each ``[B, N, 1]`` bool, where agents may
            end before the episode does (``keys.AGENT_ENDS``).
    """

    seen: Seen
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    agents: tuple[Tensor, Tensor] | None = None


class AdapterEnvironment(Environment, Generic[Seen]):
    """Base of environments around a simulator; a subclass says how it is reset, stepped and read.

    A subclass calls :meth:`prepare` with the team spec at the end of its constructor.

    Args:
        runtime: device and seed.
        num_envs: number of environments B simulated together; 32 to a few thousand.
        max_steps: steps after which an episode is truncated; null leaves that to the environment.
        reward: each agent's own, or the mean or sum over the team for every agent.
    """

    name = "the environment"
    """What it is called in messages about actions."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        num_envs: PositiveInt,
        max_steps: PositiveInt | None,
        reward: Pooling,
    ) -> None:
        self.num_envs = num_envs
        self.device = runtime.device
        self.max_steps = max_steps
        self.pools_reward = reward != "individual"
        self._pool = {"individual": None, "mean": torch.mean, "sum": torch.sum}[reward]
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        yes = torch.ones((), dtype=torch.bool, device=self.device)
        self._all, self._none = yes.expand(num_envs, 1), (~yes).expand(num_envs, 1)

    def prepare(self, spec: TeamSpec) -> None:
        """Take the team spec, and make of it what stays the same at every step."""
        self.spec = spec
        self._everyone = self._all.unsqueeze(1).expand(-1, spec.n_agents, 1)
        sizes = torch.tensor(spec.own_action_sizes, device=self.device).unsqueeze(-1)
        own = torch.arange(spec.action_features, device=self.device) < sizes
        self._own_actions = own.expand(self.num_envs, *own.shape)

    def refuse_pooled_opponents(self, groups: tuple[str, ...] | None) -> None:
        """Check that agents of different ``groups`` are not paid one reward.

        Raises:
            OptionError: `reward` pools their rewards.
        """
        if self.pools_reward and groups is not None:
            message = f"agents that are opposed to each other ({', '.join(dict.fromkeys(groups))}) are not paid the same"
            raise OptionError("reward", f"{message}: set it to individual, with components that need no team_reward")

    # --- what a subclass says ------------------------------------------------------------------------------------------------

    @abstractmethod
    def restart(self) -> Seen:
        """Start an episode in every environment."""

    @abstractmethod
    def simulate(self, action: Tensor) -> Outcome[Seen]:
        """Take one joint step with actions ``[B, N]`` or ``[B, N, D]`` of the right shape and type."""

    @abstractmethod
    def proceed(self, seen: Seen, done: Tensor, finished: Tensor) -> Seen:
        """Start an episode in the environments whose episode ended, and leave the others as they are.

        Args:
            seen: what the last step showed; not to be written to.
            done: whose episode ended, ``[B, 1]`` bool.
            finished: their indices, ``[F]`` int64, possibly none.

        Returns:
            What is seen where the next step starts.
        """

    @abstractmethod
    def observation(self, seen: Seen) -> Tensor:
        """``[B, N, O]``."""

    def state(self, seen: Seen) -> Tensor | None:
        """The global state ``[B, S]``; ``None``: the joint observation."""
        return None

    def alive(self, seen: Seen) -> Tensor:
        """The agents that take part, ``[B, N, 1]`` bool; here all."""
        return self._everyone

    def available(self, seen: Seen) -> Tensor:
        """Actions or action dimensions that the agents have, ``[B, N, A]`` or ``[B, N, D]`` bool; here all of their own."""
        return self._own_actions

    # --- the episode ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self) -> TensorDict:
        """Start every environment anew: batch ``[B]`` with all current keys of the contract."""
        self._steps.zero_()
        return self._shown(self.restart(), self._all)

    @torch.no_grad()
    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """One joint step with actions ``[B, N]`` or ``[B, N, D]``; see :meth:`Environment.step`.

        Raises:
            MarlkitError: the actions have a wrong shape or type.
        """
        self.refuse_unfit_action(action, self.name)
        seen, reward, terminated, truncated, agents = self.simulate(action)
        self._steps += 1
        if self.max_steps is not None:
            truncated = truncated | (self._steps >= self.max_steps).unsqueeze(-1)
        truncated = truncated & ~terminated
        done = terminated | truncated
        arrived = self._shown(seen, self._none)
        arrived.set(("agents", "reward"), self._pooled(reward))
        arrived.set("terminated", terminated).set("truncated", truncated).set("done", done)
        if agents is not None:
            for key, own, whole in zip(keys.AGENT_ENDS, agents, (terminated, done), strict=True):
                arrived.set(key[1:], own | whole.unsqueeze(-1))
        finished = done.squeeze(-1).nonzero().squeeze(-1)
        self._steps.index_fill_(0, finished, 0)
        return arrived, self._shown(self.proceed(seen, done, finished), done)

    def _pooled(self, reward: Tensor) -> Tensor:
        return reward if self._pool is None else self._pool(reward, dim=1, keepdim=True).expand_as(reward)

    def _shown(self, seen: Seen, is_first: Tensor) -> TensorDict:
        observation, state = self.observation(seen), self.state(seen)
        agents = {
            "observation": observation,
            "alive": self.alive(seen),
            "action_mask" if self.spec.discrete else "action_dims": self.available(seen),
        }
        step = {
            "agents": agents,
            keys.STATE: observation.flatten(1) if state is None else state,
            keys.IS_FIRST: is_first,
        }
        return TensorDict(step, batch_size=[self.num_envs], device=self.device)
