"""The physics of the multi-agent particle environments (Lowe et al. 2017), for scenarios that were published with it.

VMAS has a physics of its own: another drag, another contact force, velocities that are limited elsewhere. Returns that were
published for the particle environments can only be compared with play in theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vmas.simulator.core import Agent, Landmark, Sphere, World

STEP = 0.1
"""Seconds per step."""
KEPT = 0.75
"""What drag leaves of a velocity at each step."""
FASTEST = 1.0
"""The highest speed."""
ACCELERATION = 2.25
"""Of an action at its bound: the sources multiply it by 1.5 twice."""
CONTACT_FORCE, CONTACT_MARGIN = 100.0, 1e-3
"""Strength and softness of a contact."""
TINY = 1e-12
"""In place of a distance of 0."""


class ParticleWorld(World):
    """Discs on an unbounded plane.

    For the agents that move, with ``u`` the action and ``F`` the contacts,

        v <- 0.75 v + (2.25 u + F / m) 0.1,  at most 1 long,   x <- x + 0.1 v,

    and for each pair of agents of which both collide, at distance ``d`` and with radii that add up to ``r``,

        F_i = (m_j / m_i) · 100 · (x_i - x_j) / d · 0.001 · softplus((r - d) / 0.001).

    Forces are those of the positions before the step. Then agents that speak have said what they say.
    """

    def __init__(self, num_envs: int, device: torch.device, words: int = 0) -> None:
        super().__init__(num_envs, device, dt=STEP, drag=1 - KEPT, dim_c=words)

    def add_agent(self, agent: Agent) -> None:
        """Add an agent whose dynamics are holonomic, or static where it does not move."""
        super().add_agent(agent)
        moving = [one for one in self.agents if one.movable]
        self.moving = moving
        self._mass = torch.tensor([one.mass for one in moving], device=self.device).unsqueeze(-1)
        self._radius = torch.tensor([one.shape.radius for one in moving], device=self.device)
        self._collides = torch.tensor([one.collide for one in moving], device=self.device)
        self._contacts = sum(one.collide for one in moving) > 1

    def step(self) -> None:
        """One step of all environments."""
        position, velocity = positions(self.moving), velocities(self.moving)
        force = torch.stack([agent.state.force for agent in self.moving], 1)
        if self._contacts:
            force = force + self._contact_forces(position)
        velocity = KEPT * velocity + force / self._mass * STEP
        speed = torch.linalg.vector_norm(velocity, dim=-1, keepdim=True)
        velocity = velocity / (speed / FASTEST).clamp(min=1)
        position = position + STEP * velocity
        # A tensor each: what shares memory with others costs resets and recorded steps more than the copy.
        for index, agent in enumerate(self.moving):
            agent.state.pos, agent.state.vel = position[:, index].clone(), velocity[:, index].clone()
        for agent in self.agents:
            if not agent.silent:
                agent.state.c = agent.action.c

    def _contact_forces(self, position: Tensor) -> Tensor:
        """``[B, M, 2]``. An agent is at distance 0 from itself, and so pushes itself nowhere."""
        apart = position.unsqueeze(2) - position.unsqueeze(1)
        distance = torch.linalg.vector_norm(apart, dim=-1)
        inside = (self._radius.unsqueeze(1) + self._radius - distance) / CONTACT_MARGIN
        strength = CONTACT_FORCE * CONTACT_MARGIN * torch.logaddexp(inside, torch.zeros_like(inside))
        strength = strength * self._collides * self._collides.unsqueeze(1) * (self._mass.squeeze(-1) / self._mass)
        return ((strength / distance.clamp(min=TINY)).unsqueeze(-1) * apart).sum(2)


def mover(name: str, radius: float, mass: float = 1.0, collide: bool = True) -> Agent:
    """An agent that moves: its action is an acceleration in both dimensions."""
    force = {"u_range": 1.0, "u_multiplier": ACCELERATION * mass}
    return Agent(name, Sphere(radius), rotatable=False, collide=collide, mass=mass, max_speed=FASTEST, **force)


def place(name: str, radius: float) -> Landmark:
    """A place or thing that is nobody's obstacle."""
    return Landmark(name, Sphere(radius), collide=False)


DIRECTIONS = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
"""The discrete actions of an agent that moves: to stay, right, left, up, down."""


def positions(entities: Sequence[Any]) -> Tensor:
    """Where they are, ``[B, M, 2]``."""
    return torch.stack([entity.state.pos for entity in entities], 1)


def velocities(entities: Sequence[Any]) -> Tensor:
    """How fast they are, ``[B, M, 2]``."""
    return torch.stack([entity.state.vel for entity in entities], 1)


def spread(world: World, entities: Sequence[Any], reach: float, index: int | None) -> None:
    """Put entities anywhere in ``[-reach, reach]²``, in all environments or in one of them."""
    count = world.batch_dim if index is None else 1
    drawn = reach * (2 * torch.rand(len(entities), count, 2, device=world.device) - 1)
    for entity, where in zip(entities, drawn, strict=True):
        entity.set_pos(where.clone(), batch_index=index)


def drawn_anew(old: Tensor, new: Tensor, index: int | None) -> Tensor:
    """``new`` ``[B, …]``, or ``old`` with the row ``index`` of the new one."""
    if index is None:
        return new
    chosen = torch.arange(len(old), device=old.device) == index
    return torch.where(chosen.view(-1, *([1] * (old.dim() - 1))), new, old)


def refuse_too_few(**numbers: Any) -> None:
    """Check that there is at least one of everything.

    Raises:
        ValueError: a number is none, or below 1.
    """
    for option, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{option} must be a whole number, at least 1, got {number!r}")
