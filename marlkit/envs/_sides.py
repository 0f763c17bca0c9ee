"""One group of agents to be trained, and the others as a part of its environment: frozen players choose their actions."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor, Runtime
from marlkit.envs._against import RANDOM, runs_code
from marlkit.errors import MarlkitError, OptionError, did_you_mean
from marlkit.keys import Key
from marlkit.nn.actions import ActionRange
from marlkit.saved import MAPPING, TEXT, refuse_misfit
from marlkit.spec import Discrete, TeamSpec

Script = Callable[[Tensor, TeamSpec], Tensor]
"""A player of one's own: observations ``[B, M, O]`` and the team that it plays to actions ``[B, M]`` or ``[B, M, D]``."""


class Player(Protocol):
    """Chooses the actions of agents that are not trained."""

    def act(self, observation: Tensor, is_first: Tensor) -> Tensor:
        """Actions ``[B, M]`` or ``[B, M, D]`` on ``[B, M, O]``; ``is_first`` ``[B, 1]`` bool where an episode starts."""

    def state_dict(self) -> dict[str, Any]:
        """What decides its next actions besides the global random generators."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""


class Sides:
    """Which agents are trained, and who plays the others.

    Args:
        team: all agents of the environment.
        train: the group that is trained.
        against: who plays the others: `random`, the dotted path of a function, or a run folder.
        runtime: device, and what loads the policy of a run.
        num_envs: number of environments B.

    Attributes:
        spec: the team of the agents that are trained.

    Raises:
        OptionError: the environment has no such group, or there is no such player, or it does not fit the others.
    """

    def __init__(self, team: TeamSpec, train: str, against: str, runtime: Runtime, num_envs: int) -> None:
        if train not in (names := team.groups or ()):
            has = f"It has: {', '.join(dict.fromkeys(names))}" if names else "Its agents share one aim: leave it out"
            raise OptionError("train", f"the environment has no group `{train}`.{did_you_mean(train, names)} {has}")
        self._team = team
        self._trained = [agent for agent, name in enumerate(names) if name == train]
        self._others = [agent for agent, name in enumerate(names) if name != train]
        self.spec = team.part(self._trained)
        others = team.part(self._others)
        self.player = _player(against, others, runtime, num_envs)
        # Of all that an environment shows, what each side has: agents, and of these as much as the longest needs.
        self._own = torch.tensor(self._trained, device=runtime.device)
        self._their = torch.tensor(self._others, device=runtime.device)
        self._lengths = (self.spec.observation, others.observation)

    def observation(self, seen: Tensor) -> Tensor:
        """What the trained agents see, ``[B, n, O]``, of what all do, ``[B, N, O]``."""
        return seen.index_select(1, self._own)[..., : self._lengths[0]]

    def reward(self, reward: Tensor) -> Tensor:
        """The rewards of the trained agents, ``[B, n]``, of those of all, ``[B, N]``."""
        return reward.index_select(1, self._own)

    def joint(self, action: Tensor, seen: Tensor, is_first: Tensor) -> Tensor:
        """The actions of all agents, those of the trained ones ``[B, n]`` or ``[B, n, D]`` among them.

        Args:
            action: of the trained agents.
            seen: what all agents see, ``[B, N, O]``.
            is_first: where an episode starts, ``[B, 1]`` bool.
        """
        theirs = self.player.act(seen.index_select(1, self._their)[..., : self._lengths[1]], is_first)
        shape = (len(seen), self._team.n_agents)
        everyone = action.new_zeros(shape if self._team.discrete else (*shape, self._team.action_features))
        for agents, chosen in ((self._own, action), (self._their, theirs)):
            if self._team.discrete:
                everyone.index_copy_(1, agents, chosen)
            else:
                everyone[:, agents, : chosen.shape[-1]] = chosen.to(everyone.dtype)
        return everyone


def _player(against: str, others: TeamSpec, runtime: Runtime, num_envs: int) -> Player:
    if against == RANDOM:
        return RandomPlayer(others, runtime.device)
    if runs_code(against):
        return ScriptedPlayer(against, others)
    if runtime.load_actor is None:
        raise OptionError("against", f"the run `{against}` can be loaded only where a recipe names it")
    return TrainedPlayer(against, runtime.load_actor(against).to(runtime.device), others, num_envs)


class Memoryless:
    """A player whose actions depend on what is seen now and on the global random generators alone."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is continued."""
        refuse_misfit(state, {}, "player")


class RandomPlayer(Memoryless):
    """Uniform among the actions that each agent has, or between its bounds (-1 and 1 where there are none)."""

    def __init__(self, spec: TeamSpec, device: torch.device) -> None:
        self._sizes = torch.tensor(spec.own_action_sizes, device=device)
        self._span = None if isinstance(spec.action, Discrete) else ActionRange(spec.action, spec.n_agents).to(device)

    def act(self, observation: Tensor, is_first: Tensor) -> Tensor:
        """Actions ``[B, M]`` or ``[B, M, D]``."""
        shape = observation.shape[:2]
        if self._span is None:
            drawn = (torch.rand(shape, device=observation.device) * self._sizes).long()
            return drawn.minimum(self._sizes - 1)
        middle, half = self._span.middle, self._span.half_range
        return middle + half * (2 * torch.rand(*shape, middle.shape[-1], device=observation.device) - 1)


