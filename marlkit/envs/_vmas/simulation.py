"""A batch of VMAS worlds stepped with stacked tensors.

VMAS' own `Environment` takes and returns one tensor per agent, swaps the state of three random generators around every call,
asserts on tensors (a synchronisation each) and computes diagnostics that are not used. This drives the scenario and its world
directly, in the same order: actions, `pre_step`, physics, `post_step`, rewards, observations, end of the episode. Random
numbers come from the global generators, like those of VMAS.
"""

from __future__ import annotations

import importlib
import itertools
import math
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from marlkit.envs._vmas import scenarios
from marlkit.envs._vmas.agents import groups_of, refuse_other_numbers
from marlkit.envs._vmas.scenario_source import Options
from marlkit.envs._vmas.unread_options import refuse_unread
from marlkit.errors import ComponentError, MarlkitError, OptionError
from marlkit.functional.bounds import executed

try:
    from vmas.scenarios import load
    from vmas.simulator.scenario import BaseScenario
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise MarlkitError(f"the environment `vmas` {scenarios.NOT_INSTALLED}") from error


class Simulation:
    """``num_envs`` copies of a scenario.

    Args:
        scenario: a name (``balance``, ``simple_spread`` or ``mpe/simple_spread``) or a dotted path to a `BaseScenario` class.
        num_envs: number of copies B.
        device: where the tensors live.
        continuous: whether actions are continuous.
        options: options of the scenario.

    Attributes:
        scenario: VMAS' scenario; its world is ``scenario.world``.
        agents: the agents that act; scripted ones are not among them.
        action_sizes: own number of actions or action dimensions of each agent, communication included.
        observation_sizes: own observation length of each agent.
        low, high: bounds of the action dimensions ``[N, D]``; padded dimensions have -1 and 1.

    Raises:
        OptionError: there is no such scenario, it has no such option, or it refuses an option's value.
    """

    def __init__(self, scenario: str, num_envs: int, device: torch.device, *, continuous: bool, options: dict[str, Any]) -> None:
        self.scenario = _load(scenario, options)
        self.num_envs = num_envs
        self.device = device
        try:
            self.scenario.env_make_world(num_envs, device, **options)
            self.scenario.env_reset_world_at(None)
        except Exception as error:
            if not options:
                raise
            words = f"{type(error).__name__}: {error}" if str(error) else _failing_line(error)
            raise OptionError("scenario_options", f"VMAS refuses {options} for the scenario `{scenario}`: {words}") from error
        self.agents = list(self.scenario.world.policy_agents)
        if not self.agents:
            raise OptionError("scenario", f"`{scenario}` has no agent that a policy could control; all are scripted")
        refuse_other_numbers(scenario, options, self.scenario.world.agents)
        self._speech = [0 if agent.silent else self.scenario.world.dim_c for agent in self.agents]
        if continuous:
            self.action_sizes = [agent.action_size + speech for agent, speech in zip(self.agents, self._speech, strict=True)]
            self._read_bounds()
        else:
            tables = [self._action_table(agent, speech) for agent, speech in zip(self.agents, self._speech, strict=True)]
            self.action_sizes = [len(table) for table in tables]
            self._table = _padded(tables, float("nan"))
        self._continuous = continuous
        self._agent_index = torch.arange(len(self.agents), device=device)
        observations = [self._own_observation(agent) for agent in self.agents]
        self.observation_sizes = [observation.shape[1] for observation in observations]

    @property
    def groups(self) -> tuple[str, ...] | None:
        """The group of each agent; ``None`` where all share one aim."""
        return groups_of(self.scenario, self.agents)

    @property
    def can_terminate(self) -> bool:
        """Whether the scenario ever ends an episode by itself."""
        return type(self.scenario).done is not BaseScenario.done

    # --- the episode ---------------------------------------------------------------------------------------------------------

    def reset(self) -> Tensor:
        """Start all copies anew; their observation ``[B, N, O]``."""
        self.scenario.env_reset_world_at(None)
        return self.observation()

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step with actions ``[B, N]`` or ``[B, N, D]``: observation ``[B, N, O]``, reward ``[B, N]``, terminated ``[B]``."""
        self._act(action)
        scenario = self.scenario
        for agent in scenario.world.agents:
            scenario.env_process_action(agent)
        scenario.pre_step()
        scenario.world.step()
        scenario.post_step()
        reward = torch.empty(self.num_envs, len(self.agents), device=self.device)
        for index, agent in enumerate(self.agents):
            # Copied at once: some scenarios write the next agent's reward into the same tensor.
            reward[:, index].copy_(scenario.reward(agent).reshape(self.num_envs))
        return self.observation(), reward, scenario.done().reshape(self.num_envs).clone()

    def observation(self) -> Tensor:
        """What the agents see now, ``[B, N, O]``, padded with zeros. Sensors store what they measured."""
        longest = max(self.observation_sizes)
        create = torch.empty if min(self.observation_sizes) == longest else torch.zeros
        seen = create(self.num_envs, len(self.agents), longest, device=self.device)
        for index, (agent, size) in enumerate(zip(self.agents, self.observation_sizes, strict=True)):
            seen[:, index, :size].copy_(self._own_observation(agent))
        return seen

    def no_action(self) -> Tensor:
        """An action to try: zero forces and silence, or every agent's first discrete action."""
        if self._continuous:
            return torch.zeros(self.num_envs, *self.low.shape, device=self.device).clamp(self.low, self.high)
        return torch.zeros(self.num_envs, len(self.agents), dtype=torch.int64, device=self.device)

    def _own_observation(self, agent: Any) -> Tensor:
        return _flat(self.scenario.observation(agent), self.num_envs)

    # --- actions -------------------------------------------------------------------------------------------------------------

    def _act(self, action: Tensor) -> None:
        if self._continuous:
            moves = executed(action, self.low, self.high) * self._multiplier
        else:
            moves = self._table[self._agent_index, action]
        for index, (agent, speech) in enumerate(zip(self.agents, self._speech, strict=True)):
            size = agent.action_size
            # A copy each: scenarios and dynamics change an agent's action in place.
            agent.action.u = _noisy(moves[:, index, :size].clone(), agent.action.u_noise)
            if speech:
                agent.action.c = _noisy(moves[:, index, size : size + speech].clone(), agent.c_noise)

    def _read_bounds(self) -> None:
        low, high, multiplier = [], [], []
        for agent, speech in zip(self.agents, self._speech, strict=True):
            reach, silence, speaking = agent.action.u_range_tensor, *torch.tensor([[0.0], [1.0]], device=self.device)
            low.append(torch.cat([-reach, silence.expand(speech)]))
            high.append(torch.cat([reach, speaking.expand(speech)]))
            multiplier.append(torch.cat([agent.action.u_multiplier_tensor, speaking.expand(speech)]))
        self.low, self.high, self._multiplier = _padded(low, -1.0), _padded(high, 1.0), _padded(multiplier, 1.0)

    def _action_table(self, agent: Any, speech: int) -> Tensor:
        """What each discrete action does: ``[actions, forces + words]``.

        A scenario may say it by a method ``discrete_actions(agent)``, in the units of continuous actions. Otherwise actions are
        the cells of the product of the agent's own choices, the last choice counting fastest. Along one dimension
        with n choices from -range to range, the first means staying where it is if n is odd.
        """
        own: Callable[[Any], Tensor] | None = getattr(self.scenario, "discrete_actions", None)
        if callable(own):
            return own(agent) * torch.cat([agent.action.u_multiplier_tensor, torch.ones(speech, device=self.device)])
        choices = list(agent.discrete_action_nvec)
        rows = []
        for cell in itertools.product(*(range(n) for n in choices), *([range(speech)] if speech else [])):
            places = torch.tensor([_place(index, n) for index, n in zip(cell, choices, strict=False)], device=self.device)
            counts = torch.tensor(choices, device=self.device)
            reach = agent.action.u_range_tensor
            force = ((places / (counts - 1)) * (2 * reach) - reach) * agent.action.u_multiplier_tensor
            word = torch.zeros(speech, device=self.device)
            word[cell[len(choices) :]] = 1.0
            rows.append(torch.cat([force, word]))
        assert len(rows) == math.prod(choices) * max(speech, 1)
        return torch.stack(rows)


