"""Cooperative Treasure Collection: hunters pick up treasures and carry them to the bank of their type.

Iqbal and Sha 2019, "Actor-Attention-Critic for Multi-Agent Reinforcement Learning", arXiv:1810.02912, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vmas.simulator.core import Agent
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import ScenarioUtils

from marlkit.envs._vmas.particles import (
    DIRECTIONS,
    ParticleWorld,
    drawn_anew,
    mover,
    place,
    positions,
    refuse_too_few,
    spread,
    velocities,
)

HUNTER_RADIUS, BANK_RADIUS, TREASURE_RADIUS = 0.05, 0.075, 0.025
BANK_MASS = 2.25
FIELD = 0.95
"""Treasures lie in ``[-0.95, 0.95]²``."""
PARKED = -999.0
"""Both coordinates of a treasure that is gone for a step."""
PAID = 5.0
"""For each contact of an empty hunter with a treasure, and of a hunter with the bank of what it holds."""
COLLISION = 5.0
SHAPING = 0.1
EMPTY = -1


class Scenario(BaseScenario):
    """Six hunters, two banks, six treasures of two types.

    An agent observes its position and velocity; a hunter what it holds (one-hot); the other agents by distance, nearest first:
    relative position, velocity, which bank this is and what it holds (one-hot each, or zeros); the treasures by distance:
    relative position and type. All agents are paid

        5 · (contacts of empty hunters with treasures) + 5 · (contacts of banks with hunters that hold their type).

    A hunter is also paid -5 for each hunter that it touches and -0.1 times its distance to the nearest treasure, or to its bank
    if it holds something; a bank -0.1 times its distance to the nearest hunter that holds its type, or, if there is none, to the
    mean of the hunters. After observations and rewards, each treasure goes to the first empty hunter that touches it and is away
    for the next step, after which it lies elsewhere with a new type; then hunters at the bank of what they hold are empty again.
    All agents collide; no episode terminates: 100 steps are usual.

    Where a treasure is away, its relative position is about -1,000 in the sources. With ``parked: raw`` it is so here; ``masked``
    shows zeros in place of position and type, and keeps it out of the distance to the nearest treasure.

    Options: ``n_hunters`` (6), ``n_banks`` (2; as many types), ``n_treasures`` (6), ``parked`` (``masked``).
    """

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> ParticleWorld:
        """The world, before its first reset."""
        n_hunters: int = kwargs.pop("n_hunters", 6)
        n_banks: int = kwargs.pop("n_banks", 2)
        n_treasures: int = kwargs.pop("n_treasures", 6)
        parked: str = kwargs.pop("parked", "masked")
        ScenarioUtils.check_kwargs_consumed(kwargs)
        refuse_too_few(n_hunters=n_hunters, n_banks=n_banks, n_treasures=n_treasures)
        if parked not in ("masked", "raw"):
            raise ValueError(f"parked must be masked or raw, got {parked!r}")
        self.masks_parked = parked == "masked"
        world = ParticleWorld(batch_dim, device)
        self.hunters = [mover(f"hunter_{index}", HUNTER_RADIUS) for index in range(n_hunters)]
        self.banks = [mover(f"bank_{index}", BANK_RADIUS, BANK_MASS) for index in range(n_banks)]
        self.treasures = [place(f"treasure_{index}", TREASURE_RADIUS) for index in range(n_treasures)]
        for agent in (*self.hunters, *self.banks):
            world.add_agent(agent)
        for treasure in self.treasures:
            world.add_landmark(treasure)
        self.holds = torch.full((batch_dim, n_hunters), EMPTY, device=device)
        self.type_of = torch.zeros(batch_dim, n_treasures, dtype=torch.int64, device=device)
        self.lies = torch.ones(batch_dim, n_treasures, dtype=torch.bool, device=device)
        self.touches = torch.zeros(batch_dim, n_hunters, n_treasures, dtype=torch.bool, device=device)
        self._types = torch.arange(n_banks, device=device)
        return world

    def discrete_actions(self, agent: Agent) -> Tensor:
        """Every agent stays or moves along an axis: ``[actions, forces]``."""
        return torch.tensor(DIRECTIONS, device=self.world.device)

    # --- the episode ---------------------------------------------------------------------------------------------------------

    def reset_world_at(self, env_index: int | None = None) -> None:
        """Draw positions and types; all hunters are empty, and nothing that is touched at the start is taken."""
        spread(self.world, self.world.agents, 1.0, env_index)
        spread(self.world, self.treasures, FIELD, env_index)
        self.holds = drawn_anew(self.holds, torch.full_like(self.holds, EMPTY), env_index)
        self.type_of = drawn_anew(self.type_of, self._new_types(), env_index)
        self.lies = drawn_anew(self.lies, torch.ones_like(self.lies), env_index)
        touched = self.touches
        self.post_step()
        self.touches = drawn_anew(touched, torch.zeros_like(touched), env_index)

    def _new_types(self) -> Tensor:
        return torch.randint(len(self._types), (self.world.batch_dim, len(self.treasures)), device=self.world.device)

    def pre_step(self) -> None:
        """What the step before has led to once it was seen and paid: treasures change hands, lie anew, are delivered."""
        taken = []
        for index in range(len(self.treasures)):
            able = self.touches[:, :, index] & (self.holds == EMPTY)
            first = able & (able.cumsum(1) == 1)
            self.holds = torch.where(first, self.type_of[:, index : index + 1], self.holds)
            taken.append(first.any(1))
        away = torch.stack(taken, 1)
        fresh = FIELD * (2 * torch.rand(*away.shape, 2, device=self.world.device) - 1)
        self.type_of = torch.where(self.lies, self.type_of, self._new_types())
        place = torch.where(self.lies.unsqueeze(-1), positions(self.treasures), fresh)
        place = place.masked_fill(away.unsqueeze(-1), PARKED)
        self.lies = ~away
        for index, treasure in enumerate(self.treasures):
            treasure.state.pos = place[:, index].clone()
        delivered = (self.at_bank & self._held).any(-1)
        self.holds = self.holds.masked_fill(delivered, EMPTY)

    @property
    def _held(self) -> Tensor:
        """What each hunter holds, one-hot ``[B, H, K]`` bool."""
        return self.holds.unsqueeze(-1) == self._types

    # --- what is seen and paid -----------------------------------------------------------------------------------------------

    def post_step(self) -> None:
        """Look at the world: what follows for all agents is computed at once."""
        agents, hunters = positions(self.world.agents), len(self.hunters)
        apart = agents.unsqueeze(1) - agents.unsqueeze(2)
        to_treasure = positions(self.treasures).unsqueeze(1) - agents.unsqueeze(2)
        distance, treasure_distance = (torch.linalg.vector_norm(x, dim=-1) for x in (apart, to_treasure))
        self.touches = treasure_distance[:, :hunters] < HUNTER_RADIUS + TREASURE_RADIUS
        self.at_bank = distance[:, :hunters, hunters:] < HUNTER_RADIUS + BANK_RADIUS
        self._look(agents, apart, distance, to_treasure, treasure_distance)
        self._pay(agents, distance, treasure_distance)

    def _look(self, agents: Tensor, apart: Tensor, distance: Tensor, to_treasure: Tensor, treasure_distance: Tensor) -> None:
        batch, count, hunters = *distance.shape[:2], len(self.hunters)
        velocity, held = velocities(self.world.agents), self._held.to(agents.dtype)
        said = held.new_zeros(batch, count, 2 * len(self._types))
        said[:, :hunters, len(self._types) :] = held
        said[:, hunters:, : len(self._types)] = torch.eye(len(self._types), device=said.device)
        others = torch.cat([apart, torch.cat([velocity, said], -1).unsqueeze(1).expand(-1, count, -1, -1)], -1)
        oneself = torch.eye(count, dtype=torch.bool, device=agents.device)
        others = _by_distance(others, distance.masked_fill(oneself, -1))[:, :, 1:]
        types = (self.type_of.unsqueeze(-1) == self._types).to(agents.dtype)
        treasures = torch.cat([to_treasure, types.unsqueeze(1).expand(-1, count, -1, -1)], -1)
        if self.masks_parked:
            treasures = treasures.masked_fill(~self.lies[:, None, :, None], 0.0)
        treasures = _by_distance(treasures, treasure_distance)
        own, rest = torch.cat([agents, velocity], -1), torch.cat([others.flatten(2), treasures.flatten(2)], -1)
        self.hunter_sees = torch.cat([own[:, :hunters], held, rest[:, :hunters]], -1)
        self.bank_sees = torch.cat([own, rest], -1)[:, hunters:]

    def _pay(self, agents: Tensor, distance: Tensor, treasure_distance: Tensor) -> None:
        hunters, empty, held = len(self.hunters), self.holds == EMPTY, self._held
        collected = (self.touches & empty.unsqueeze(-1)).sum((1, 2))
        delivered = (self.at_bank & held).sum((1, 2))
        touched = (distance[:, :hunters, :hunters] < 2 * HUNTER_RADIUS).sum(-1) - 1
        nearest = treasure_distance[:, :hunters]
        if self.masks_parked:
            nearest = torch.where(self.lies.any(1)[:, None, None], nearest, 0.0)
        to_bank = distance[:, :hunters, hunters:]
        way = torch.where(empty, nearest.amin(-1), (to_bank * held).sum(-1))
        carriers = torch.where(held, to_bank, torch.inf).amin(1)
        gathered = agents[:, :hunters].mean(1, keepdim=True) - agents[:, hunters:]
        waits = torch.where(held.any(1), carriers, torch.linalg.vector_norm(gathered, dim=-1))
        team = PAID * (collected + delivered).unsqueeze(-1)
        self.paid = torch.cat([team - COLLISION * touched - SHAPING * way, team - SHAPING * waits], 1)

    def observation(self, agent: Agent) -> Tensor:
        """``[B, 86]`` of a hunter and ``[B, 84]`` of a bank, with the usual numbers of agents and treasures."""
        if agent in self.hunters:
            return self.hunter_sees[:, self.hunters.index(agent)]
        return self.bank_sees[:, self.banks.index(agent)]

    def reward(self, agent: Agent) -> Tensor:
        """``[B]``."""
        return self.paid[:, self.world.agents.index(agent)]

    # --- pictures ------------------------------------------------------------------------------------------------------------

    def colour(self, entity: Any, index: int) -> tuple[float, float, float] | None:
        """Banks, treasures and hunters that hold one have the colour of a type; empty hunters are grey."""
        if entity in self.banks:
            kind = self.banks.index(entity)
        elif entity in self.hunters:
            kind = int(self.holds[index, self.hunters.index(entity)])
        else:
            kind = int(self.type_of[index, self.treasures.index(entity)])
        return _EMPTY_COLOUR if kind == EMPTY else _COLOURS[kind % len(_COLOURS)]


_EMPTY_COLOUR = (0.55, 0.57, 0.6)
_COLOURS = ((0.18, 0.44, 0.69), (0.78, 0.45, 0.08), (0.16, 0.55, 0.35), (0.54, 0.31, 0.64))


def _by_distance(what: Tensor, distance: Tensor) -> Tensor:
    """``[B, N, M, F]`` in ascending order of ``[B, N, M]``; what is equally far stays in its order."""
    order = distance.sort(dim=-1, stable=True).indices
    return what.gather(2, order.unsqueeze(-1).expand_as(what))
