"""Rover-Tower: pairs of a blind rover and an immobile tower that tells it where to go.

Iqbal and Sha 2019, "Actor-Attention-Critic for Multi-Agent Reinforcement Learning", arXiv:1810.02912, section 4.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vmas.simulator.core import Agent, Sphere
from vmas.simulator.dynamics.static import Static
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import Color, ScenarioUtils

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

RADIUS, LANDMARK_RADIUS = 0.075, 0.04
REACHED = 1.5 * (RADIUS + LANDMARK_RADIUS)
"""The sources compare the *squared* distance to the goal with this."""
BONUS = 10.0


class Scenario(BaseScenario):
    """Rovers move and see nothing but themselves; towers see their rover and its goal and speak.

    Each episode pairs rovers and towers at random and draws a goal for each pair from the landmarks, which several pairs may
    share. A rover observes which tower is its own (one-hot), what this said in the step before (zeros at first), its own position
    and velocity. A tower observes which rover is its own, where this is, and where its goal is. Both members of a pair are paid

        -d² + 10 [d² < 0.1725],

    with ``d`` the distance of rover and goal. Nothing collides, and no episode terminates: 25 steps are usual.

    Options: ``n_pairs`` (4), ``n_landmarks`` (6), ``n_words`` (5).
    """

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> ParticleWorld:
        """The world, before its first reset."""
        self.n_pairs: int = kwargs.pop("n_pairs", 4)
        n_landmarks: int = kwargs.pop("n_landmarks", 6)
        words: int = kwargs.pop("n_words", 5)
        ScenarioUtils.check_kwargs_consumed(kwargs)
        refuse_too_few(n_pairs=self.n_pairs, n_landmarks=n_landmarks, n_words=words)
        world = ParticleWorld(batch_dim, device, words)
        self.rovers = [mover(f"rover_{pair}", RADIUS, collide=False) for pair in range(self.n_pairs)]
        self.towers = [
            Agent(
                f"tower_{pair}",
                Sphere(RADIUS),
                movable=False,
                rotatable=False,
                collide=False,
                silent=False,
                dynamics=Static(),
                color=Color.GRAY,
            )
            for pair in range(self.n_pairs)
        ]
        self.goals = [place(f"landmark_{index}", LANDMARK_RADIUS) for index in range(n_landmarks)]
        for agent in (*self.rovers, *self.towers):
            world.add_agent(agent)
        for landmark in self.goals:
            world.add_landmark(landmark)
        self.tower_of = self.goal_of = torch.zeros(batch_dim, self.n_pairs, dtype=torch.int64, device=device)
        self._one_of = torch.eye(self.n_pairs, device=device)
        return world

    def discrete_actions(self, agent: Agent) -> Tensor:
        """A rover stays or moves along an axis, a tower says a word: ``[actions, forces + words]``."""
        if agent.movable:
            return torch.tensor(DIRECTIONS, device=self.world.device)
        return torch.eye(self.world.dim_c, device=self.world.device)

    def reset_world_at(self, env_index: int | None = None) -> None:
        """Draw positions, pairs and goals."""
        spread(self.world, self.world.entities, 1.0, env_index)
        shape, device = (self.world.batch_dim, self.n_pairs), self.world.device
        self.tower_of = drawn_anew(self.tower_of, torch.rand(shape, device=device).argsort(1), env_index)
        self.goal_of = drawn_anew(self.goal_of, torch.randint(len(self.goals), shape, device=device), env_index)
        self.post_step()

    def post_step(self) -> None:
        """Look at the world: what follows for all agents is computed at once."""
        rover, goal = positions(self.rovers), _of(positions(self.goals), self.goal_of)
        said = _of(torch.stack([tower.state.c for tower in self.towers], 1), self.tower_of)
        rover_of = self.tower_of.argsort(1)
        own_tower, own_rover = self._one_of[self.tower_of], self._one_of[rover_of]
        squared = (rover - goal).square().sum(-1)
        paid = BONUS * (squared < REACHED) - squared
        self.rover_sees = torch.cat([own_tower, said, rover, velocities(self.rovers)], -1)
        self.tower_sees = torch.cat([own_rover, _of(rover, rover_of), _of(goal, rover_of)], -1)
        self.paid = torch.cat([paid, paid.gather(1, rover_of)], 1)

    def observation(self, agent: Agent) -> Tensor:
        """``[B, 13]`` of a rover and ``[B, 8]`` of a tower, with the usual numbers of pairs and words."""
        if agent.movable:
            return self.rover_sees[:, self.rovers.index(agent)]
        return self.tower_sees[:, self.towers.index(agent)]

    def reward(self, agent: Agent) -> Tensor:
        """``[B]``."""
        return self.paid[:, self.world.agents.index(agent)]

    def links(self, index: int) -> list[tuple[Any, Any]]:
        """What pictures join: each rover with its goal and its tower."""
        pairs = zip(self.rovers, self.goal_of[index].tolist(), self.tower_of[index].tolist(), strict=True)
        return [link for rover, goal, tower in pairs for link in ((rover, self.goals[goal]), (rover, self.towers[tower]))]


def _of(what: Tensor, index: Tensor) -> Tensor:
    """Rows of ``[B, M, F]`` by indices ``[B, P]``: ``[B, P, F]``."""
    return what.gather(1, index.unsqueeze(-1).expand(-1, -1, what.shape[-1]))
