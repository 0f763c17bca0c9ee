"""Fresh environments in stock: any number of finished environments are reset for the price of at most one reset.

VMAS resets one environment at a time and computes every observation anew each time, at about the price of a step. Here a twin
of the simulation is reset as a whole, and each finished environment receives one row of the twin that is still unused:
every per-environment tensor's row, and the observation that goes with it. The twin is reset again when its rows are used up.

Environments must be exchangeable: a reset as a whole draws every row from the same distribution, so that it does not
matter which row an environment receives. What all environments of a batch share (in some scenarios of MPE which landmark is
the goal) is not drawn anew while others are in the middle of an episode; only a reset of all of them together does that. What
is changed for all of them by hand (a difficulty, say) takes effect with the next stock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from marlkit import rng
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs._vmas.world_graph import Survey, copy_rows, learn_axes, share, survey
from marlkit.envs._vmas.world_state import restore_world, save_world
from marlkit.saved import MAPPING, Kind, refuse_misfit

PROBES = (3, 5)
"""Numbers of environments of the two small worlds from which it is learnt which axis of a tensor counts environments."""


class ResetPool:
    """Rows of a twin simulation, each to be used once.

    Args:
        build: makes a simulation of the given number of environments.
        num_envs: number of environments B of the twin, which is built when it is first needed.
        seed: seed of the construction; the caller's random generators are left as they were.

    Raises:
        MarlkitError: the scenario keeps state whose rows cannot be told apart.
    """

    def __init__(self, build: Callable[[int], Simulation], num_envs: int, seed: int) -> None:
        self.num_envs = num_envs
        self._build = build
        self._seed = seed
        with rng.isolated(seed):
            smaller, larger = (survey(_tried(build(size)).scenario) for size in PROBES)
        self.axes = learn_axes(smaller, larger, PROBES)
        self._used = num_envs
        self._observation: Tensor | None = None
        self._rows = Survey()

    @cached_property
    def twin(self) -> Simulation:
        """The simulation that the fresh rows come from."""
        with rng.isolated(self._seed):
            return _tried(self._build(self.num_envs))

    def take(self, simulation: Simulation, finished: Tensor, observation: Tensor) -> None:
        """Reset the environments ``finished`` ``[F]`` of a simulation; write what they see into ``observation`` ``[B, N, O]``."""
        target = survey(simulation.scenario)
        while finished.numel():
            if self._used == self.num_envs:
                self._restock(simulation)
            now, finished = finished.tensor_split([self.num_envs - self._used])
            copy_rows(self._rows, target, self.axes, now, self._used)
            assert self._observation is not None
            observation.index_copy_(0, now, self._observation.narrow(0, self._used, now.numel()))
            self._used += now.numel()

    def _restock(self, simulation: Simulation) -> None:
        scenario = self.twin.scenario
        theirs = survey(simulation.scenario, values=True)
        share(theirs, survey(scenario, values=True), self.axes)
        scenario.env_reset_world_at(None)
        # The reset may have drawn what all share anew; the observation is to fit the simulation that the rows go to.
        share(theirs, survey(scenario, values=True), self.axes)
        self._observation = self.twin.observation()
        self._rows = survey(scenario)
        self._used = 0

    def state_dict(self) -> dict[str, Any]:
        """The twin, what it sees, and how many of its rows are used; empty if none has been needed yet."""
        if self._observation is None:
            return {}
        return {"twin": save_world(self.twin.scenario), "observation": self._observation.clone(), "used": self._used}

    def load_state_dict(self, state: dict[str, Any], shape: Sequence[int]) -> None:
        """Continue from :meth:`state_dict`; ``shape`` is that of what is seen, ``[B, N, O]``.

        Raises:
            CheckpointError: an entry is not what this scenario has there; names it.
        """
        self.__dict__.pop("twin", None)
        self._used, self._observation = self.num_envs, None
        refuse_misfit(state, MAPPING, "fresh")
        if not state:
            return
        used = Kind(f"a number of rows, 0 to {self.num_envs}", lambda value: type(value) is int and 0 <= value <= self.num_envs)
        refuse_misfit(state, {"twin": MAPPING, "observation": torch.zeros(*shape), "used": used}, "fresh")
        restore_world(self.twin.scenario, state["twin"], self.twin.device)
        self._observation = state["observation"].to(self.twin.device, copy=True)
        self._rows = survey(self.twin.scenario)
        self._used = state["used"]


@torch.no_grad()
def _tried(simulation: Simulation) -> Simulation:
    """The simulation after one step, which creates the tensors that a scenario only makes when they are first needed."""
    simulation.advance(simulation.no_action())
    return simulation
