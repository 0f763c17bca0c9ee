"""Rover-Tower and Cooperative Treasure Collection: equal to a second program, and to what was published of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vmas")

from particle_games import RoverTower, TreasureCollection

from benchmarks.particle_games import PLAYS, greedy_hunters, returns
from marlkit import rng
from marlkit.component import Runtime
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs.vmas import VmasEnvironment
from marlkit.errors import OptionError
from marlkit.spec import Continuous
from marlkit.testing import check_environment

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, seed=3)
NAMES = ("rover_tower", "treasure_collection")


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with rng.isolated(0), torch.no_grad():
        yield


def simulation(scenario: str, num_envs: int = 4, **options: Any) -> Simulation:
    made = Simulation(scenario, num_envs, CPU, continuous=False, options=options)
    made.reset()
    return made


def in_double(of: Simulation) -> Any:
    """The scenario with its positions, velocities, masses and radii in double precision."""
    world = of.scenario.world
    world._radius = torch.tensor([agent.shape.radius for agent in world.moving], dtype=torch.float64)
    world._mass = world._mass.double()
    for entity in world.entities:
        entity.state._pos, entity.state._vel = entity.state.pos.double(), entity.state.vel.double()
    return of.scenario


def places(entities: Any, row: int) -> Any:
    return np.stack([entity.state.pos[row].double().numpy() for entity in entities])


def seen_and_paid(scenario: Any, row: int) -> tuple[list[Any], list[float]]:
    agents = scenario.world.agents
    seen = [scenario.observation(agent)[row].tolist() for agent in agents]
    return seen, [float(scenario.reward(agent)[row]) for agent in agents]


def act(of: Simulation, action: Tensor, before_physics: Any = None) -> None:
    """A step of the simulation, of which its own outcome in single precision is not read."""
    of._act(action)
    for agent in of.agents:
        of.scenario.env_process_action(agent)
    of.scenario.pre_step()
    if before_physics is not None:
        before_physics()
    of.scenario.world.step()
    of.scenario.post_step()


def same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_rover_tower_is_played_as_by_the_second_program() -> None:
    batch = simulation("rover_tower")
    scenario = in_double(batch)
    scenario.post_step()
    games = [
        RoverTower(
            places(scenario.rovers, row),
            places(scenario.goals, row),
            tower_of=scenario.tower_of[row].tolist(),
            goal_of=scenario.goal_of[row].tolist(),
        )
        for row in range(batch.num_envs)
    ]
    bonuses = 0
    for row, game in enumerate(games):
        same(seen_and_paid(scenario, row)[0], game.observations())
    for _ in range(25):
        action = torch.randint(5, (batch.num_envs, 8))
        act(batch, action)
        for row, game in enumerate(games):
            paid = game.step(action[row].tolist())
            seen, found = seen_and_paid(scenario, row)
            same(seen, game.observations())
            same(found, paid)
            bonuses += sum(reward > 0 for reward in paid)
    assert bonuses > 20


@pytest.mark.parametrize("parked", ["raw", "masked"])
def test_treasure_collection_is_played_as_by_the_second_program(parked: str) -> None:
    batch = simulation("treasure_collection", 5, parked=parked)
    scenario = in_double(batch)
    for entity in scenario.world.entities:  # near the middle, so that they meet
        entity.state.pos = 0.35 * entity.state.pos
    games = [
        TreasureCollection(places(scenario.world.agents, row), places(scenario.treasures, row), scenario.type_of[row].tolist())
        for row in range(batch.num_envs)
    ]
    happened = np.zeros(3, dtype=int)
    contacts = away = 0

    def settle() -> None:
        for row, game in enumerate(games):
            nonlocal happened
            happened = happened + game.settle(places(scenario.treasures, row), scenario.type_of[row].tolist())

    for step in range(40):
        action = torch.randint(5, (batch.num_envs, 8))
        if step % 2:
            action[:, :6] = greedy_hunters(scenario)
        act(batch, action, settle if step else None)
        for row, game in enumerate(games):
            paid = game.step(action[row].tolist())
            seen, found = seen_and_paid(scenario, row)
            wanted = game.observations()
            if parked == "masked":
                gone = sum(not treasure.lies for treasure in game.treasures)
                away += gone
                wanted = [own[: len(own) - 4 * gone] + [0.0] * 4 * gone for own in wanted]
            same(seen, wanted)
            same(found, paid)
            contacts += sum(reward < -3 for reward in paid)
    assert (happened > 5).all(), happened
    assert contacts > 20
    assert away > 5 or parked == "raw"


def test_nothing_that_is_touched_at_the_start_is_taken_unpaid() -> None:
    batch = simulation("treasure_collection", 3)
    scenario = batch.scenario
    scenario.treasures[0].state.pos = scenario.hunters[0].state.pos.clone()
    act(batch, torch.zeros(3, 8, dtype=torch.int64))
    assert scenario.lies.all()
    assert (scenario.paid > 0).all()
    act(batch, torch.zeros(3, 8, dtype=torch.int64))
    assert not scenario.lies[:, 0].any()


def test_a_reset_of_one_environment_leaves_the_others() -> None:
    for name in NAMES:
        batch = simulation(name, 3)
        for _ in range(8):
            batch.advance(torch.randint(5, (3, 8)))
        before = batch.observation()
        batch.scenario.env_reset_world_at(1)
        after = batch.observation()
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])


# --- what was published ------------------------------------------------------------------------------------------------------


PUBLISHED = {
    "rover_tower": {"no-op": -4.9, "random": -7.6, "greedy": 132.0},
    "treasure_collection": {"no-op": -4.9, "random": -2.0, "greedy": 123.0},
}
"""Mean return per agent by an independent program: 20,000 episodes of the first game, 400 of the second."""


@pytest.mark.parametrize("play", PLAYS)
@pytest.mark.parametrize("name", NAMES)
def test_returns_of_scripted_play_are_those_of_an_independent_program(name: str, play: str) -> None:
    episodes, theirs = (1500, 20_000) if name == "rover_tower" else (100, 400)
    found = returns(simulation(name, episodes), play).mean(1)
    error = float(found.std()) * (1 / episodes + 1 / theirs) ** 0.5
    assert abs(float(found.mean()) - PUBLISHED[name][play]) < 4 * error + 0.05, (found.mean(), error)


def test_the_return_of_rovers_that_stay_is_the_exact_one() -> None:
    """-E d² + 10 P(d² < 0.1725), 25 times, of two points that are uniform in a square of side 2."""
    found = returns(simulation("rover_tower", 3000), "no-op").mean(1)
    reach = (1.5 * 0.115) ** 0.5 / 2
    near = np.pi * reach**2 - 8 / 3 * reach**3 + reach**4 / 2
    exact = 25 * (10 * near - 4 / 3)
    assert exact == pytest.approx(-5.2, abs=0.01)
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / 3000**0.5


# --- as an environment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "continuous"), [("rover_tower", True), *((name, False) for name in NAMES)])
def test_rules_of_environments(name: str, continuous: bool) -> None:
    def build(runtime: Runtime) -> VmasEnvironment:
        return VmasEnvironment(runtime, scenario=name, num_envs=3, max_steps=5, continuous_actions=continuous)

    check_environment(build, steps=12)


def test_sizes() -> None:
    rovers = VmasEnvironment(RUNTIME, scenario="rover_tower", num_envs=2, continuous_actions=False).spec
    assert rovers.own_observation_sizes == (13,) * 4 + (8,) * 4
    assert rovers.own_action_sizes == (5,) * 8
    hunters = VmasEnvironment(RUNTIME, scenario="treasure_collection", num_envs=2, continuous_actions=False).spec
    assert hunters.own_observation_sizes == (86,) * 6 + (84,) * 2
    assert hunters.own_action_sizes == (5,) * 8
    other = {"n_hunters": 3, "n_banks": 1, "n_treasures": 2}
    spec = VmasEnvironment(RUNTIME, scenario="treasure_collection", num_envs=2, scenario_options=other).spec
    assert spec.own_observation_sizes == (4 + 1 + 3 * 6 + 2 * 3,) * 3 + (4 + 3 * 6 + 2 * 3,)
    continuous = VmasEnvironment(RUNTIME, scenario="rover_tower", num_envs=2, scenario_options={"n_words": 3}).spec
    assert continuous.own_action_sizes == (2,) * 4 + (3,) * 4
    assert isinstance(continuous.action, Continuous)


def test_options_that_cannot_be() -> None:
    with pytest.raises(OptionError, match="masked or raw"):
        simulation("treasure_collection", parked="shown")
    with pytest.raises(OptionError, match="n_pair"):
        simulation("rover_tower", n_pair=2)
    with pytest.raises(OptionError, match="at least 1"):
        simulation("treasure_collection", n_banks=0)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_what_is_going_on(name: str) -> None:
    env = VmasEnvironment(RUNTIME, scenario=name, num_envs=2, continuous_actions=False)
    env.reset()
    first = env.draw(1)
    for _ in range(5):
        env.step(torch.ones(2, 8, dtype=torch.int64))
    assert first.shape == env.draw(1).shape
    assert (first != env.draw(1)).any()
