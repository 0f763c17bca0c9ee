"""Rover-Tower and Cooperative Treasure Collection once more: one environment, float64, loops, written from the rules alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
MOVES = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=np.float64)


@dataclass
class Body:
    """A disc."""

    position: Vector
    radius: float
    mass: float = 1.0
    collides: bool = True
    velocity: Vector = field(default_factory=lambda: np.zeros(2))


def one_hot(index: int | None, size: int) -> list[float]:
    return [float(index == other) for other in range(size)]


def length(vector: Vector) -> float:
    return float(np.sqrt(vector[0] ** 2 + vector[1] ** 2))


def move(bodies: list[Body], moves: list[int]) -> None:
    """One step of the physics."""
    forces = []
    for one, chosen in zip(bodies, moves, strict=True):
        force = one.mass * 1.5 * 1.5 * MOVES[chosen]
        for other in bodies:
            if other is one or not (one.collides and other.collides):
                continue
            delta = one.position - other.position
            inside = np.logaddexp(0.0, -(length(delta) - one.radius - other.radius) / 1e-3) * 1e-3
            force = force + other.mass / one.mass * 100.0 * delta / length(delta) * inside
        forces.append(force)
    for body, force in zip(bodies, forces, strict=True):
        body.velocity = body.velocity * (1 - 0.25) + force / body.mass * 0.1
        if length(body.velocity) > 1.0:
            body.velocity = body.velocity / length(body.velocity)
        body.position = body.position + body.velocity * 0.1


class RoverTower:
    """Four pairs; ``tower_of`` and ``goal_of`` name the tower and the goal of each rover."""

    def __init__(self, rovers: Vector, landmarks: Vector, tower_of: list[int], goal_of: list[int]) -> None:
        self.rovers = [Body(place, 0.075, collides=False) for place in rovers]
        self.landmarks = landmarks
        self.tower_of, self.goal_of = tower_of, goal_of
        self.said = [np.zeros(5) for _ in rovers]

    def step(self, actions: list[int]) -> list[float]:
        """The rewards of rovers and towers."""
        move(self.rovers, actions[:4])
        self.said = [np.eye(5)[word] for word in actions[4:]]
        paid = []
        for rover, goal in zip(self.rovers, self.goal_of, strict=True):
            squared = length(rover.position - self.landmarks[goal]) ** 2
            paid.append(-squared + (10.0 if squared < 1.5 * (0.075 + 0.04) else 0.0))
        return paid + [paid[self.tower_of.index(tower)] for tower in range(4)]

    def observations(self) -> list[list[float]]:
        """What rovers and towers see."""
        seen = []
        for rover, tower in zip(self.rovers, self.tower_of, strict=True):
            seen.append([*one_hot(tower, 4), *self.said[tower], *rover.position, *rover.velocity])
        for tower in range(4):
            own = self.tower_of.index(tower)
            place, goal = self.rovers[own].position, self.landmarks[self.goal_of[own]]
            seen.append([*one_hot(own, 4), *place, *goal])
        return seen


@dataclass
class Treasure:
    """What hunters look for."""

    position: Vector
    kind: int
    lies: bool = True


class TreasureCollection:
    """Six hunters, two banks."""

    def __init__(self, agents: Vector, treasures: Vector, kinds: list[int]) -> None:
        self.hunters = [Body(place, 0.05) for place in agents[:6]]
        self.banks = [Body(place, 0.075, 2.25) for place in agents[6:]]
        self.treasures = [Treasure(place, kind) for place, kind in zip(treasures, kinds, strict=True)]
        self.holds: list[int | None] = [None] * 6

    def step(self, actions: list[int]) -> list[float]:
        """The rewards of hunters and banks; what follows from the step is left to :meth:`settle`."""
        move([*self.hunters, *self.banks], actions)
        team = 0.0
        for hunter, held in zip(self.hunters, self.holds, strict=True):
            if held is None:
                team += 5.0 * sum(self._reaches(hunter, treasure) for treasure in self.treasures)
            else:
                team += 5.0 * self._at_bank(hunter, held)
        return [team + self._hunter(index) for index in range(6)] + [team + self._bank(kind) for kind in range(2)]

    def _hunter(self, index: int) -> float:
        hunter, held = self.hunters[index], self.holds[index]
        others = [other for other in self.hunters if other is not hunter]
        bumps = sum(length(hunter.position - other.position) < 0.1 for other in others)
        if held is None:
            way = min(length(hunter.position - treasure.position) for treasure in self.treasures)
        else:
            way = length(hunter.position - self.banks[held].position)
        return -5.0 * bumps - 0.1 * way

    def _bank(self, kind: int) -> float:
        bank = self.banks[kind]
        carriers = [hunter for hunter, held in zip(self.hunters, self.holds, strict=True) if held == kind]
        if carriers:
            return -0.1 * min(length(hunter.position - bank.position) for hunter in carriers)
        return -0.1 * length(np.mean([hunter.position - bank.position for hunter in self.hunters], 0))

    @staticmethod
    def _reaches(hunter: Body, treasure: Treasure) -> bool:
        return length(hunter.position - treasure.position) < 0.05 + 0.025

    def _at_bank(self, hunter: Body, kind: int) -> bool:
        return length(hunter.position - self.banks[kind].position) < 0.05 + 0.075

    def settle(self, places: Vector, kinds: list[int]) -> tuple[int, int, int]:
        """Treasures change hands; those that were away lie at ``places`` with ``kinds``.

        Returns how many were taken, came and were delivered.
        """
        taken = came = delivered = 0
        for index, treasure in enumerate(self.treasures):
            if not treasure.lies:
                treasure.position, treasure.kind, treasure.lies = places[index], kinds[index], True
                came += 1
                continue
            for number, hunter in enumerate(self.hunters):
                if self.holds[number] is None and self._reaches(hunter, treasure):
                    self.holds[number], treasure.lies = treasure.kind, False
                    treasure.position = np.array([-999.0, -999.0])
                    taken += 1
                    break
        for number, hunter in enumerate(self.hunters):
            held = self.holds[number]
            if held is not None and self._at_bank(hunter, held):
                self.holds[number] = None
                delivered += 1
        return taken, came, delivered

    def observations(self) -> list[list[float]]:
        """What hunters and banks see, a treasure that is away at about -1,000."""
        agents = [*self.hunters, *self.banks]
        said = [[0.0, 0.0, *one_hot(held, 2)] for held in self.holds] + [[*one_hot(kind, 2), 0.0, 0.0] for kind in range(2)]
        seen = []
        for index, agent in enumerate(agents):
            own = [*agent.position, *agent.velocity]
            if index < 6:
                own += one_hot(self.holds[index], 2)
            others = [other for other in range(8) if other != index]
            for other in sorted(others, key=lambda other: length(agents[other].position - agent.position)):
                own += [*(agents[other].position - agent.position), *agents[other].velocity, *said[other]]
            for treasure in sorted(self.treasures, key=lambda treasure: length(treasure.position - agent.position)):
                own += [*(treasure.position - agent.position), *one_hot(treasure.kind, 2)]
            seen.append(own)
        return seen
