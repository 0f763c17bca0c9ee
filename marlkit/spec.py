"""The description of a team that every component receives: number of agents, sizes, actions. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

ENVIRONMENT_TRAITS = frozenset({"discrete", "continuous", "team_reward", "opposing"})
"""The traits of an environment that its team spec decides; a contract that declares one must agree with it."""

Bounds = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Discrete:
    """``n`` actions, numbered from 0; those that an agent does not have are masked."""

    n: int


@dataclass(frozen=True)
class Continuous:
    """``size`` real numbers in the units of the environment; those that an agent does not have are masked.

    ``low`` and ``high`` are bounds per agent and dimension, ``[N][D]``; ``None`` means unbounded.
    """

    size: int
    low: Bounds | None = None
    high: Bounds | None = None

    def __post_init__(self) -> None:
        for name, bounds in (("low", self.low), ("high", self.high)):
            rows = bounds if isinstance(bounds, Sequence) else [bounds]
            fits = all(isinstance(row, Sequence) and len(row) == self.size for row in rows)
            if bounds is not None and not fits:
                raise ValueError(f"`{name}` must be a tuple with one tuple per agent, of {self.size} numbers each, got {bounds}")


@dataclass(frozen=True)
class TeamSpec:
    """Sizes of a team.

    Attributes:
        n_agents: number of agents N.
        observation: length O of the longest observation.
        action: the action space that every agent's own space is padded to.
        state: length S of the state; ``None`` means the joint observation, N * O.
        horizon: steps after which an episode is truncated; ``None`` means never.
        team_reward: whether all agents always receive the same reward.
        groups: the group of each agent, where they do not share one aim: agents of one group do, and groups are opposed to each
            other; ``None`` means that all agents share one aim.
        names: the agents' names; ``None`` means ``agent_0``, ``agent_1``, …
        observation_sizes: each agent's own observation length; ``None`` means O for all.
        action_sizes: each agent's own number of actions or action dimensions; ``None`` means the same for all.
    """

    n_agents: int
    observation: int
    action: Discrete | Continuous
    state: int | None = None
    horizon: int | None = None
    team_reward: bool = False
    names: tuple[str, ...] | None = None
    observation_sizes: tuple[int, ...] | None = None
    action_sizes: tuple[int, ...] | None = None
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.action, (Discrete, Continuous)):
            raise TypeError(f"`action` must be Discrete(…) or Continuous(…), got {self.action!r}")
        if self.groups is not None and len(self.groups) != self.n_agents:
            raise ValueError(f"groups must name a group for each of the {self.n_agents} agents, got {self.groups}")
        if self.team_reward and self.opposing:
            raise ValueError(f"agents of opposing groups cannot all receive the same reward: {', '.join(self.members)}")

    @property
    def opposing(self) -> bool:
        """Whether the agents do not share one aim."""
        return self.groups is not None and len(set(self.groups)) > 1

    @property
    def members(self) -> dict[str, tuple[int, ...]]:
        """The indices of each group's agents; empty where all agents share one aim."""
        if self.groups is None or not self.opposing:
            return {}
        return {name: tuple(i for i, own in enumerate(self.groups) if own == name) for name in dict.fromkeys(self.groups)}

    @property
    def discrete(self) -> bool:
        """Whether actions are discrete."""
        return isinstance(self.action, Discrete)

    @property
    def action_features(self) -> int:
        """A for discrete actions (the length of a one-hot action), D for continuous ones."""
        return self.action.n if isinstance(self.action, Discrete) else self.action.size

    @property
    def state_size(self) -> int:
        """Size S of the state."""
        return self.n_agents * self.observation if self.state is None else self.state

    @property
    def traits(self) -> frozenset[str]:
        """The environment's traits, to which conditions of a contract refer."""
        found = {"team_reward": self.team_reward, "opposing": self.opposing}
        return frozenset({"discrete" if self.discrete else "continuous"} | {trait for trait, has in found.items() if has})

    @property
    def agent_names(self) -> tuple[str, ...]:
        """One name per agent."""
        return self.names or tuple(f"agent_{index}" for index in range(self.n_agents))

    @property
    def own_observation_sizes(self) -> tuple[int, ...]:
        """Each agent's own observation length."""
        return self.observation_sizes or (self.observation,) * self.n_agents

    @property
    def own_action_sizes(self) -> tuple[int, ...]:
        """Each agent's own number of actions or action dimensions."""
        return self.action_sizes or (self.action_features,) * self.n_agents

    # TorchRL's collectors and sequences look into the `spec` of a module for the specs of the keys that it writes. A team's holds
    # none, so that they look at what the module writes instead.

    def keys(self, *_: bool) -> tuple[()]:
        """No key has a TorchRL spec here."""
        return ()

    values = items = keys

    def sizes(self) -> dict[str, int]:
        """Sizes of the named dimensions of :mod:`marlkit.keys`."""
        return {
            "N": self.n_agents,
            "O": self.observation,
            "S": self.state_size,
            "A": self.action_features,
            "D": self.action_features,
        }

    def resized(self, n_agents: int) -> TeamSpec:
        """A team of another number of agents that are like these.

        Raises:
            ValueError: these are not alike, or the number is below 1.
        """
        if n_agents < 1:
            raise ValueError("there must be at least one")
        action = self.action
        bounds = [] if isinstance(action, Discrete) else [b for b in (action.low, action.high) if b is not None]
        told = (self.own_observation_sizes, self.own_action_sizes, self.groups or (), *bounds)
        if any(len(set(each)) > 1 for each in told) or (told[0][0], told[1][0]) != (self.observation, self.action_features):
            raise ValueError("those that were trained differ in their observations, actions, bounds or groups")
        if isinstance(action, Continuous):
            low, high = (None if b is None else (b[0],) * n_agents for b in (action.low, action.high))
            action = Continuous(action.size, low, high)
        alike = {"observation_sizes": None, "action_sizes": None, "groups": None, "names": None, "state": None}
        return TeamSpec(**_fields(self) | alike | {"n_agents": n_agents, "action": action})

    def part(self, agents: Sequence[int]) -> TeamSpec:
        """The team of some of the agents, padded no further than these need."""
        action = self.action
        size = max(self.own_action_sizes[agent] for agent in agents)
        if isinstance(action, Discrete):
            action = Discrete(size)
        else:
            low, high = (None if b is None else tuple(b[agent][:size] for agent in agents) for b in (action.low, action.high))
            action = Continuous(size, low, high)
        per_agent = ("observation_sizes", "action_sizes", "names", "groups")
        told = {name: None if (v := getattr(self, name)) is None else tuple(v[agent] for agent in agents) for name in per_agent}
        told["names"] = tuple(self.agent_names[agent] for agent in agents)
        if len(set(told["groups"] or ())) < 2:
            told["groups"] = None
        longest = max(self.own_observation_sizes[agent] for agent in agents)
        sizes = {"n_agents": len(agents), "observation": longest, "state": None, "action": action}
        return TeamSpec(**_fields(self) | told | sizes)

    def as_dict(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_dict` creates an equal spec."""
        action: dict[str, Any]
        if isinstance(self.action, Discrete):
            action = {"discrete": self.action.n}
        else:
            bounds = [None if b is None else [list(row) for row in b] for b in (self.action.low, self.action.high)]
            action = {"continuous": self.action.size, "low": bounds[0], "high": bounds[1]}
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "action"}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()} | {"action": action}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TeamSpec:
        """The inverse of :meth:`as_dict`."""
        rest: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items() if name != "action"}
        action = data["action"]
        if "discrete" in action:
            return cls(**rest, action=Discrete(action["discrete"]))
        low, high = (None if action[b] is None else tuple(tuple(row) for row in action[b]) for b in ("low", "high"))
        return cls(**rest, action=Continuous(action["continuous"], low, high))


def _fields(spec: TeamSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(spec)}
