"""VMAS scenarios, simulated in batches.

Bettini et al. 2022, "VMAS: A Vectorized Multi-Agent Simulator for Collective Robot Learning", arXiv:2207.03530.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys, rng
from marlkit.component import Environment, Runtime
from marlkit.contract import Contract, When
from marlkit.envs._vmas.drawing import Camera, draw_world
from marlkit.envs._vmas.recorded import RecordedSimulation
from marlkit.envs._vmas.reset_pool import ResetPool
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs._vmas.world_state import restore_world, save_world
from marlkit.errors import MarlkitError
from marlkit.options import PositiveInt
from marlkit.spec import Continuous, Discrete, TeamSpec


class VmasEnvironment(Environment):
    """Any scenario of VMAS, with continuous or discrete actions.

    Agents whose observations or action spaces are smaller than the largest are padded with zeros; ``ACTION_DIMS`` or
    ``ACTION_MASK`` says what is padding. Continuous actions are clipped to each agent's range; padded dimensions, which have
    no effect, are given the range [-1, 1]. Discrete actions are VMAS' flat ones (all choices of an agent multiplied).
    Communication counts as action dimensions in [0, 1], or multiplies the discrete actions by the number of words.

    ``max_steps`` truncates; only the scenario itself terminates. Finished environments receive fresh rows of a twin
    (:mod:`marlkit.envs._vmas.reset_pool`); when all finish together they are simply reset as a whole.

    Construction is seeded by ``runtime.seed`` alone and leaves the global random generators as they were. Every reset and step
    then draws from the global generators (VMAS: torch's; the scenario `het_mass` numpy's), so that whoever saves those and
    :meth:`state_dict` can continue bit for bit.

    Args:
        runtime: device and seed.
        scenario: name of the scenario (`balance`, `simple_spread` or `mpe/simple_spread`), or a dotted path to a class of
            your own that extends `vmas.simulator.scenario.BaseScenario`.
        num_envs: number of environments B simulated together; 32 to a few thousand.
        max_steps: steps after which an episode is truncated; null means never.
        continuous_actions: whether actions are forces (true) or numbered moves (false).
        reward: each agent's own, or the mean or sum over the team for everybody.
        scenario_options: options of the scenario, such as `{n_agents: 4}`; `marlkit check` knows their names.

    Raises:
        OptionError: there is no such scenario or scenario option, or VMAS refuses an option's value.
        MarlkitError: a scenario that ends episodes keeps state that cannot be reset for one environment alone.
    """

    contract = Contract(
        writes=(
            *(keys.OBSERVATION, keys.STATE, keys.ALIVE, keys.IS_FIRST),
            When("discrete", (keys.ACTION_MASK,)),
            When("continuous", (keys.ACTION_DIMS,)),
            *(keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE),
        ),
        traits=(
            When("continuous_actions=true", ("continuous",)),
            When("continuous_actions=false", ("discrete",)),
            When("reward=mean", ("team_reward",)),
            When("reward=sum", ("team_reward",)),
        ),
        check="marlkit.envs._vmas.scenarios:check",
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        scenario: str,
        num_envs: PositiveInt = 64,
        max_steps: PositiveInt | None = None,
        continuous_actions: bool = True,
        reward: Literal["individual", "mean", "sum"] = "individual",
        scenario_options: dict[str, Any] | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.device = runtime.device
        self.max_steps = max_steps
        self._seed = runtime.seed
        self._scenario = scenario
        self._pool = {"individual": None, "mean": torch.mean, "sum": torch.sum}[reward]
        self._build = partial(
            Simulation, scenario, device=runtime.device, continuous=continuous_actions, options=dict(scenario_options or {})
        )
        with rng.isolated(runtime.seed):
            self.simulation = self._build(num_envs)
        self.spec = self._team_spec(continuous_actions, team_reward=reward != "individual")
        # Without an end of its own, a scenario's environments run in step and are only ever reset together.
        self._fresh = self._rows_in_stock() if self.simulation.can_terminate else None
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._make_constants()
        self._camera: Camera | None = None
        self._advance = self.simulation.advance
        if runtime.compile != "none":
            self._advance = RecordedSimulation(self.simulation, scenario, runtime.compile).advance

    # --- the episode ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self) -> TensorDict:
        """Start every environment anew: batch ``[B]`` with all current keys of the contract."""
        self._steps.zero_()
        return self._step(self.simulation.reset(), self._all)

    @torch.no_grad()
    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """One joint step with actions ``[B, N]`` or ``[B, N, D]``; see :meth:`Environment.step`.

        Raises:
            MarlkitError: the actions have a wrong shape or type.
        """
        self.refuse_unfit_action(action, f"scenario `{self._scenario}`")
        observation, reward, terminated = self._advance(action)
        self._steps += 1
        terminated = terminated.unsqueeze(-1)
        truncated = self._none
        if self.max_steps is not None:
            truncated = (self._steps >= self.max_steps).unsqueeze(-1) & ~terminated
        done = terminated | truncated
        arrived = self._step(observation, self._none)
        arrived.set(("agents", "reward"), self._pooled(reward.unsqueeze(-1)))
        arrived.set("terminated", terminated).set("truncated", truncated).set("done", done)
        return arrived, self._step(self._after_resets(observation, done.squeeze(-1)), done)

    def _after_resets(self, observation: Tensor, done: Tensor) -> Tensor:
        """Reset the environments that are done; the observation ``[B, N, O]`` from which the next step starts."""
        finished = done.nonzero().squeeze(-1)
        if finished.numel() == 0:
            return observation
        self._steps.index_fill_(0, finished, 0)
        if finished.numel() == self.num_envs:
            return self.simulation.reset()
        self._fresh = self._fresh or self._rows_in_stock()
        observation = observation.clone()
        self._fresh.take(self.simulation, finished, observation)
        return observation

    def _rows_in_stock(self) -> ResetPool:
        return ResetPool(self._build, self.num_envs, self._seed)

    def _pooled(self, reward: Tensor) -> Tensor:
        return reward if self._pool is None else self._pool(reward, dim=1, keepdim=True).expand_as(reward)

    def _step(self, observation: Tensor, is_first: Tensor) -> TensorDict:
        agents = {"observation": observation, **self._constants}
        step = {"agents": agents, keys.STATE: observation.flatten(1), keys.IS_FIRST: is_first}
        return TensorDict(step, batch_size=[self.num_envs], device=self.device)

    # --- sizes ---------------------------------------------------------------------------------------------------------------

    def _team_spec(self, continuous: bool, team_reward: bool) -> TeamSpec:
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
            team_reward=team_reward,
            names=tuple(agent.name for agent in simulation.agents),
            observation_sizes=tuple(simulation.observation_sizes),
            action_sizes=tuple(simulation.action_sizes),
        )

    def _make_constants(self) -> None:
        team = (self.num_envs, self.spec.n_agents)
        yes = torch.ones((), dtype=torch.bool, device=self.device)
        self._all, self._none = yes.expand(self.num_envs, 1), (~yes).expand(self.num_envs, 1)
        sizes = torch.tensor(self.spec.own_action_sizes, device=self.device).unsqueeze(-1)
        has = torch.arange(self.spec.action_features, device=self.device) < sizes
        mask = "action_mask" if self.spec.discrete else "action_dims"
        self._constants = {"alive": yes.expand(*team, 1), mask: has.expand(*team, -1)}

    # --- saving and drawing --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of the simulation but the global random generators, as plain data and tensors."""
        return {
            "scenario": self._scenario,
            "steps": self._steps.clone(),
            "world": save_world(self.simulation.scenario),
            "fresh": None if self._fresh is None else self._fresh.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the global random generators are put back as well.

        Raises:
            MarlkitError: it was saved from another scenario or another number of environments.
        """
        saved = (state["scenario"], len(state["steps"]))
        if saved != (self._scenario, self.num_envs):
            here = f"{self.num_envs} of `{self._scenario}`"
            raise MarlkitError(f"the saved simulation is of {saved[1]} environments of `{saved[0]}`, this one of {here}")
        with rng.isolated(self._seed):
            # One step creates the objects that a scenario makes when they are first needed; what they hold is then replaced.
            self.simulation.advance(self.simulation.no_action())
        restore_world(self.simulation.scenario, state["world"], self.device)
        self._steps = state["steps"].to(self.device, copy=True)
        if state["fresh"] is not None:
            self._fresh = self._fresh or self._rows_in_stock()
            self._fresh.load_state_dict(state["fresh"])

    def draw(self, index: int = 0) -> Any:
        """Picture of environment ``index``, ``[height, width, 3]`` uint8; the camera is set by the first picture."""
        if self._camera is None:
            self._camera = Camera.over(self.simulation.scenario, index)
        return draw_world(self.simulation.scenario, index, self._camera)