class ScriptedPlayer(Memoryless):
    """A function of the user's, without memory.

    Raises:
        OptionError: it cannot be imported, or is no function.
    """

    def __init__(self, path: str, spec: TeamSpec) -> None:
        module, _, name = path.rpartition(".")
        try:
            script = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, SyntaxError) as error:
            raise OptionError("against", f"`{path}` cannot be imported: {error}") from error
        if not callable(script):
            raise OptionError("against", f"`{path}` must be a function of observations and team, got {script!r}")
        self._path, self._script, self._spec = path, script, spec

    def act(self, observation: Tensor, is_first: Tensor) -> Tensor:
        """Actions ``[B, M]`` or ``[B, M, D]``.

        Raises:
            MarlkitError: the function returned something else.
        """
        spec = self._spec
        action = self._script(observation, spec)
        shape = observation.shape[:2] if spec.discrete else (*observation.shape[:2], spec.action_features)
        if not isinstance(action, Tensor) or action.shape != shape or action.is_floating_point() == spec.discrete:
            got = f"{action.dtype} {list(action.shape)}" if isinstance(action, Tensor) else type(action).__name__
            wanted = "whole numbers [B, M]" if spec.discrete else "floating-point numbers [B, M, D]"
            raise MarlkitError(f"`{self._path}` must return {wanted} = {list(shape)}, got {got}")
        return action


class TrainedPlayer:
    """The policy of a run, which may have been trained for these agents alone or among others.

    A stochastic policy samples, any other plays without exploration.

    Raises:
        OptionError: it was not trained for these agents.
    """

    def __init__(self, folder: str, actor: Actor, others: TeamSpec, num_envs: int) -> None:
        trained = actor.spec
        self._folder = folder
        self._actor = actor.eval().requires_grad_(False)
        places = {name: place for place, name in enumerate(trained.agent_names)}
        missing = [name for name in others.agent_names if name not in places]
        if missing:
            has = ", ".join(trained.agent_names)
            raise OptionError("against", f"the policy of `{folder}` does not play `{missing[0]}`; it was trained for {has}")
        if "centralised_execution" in actor.traits and trained.n_agents > others.n_agents:
            raise OptionError("against", f"the policy of `{folder}` acts for all agents together, trained ones included")
        rows = [places[name] for name in others.agent_names]
        for what in ("own_observation_sizes", "own_action_sizes"):
            theirs, wanted = (getattr(trained, what)[row] for row in rows), getattr(others, what)
            if tuple(theirs) != wanted or trained.discrete != others.discrete:
                raise OptionError("against", f"the policy of `{folder}` was trained on other observations or actions")
        self._rows = torch.tensor(rows, device=next(actor.parameters()).device)
        self._others = others
        self._samples = "stochastic" in actor.traits
        self._carried = actor.initial_state(num_envs)

    def act(self, observation: Tensor, is_first: Tensor) -> Tensor:
        """Actions ``[B, M]`` or ``[B, M, D]``."""
        trained = self._actor.spec
        everyone = observation.new_zeros(len(observation), trained.n_agents, trained.observation)
        everyone[:, self._rows, : observation.shape[-1]] = observation
        batch = TensorDict({}, batch_size=[len(observation)], device=observation.device)
        batch.set(keys.OBSERVATION, everyone).set(keys.IS_FIRST, is_first)
        for key, value in self._carried.items():
            batch.set(key, value)
        self._actor(batch, deterministic=not self._samples)
        self._carried = {key: batch[keys.following(key)] for key in self._carried}
        action = batch[keys.ACTION].index_select(1, self._rows)
        return action if self._others.discrete else action[..., : self._others.action_features]

    def state_dict(self) -> dict[str, Any]:
        """What it carries from step to step, and a fingerprint of its parameters."""
        carried = {_text(key): value.clone() for key, value in self._carried.items()}
        return {"parameters": self._fingerprint(), "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            MarlkitError: the run has another policy by now.
            CheckpointError: an entry is not what this policy carries; names it.
        """
        here = {_text(key): value for key, value in self._carried.items()}
        refuse_misfit(state, {"parameters": TEXT, "carried": MAPPING}, "player")
        refuse_misfit(state["carried"], here, "player.carried")
        if state["parameters"] != self._fingerprint():
            raise MarlkitError(
                f"the best policy of `{self._folder}` is another one than when this training began. Copy a run whose policy is "
                "to stay, and name the copy"
            )
        device = self._rows.device
        self._carried = {key: state["carried"][_text(key)].to(device, copy=True) for key in self._carried}

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._actor.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _text(key: Key) -> str:
    return key if isinstance(key, str) else ".".join(key)