def _place(index: int, n: int) -> int:
    """Where choice ``index`` of ``n`` lies between the lowest (0) and the highest (n - 1) force."""
    if n % 2 == 0 or index > n // 2:
        return index
    return n // 2 if index == 0 else index - 1


def _noisy(action: Tensor, deviation: Any) -> Tensor:
    silent = all(value == 0 for value in deviation) if isinstance(deviation, (list, tuple)) else deviation == 0
    if silent:
        return action
    return action + torch.randn_like(action) * torch.as_tensor(deviation, device=action.device)


def _flat(observation: Any, num_envs: int) -> Tensor:
    """A tensor ``[B, …]`` or nested dict of such as ``[B, features]``, dicts in the order of their sorted keys."""
    if isinstance(observation, dict):
        return torch.cat([_flat(observation[key], num_envs) for key in sorted(observation)], dim=1)
    tensor: Tensor = observation
    return tensor.reshape(num_envs, -1)


def _padded(rows: list[Tensor], value: float) -> Tensor:
    """Stack tensors, each dimension filled up to the longest with ``value``."""
    shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    padded = torch.full((len(rows), *shape), value, device=rows[0].device)
    for index, row in enumerate(rows):
        region = padded[index]
        for axis, size in enumerate(row.shape):
            region = region.narrow(axis, 0, size)
        region.copy_(row)
    return padded


def _load(scenario: str, options: dict[str, Any]) -> BaseScenario:
    if scenarios.is_own_class(scenario):
        return _load_own(scenario, options)
    name = scenarios.full_name(scenario)
    if name is None:
        raise OptionError("scenario", scenarios.unknown_scenario(scenario))
    known = scenarios.scenario_options(name)
    assert known is not None, "a test reads every scenario of VMAS"
    _refuse_unknown(name, options, known)
    shipped = scenarios.shipped_scenarios().get(name)
    module = importlib.import_module(shipped.rpartition(".")[0]) if shipped else load(str(scenarios.scenario_files()[name]))
    loaded: BaseScenario = module.Scenario()
    return loaded


def _load_own(path: str, options: dict[str, Any]) -> BaseScenario:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise OptionError("scenario", f"`{path}` cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, BaseScenario)):
        raise OptionError("scenario", f"`{path}` is no scenario: it must be a subclass of vmas.simulator.scenario.BaseScenario")
    try:
        known = scenarios.scenario_options(path)
    except ComponentError:  # importing it has found more than reading it
        known = None
    if known is not None:
        _refuse_unknown(path, options, known)
    elif options:
        refuse_unread(path, found, options)
    return found()


def _refuse_unknown(scenario: str, options: dict[str, Any], known: Options) -> None:
    for option in options:
        message = scenarios.unknown_option(scenario, option, known)
        if message is not None:
            raise OptionError(f"scenario_options.{option}", message)


def _failing_line(error: BaseException) -> str:
    """The source line of an assertion without words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at `{last.line}` ({last.name} in {last.filename.rpartition('/')[2]})"
