"""Merged resets: untouched rows stay as they are, reset rows are fresh, and what follows is what an unmerged world does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vmas")

from small_scenarios import OPTIONS
from vmas import make_env
from vmas.simulator.scenario import BaseScenario

from marlkit import rng
from marlkit.envs._vmas.reset_pool import ResetPool
from marlkit.envs._vmas.scenarios import scenario_names
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs._vmas.world_graph import survey
from marlkit.envs._vmas.world_state import restore_world, save_world

CPU = torch.device("cpu")


# Football's scripted players draw one number per environment in which some condition holds, so that what one environment
# draws depends on the others. Without them rows can be compared one by one.
WITHOUT_SHARED_DRAWS = {"football": {"disable_ai_red": True}}


def build(scenario: str, num_envs: int, options: dict[str, Any] | None = None) -> Simulation:
    options = OPTIONS.get(scenario, {}) if options is None else options
    return Simulation(scenario, num_envs, CPU, continuous=True, options=options)


def can_terminate(scenario: str) -> bool:
    return type(build(scenario, 1).scenario).done is not BaseScenario.done


def random_action(simulation: Simulation, generator: torch.Generator) -> Tensor:
    shape = (simulation.num_envs, *simulation.low.shape)
    return simulation.low + torch.rand(shape, generator=generator) * (simulation.high - simulation.low)


def contents(simulation: Simulation) -> dict[str, Tensor]:
    return {name: place.content.clone() for name, place in survey(simulation.scenario).tensors.items()}


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with rng.isolated(0), torch.no_grad():
        yield


def lived(simulation: Simulation, steps: int = 4) -> tuple[Simulation, Tensor]:
    """The simulation in the middle of an episode, and what its agents see."""
    generator = torch.Generator().manual_seed(1)
    observation = simulation.reset()
    for _ in range(steps):
        observation = simulation.advance(random_action(simulation, generator))[0]
    return simulation, observation


@pytest.mark.parametrize("scenario", scenario_names())
def test_untouched_rows_stay_bit_identical_and_reset_rows_are_the_twins(scenario: str) -> None:
    simulation, observation = lived(build(scenario, 6))
    fresh = ResetPool(partial(build, scenario), 6, seed=3)
    before, seen_before = contents(simulation), observation.clone()
    finished, others = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    fresh.take(simulation, finished, observation)
    after, twin = contents(simulation), survey(fresh.twin.scenario).tensors
    assert before.keys() == after.keys()
    assert torch.equal(observation[others], seen_before[others])
    touched = 0
    for name, tensor in after.items():
        axis = fresh.axes[name]
        if axis < 0:
            assert torch.equal(tensor, before[name]), name
            continue
        assert torch.equal(tensor.index_select(axis, others), before[name].index_select(axis, others)), name
        if axis == 0 and name in twin:
            assert torch.equal(tensor[finished], twin[name].content[:2]), name
            touched += 1
    assert touched > 10


@pytest.mark.parametrize("scenario", scenario_names())
def test_a_reset_row_goes_on_like_the_row_it_was_taken_from(scenario: str) -> None:
    """A second copy of the twin, into which nothing is ever merged, is stepped with the same actions."""
    make = partial(build, scenario, options=WITHOUT_SHARED_DRAWS.get(scenario))
    simulation, observation = lived(make(4))
    fresh = ResetPool(make, 4, seed=3)
    fresh.take(simulation, torch.tensor([0, 1]), observation)
    unmerged = make(4)
    unmerged.advance(unmerged.no_action())
    restore_world(unmerged.scenario, save_world(fresh.twin.scenario), CPU)
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        action = random_action(simulation, generator)
        with rng.isolated(11):
            merged = simulation.advance(action)
        with rng.isolated(11):
            plain = unmerged.advance(action)
        for one, other in zip(merged, plain, strict=True):
            torch.testing.assert_close(one[:2], other[:2], rtol=1e-4, atol=1e-5)


def test_what_a_batch_shares_is_not_drawn_anew_for_some_of_its_environments() -> None:
    """In `simple_speaker_listener` one landmark is the goal of the whole batch; the speaker sees its colour."""
    simulation, observation = lived(build("simple_speaker_listener", 3))
    colour = observation[0, 0, :3].clone()
    fresh = ResetPool(partial(build, "simple_speaker_listener"), 3, seed=3)
    drawn = set()
    for _ in range(12):
        fresh.take(simulation, torch.tensor([0, 1, 2]), observation)
        assert (observation[:, 0, :3] == colour).all()
        assert torch.equal(simulation.observation(), observation)
        drawn.add(tuple(build("simple_speaker_listener", 3).observation()[0, 0, :3].tolist()))
    assert len(drawn) == 3  # a whole reset does draw another goal


def statistics(observation: Tensor, marks: Tensor) -> Tensor:
    """Per agent and feature the mean, the mean square and the shares below three marks, of one group of environments."""
    below = (observation.unsqueeze(0) < marks.unsqueeze(1)).float().mean(1)
    return torch.stack([observation.mean(0), observation.square().mean(0), *below])


# Every whole reset is one group: some scenarios draw an order of walls or agents once for all environments of a reset.
GROUPS, GROUP = 40, 6


@pytest.mark.parametrize("scenario", [name for name in scenario_names() if can_terminate(name)])
def test_reset_rows_have_the_resets_distribution(scenario: str) -> None:
    """What the agents see in merged rows against what they see after VMAS' own resets, within five standard errors."""
    simulation, observation = lived(build(scenario, GROUP))
    fresh = ResetPool(partial(build, scenario), GROUP, seed=3)
    all_rows = torch.arange(GROUP)
    ours = []
    for _ in range(GROUPS):
        fresh.take(simulation, all_rows, observation)
        ours.append(observation.clone())
    reference = make_env(scenario.rpartition("/")[2], num_envs=GROUP, seed=0, **OPTIONS.get(scenario, {}))
    theirs = [torch.stack(reference.reset(), 1) for _ in range(GROUPS)]
    marks = torch.cat(theirs).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
    one, other = (torch.stack([statistics(group, marks) for group in groups]) for groups in (ours, theirs))
    error = ((one.var(0) + other.var(0)) / GROUPS).sqrt()
    assert ((one.mean(0) - other.mean(0)).abs() <= 5 * error + 1e-4).all()


@pytest.mark.parametrize("scenario", ["balance", "navigation", "passage"])
def test_reset_rows_have_the_distribution_of_resetting_one_by_one(scenario: str) -> None:
    simulation, observation = lived(build(scenario, 32))
    fresh = ResetPool(partial(build, scenario), 32, seed=3)
    ours, theirs = [], []
    reference = make_env(scenario, num_envs=2, seed=0, **OPTIONS.get(scenario, {}))
    for _ in range(100):
        # One row of each stock: rows of one whole reset may depend on one another.
        fresh.take(simulation, torch.arange(32), observation)
        ours.append(observation[:1].clone())
        theirs.append(torch.stack(reference.reset_at(1), 1)[1:])
    marks = torch.cat(theirs).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)
    one, other = (torch.stack([statistics(row, marks) for row in rows]) for rows in (ours, theirs))
    error = ((one.var(0) + other.var(0)) / 100).sqrt()
    assert ((one.mean(0) - other.mean(0)).abs() <= 5 * error + 1e-4).all()
