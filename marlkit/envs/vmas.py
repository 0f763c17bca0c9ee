"""VMAS scenarios, simulated in batches.

Bettini et al. 2022, "VMAS: A Vectorized Multi-Agent Simulator for Collective Robot Learning", arXiv:2207.03530.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlkit import rng
from marlkit.component import Runtime
from marlkit.contract import Contract, When
from marlkit.envs._adapter import POOLED, WRITES, AdapterEnvironment, Outcome, Pooling
from marlkit.envs._against import problem_with_player
from marlkit.envs._sides import Sides
from marlkit.envs._vmas.drawing import Camera, draw_world
from marlkit.envs._vmas.recorded import RecordedSimulation
from marlkit.envs._vmas.reset_pool import ResetPool
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs._vmas.world_state import restore_world, save_world
from marlkit.errors import MarlkitError, OptionError
from marlkit.options import PositiveInt
from marlkit.saved import ANY, MAPPING, TEXT, Kind, refuse_misfit
from marlkit.spec import Continuous, Discrete, TeamSpec


class VmasEnvironment(AdapterEnvironment[Tensor]):
    """Any scenario of VMAS, with continuous or discrete actions.

    Agents whose observations or action spaces are smaller than the largest are padded with zeros; ``ACTION_DIMS`` or
    ``ACTION_MASK`` says what is padding. Continuous actions are clipped to each agent's range; padded dimensions, which have
    no effect, are given the range [-1, 1]. Discrete actions are VMAS' flat ones (all choices of an agent multiplied).
    Communication counts as action dimensions in [0, 1], or multiplies the discrete actions by the number of words.

    ``max_steps`` truncates; only the scenario itself terminates. Finished environments receive fresh rows of a twin
    (:mod:`marlkit.envs._vmas.reset_pool`); when all finish together they are simply reset as a whole.

    Construction is seeded by ``runtime.seed`` alone and leaves the global random generators as they were. Every reset and step
    then draws from the global generators (VMAS: torch's; the scenario `het_mass` numpy's), so that with their states and
    :meth:`state_dict` a simulation continues bit for bit.

    Args:
        runtime: device and seed.
        scenario: name of the scenario (`balance`, `simple_spread` or `mpe/simple_spread`), or a dotted path to a class of
            your own that extends `vmas.simulator.scenario.BaseScenario`.
        continuous_actions: whether actions are forces (true) or numbered moves (false).
        scenario_options: options of the scenario, such as `{n_agents: 4}`; `marlkit check` knows their names. Where `scenario`
            is changed alone, those that the new one takes are kept.
        num_envs, max_steps, reward: as in :class:`AdapterEnvironment`.
        train: of agents that are opposed to each other, the group that is trained, such as `adversaries`; the others are then a
            part of its environment, and it may be paid as a team. `null`: all agents are trained.
        against: who plays the others where `train` names a group: `random`; a run folder, whose best policy plays and learns no
            more; or the dotted path of a function of your own, which is given the others' observations ``[B, M, O]`` and their
            team spec and returns their actions.

    Agents with different marks ``Agent.adversary``, and the two teams of `football` where policies control both, are opposed to
    each other (trait ``opposing``). A scenario of your own may instead say it by a method ``agent_group(self, agent)`` that
    returns the name of the agent's group. Rewards are then never pooled, and returns are told per group, unless only one group
    is trained.

    A scenario of your own may also name its discrete actions, by a method ``discrete_actions(self, agent)`` that returns what
    each does, ``[actions, forces + words]`` in the units of continuous actions, and say how pictures show it
    (:mod:`marlkit.envs._vmas.drawing`).

    Raises:
        OptionError: there is no such scenario or scenario option, VMAS refuses an option's value, the scenario has built another
            number of agents than an option asks for, `reward` pools the rewards of opposed agents, or there is no such group or
            player.
        MarlkitError: a scenario that ends episodes keeps state that cannot be reset for one environment alone.
    """

    contract = Contract(
        writes=WRITES,
        traits=(
            When("continuous_actions=true", ("continuous",)),
            When("continuous_actions=false", ("discrete",)),
            *POOLED,
        ),
        check="marlkit.envs._vmas.scenarios:check",
        derives="marlkit.envs._vmas.scenarios:traits",
        holds={"scenario_options": ("scenario", "marlkit.envs._vmas.scenarios:held_options")},
        code="marlkit.envs._vmas.scenarios:code",
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        scenario: str,
        num_envs: PositiveInt = 64,
        max_steps: PositiveInt | None = None,
        continuous_actions: bool = True,
        reward: Pooling = "individual",
        scenario_options: dict[str, Any] | None = None,
        train: str | None = None,
        against: str = "random",
    ) -> None:
        super().__init__(runtime, num_envs=num_envs, max_steps=max_steps, reward=reward)
        problem = problem_with_player(against, train)
        if problem is not None:
            raise OptionError("against", problem)
        self.name = f"scenario `{scenario}`"
        self._seed = runtime.seed
        self._scenario = scenario
        self._build = partial(
            Simulation, scenario, device=runtime.device, continuous=continuous_actions, options=dict(scenario_options or {})
        )
        with rng.isolated(runtime.seed):
            self.simulation = self._build(self.num_envs)
            team = self._everyone_spec(continuous_actions)
            self._sides = None if train is None else Sides(team, train, against, runtime, num_envs)
        self.prepare(self._team_spec(team))
        # Without an end of its own, a scenario's environments run in step and are only ever reset together.
        self._reset_pool = self._new_reset_pool() if self.simulation.can_terminate else None
        self._camera: Camera | None = None
        self._advance = self.simulation.advance
        if runtime.compile != "none":
            self._advance = RecordedSimulation(self.simulation, scenario, runtime.compile).advance

    # --- the episode ---------------------------------------------------------------------------------------------------------

    def restart(self) -> Tensor:
        """Reset the simulation; the observation of all agents ``[B, N, O]``."""
        self._seen = self.simulation.reset()
        return self._seen

    def simulate(self, action: Tensor) -> Outcome[Tensor]:
        """One step of the simulation with actions ``[B, N]`` or ``[B, N, D]``; only the scenario terminates."""
        if self._sides is not None:
            action = self._sides.joint(action, self._seen, (self._steps == 0).unsqueeze(-1))
        observation, reward, terminated = self._advance(action)
        if self._sides is not None:
            reward = self._sides.reward(reward)
        return Outcome(observation, reward.unsqueeze(-1), terminated.unsqueeze(-1), self._none)

    def proceed(self, seen: Tensor, done: Tensor, finished: Tensor) -> Tensor:
        """Give the environments ``finished`` ``[F]`` new rows; the observation ``[B, N, O]`` from which the next step starts."""
        if finished.numel() == self.num_envs:
            return self.restart()
        self._seen = seen
        if finished.numel():
            self._reset_pool = self._reset_pool or self._new_reset_pool()
            self._seen = seen.clone()
            self._reset_pool.take(self.simulation, finished, self._seen)
        return self._seen

    def observation(self, seen: Tensor) -> Tensor:
        """``[B, N, O]`` of the agents that are trained."""
        return seen if self._sides is None else self._sides.observation(seen)

    def _new_reset_pool(self) -> ResetPool:
        return ResetPool(self._build, self.num_envs, self._seed)

    # --- sizes ---------------------------------------------------------------------------------------------------------------

    def _team_spec(self, team: TeamSpec) -> TeamSpec:
        """Of the agents that are trained."""
        team = team if self._sides is None else self._sides.spec
        self.refuse_pooled_opponents(team.groups)
        return replace(team, team_reward=self.pools_reward)

    def _everyone_spec(self, continuous: bool) -> TeamSpec:
        simulation = self.simulation
        size = max(simulation.action_sizes)
        action: Continuous | Discrete = Discrete(size)
        if continuous:
            low, high = (tuple(map(tuple, bound.tolist())) for bound in (simulation.low, simulation.high))
            action = Continuous(size, low, high)
        return TeamSpec(
            n_agents=len(simulation.agents),
            observation=max(simulation.observation_sizes),
            action=action,
            horizon=self.max_steps,
            names=tuple(agent.name for agent in simulation.agents),
            observation_sizes=tuple(simulation.observation_sizes),
            action_sizes=tuple(simulation.action_sizes),
            groups=simulation.groups,
        )

    # --- saving and drawing --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of the simulation but the global random generators, as plain data and tensors."""
        return {
            "scenario": self._scenario,
            "steps": self._steps.clone(),
            "world": save_world(self.simulation.scenario),
            "fresh": None if self._reset_pool is None else self._reset_pool.state_dict(),
            **({} if self._sides is None else {"seen": self._seen.clone(), "player": self._sides.player.state_dict()}),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the global random generators are put back as well.

        Raises:
            MarlkitError: it was saved from another scenario or another number of environments.
            CheckpointError: an entry is not what this scenario has there; names it.
        """
        steps = Kind("the numbers of steps", lambda value: isinstance(value, Tensor) and value.dim() == 1)
        others = {} if self._sides is None else {"seen": ANY, "player": MAPPING}
        refuse_misfit(state, {"scenario": TEXT, "steps": steps, "world": MAPPING, "fresh": ANY, **others}, "state")
        saved = (state["scenario"], len(state["steps"]))
        if saved != (self._scenario, self.num_envs):
            here = f"{self.num_envs} of `{self._scenario}`"
            raise MarlkitError(f"the saved simulation is of {saved[1]} environments of `{saved[0]}`, this one of {here}")
        refuse_misfit(state["steps"], self._steps, "steps")
        shape = (self.num_envs, len(self.simulation.agents), max(self.simulation.observation_sizes))
        if self._sides is not None:
            refuse_misfit(state["seen"], torch.zeros(*shape), "seen")
            self._sides.player.load_state_dict(state["player"])
            self._seen = state["seen"].to(self.device, copy=True)
        with rng.isolated(self._seed):
            # One step creates the objects that a scenario makes when they are first needed; what they hold is then replaced.
            self.simulation.advance(self.simulation.no_action())
        restore_world(self.simulation.scenario, state["world"], self.device)
        self._steps = state["steps"].to(self.device, copy=True)
        self._reset_pool = None
        if state["fresh"] is not None:
            self._reset_pool = self._new_reset_pool()
            self._reset_pool.load_state_dict(state["fresh"], shape)

    def draw(self, index: int = 0) -> Any:
        """Picture of environment ``index``, ``[height, width, 3]`` uint8; the camera is set by the first picture."""
        if self._camera is None:
            self._camera = Camera.over(self.simulation.scenario, index)
        return draw_world(self.simulation.scenario, index, self._camera)
