"""Recorded steps of every scenario: the same as steps, or refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vmas")

from small_scenarios import OPTIONS

from marlkit import keys, rng
from marlkit.component import Runtime
from marlkit.envs._vmas.branch_free import BranchFree
from marlkit.envs._vmas.recorded import RecordedSimulation
from marlkit.envs._vmas.scenarios import scenario_names
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs._vmas.world_graph import survey
from marlkit.envs.vmas import VmasEnvironment
from marlkit.errors import RecipeError
from marlkit.recipe import load_recipe
from marlkit.recorder.masked_rows import MaskedSelection
from marlkit.recorder.tape import NotRecordable
from marlkit.training.assembly import choose_compile

CPU = torch.device("cpu")
REFUSED = {
    "discovery": "rows that a mask selects",
    "football": "rows that a mask selects",
    "mpe/simple_world_comm": "rows that a mask selects",
    "road_traffic": "`scenario.observations.past_action_steering.pointer` is",
    "sampling": "hands a value to Python",
}
"""Scenarios whose steps cannot be recorded, and why."""


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Torch's default, which libraries switch off for the whole process: distributions look at the values given to them.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    with rng.isolated(0), torch.no_grad():
        yield


def simulation(scenario: str, num_envs: int = 3, continuous: bool = True) -> Simulation:
    with rng.isolated(1):
        return Simulation(scenario, num_envs, CPU, continuous=continuous, options=OPTIONS.get(scenario, {}))


def actions(of: Simulation, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    neutral = of.no_action()
    if neutral.is_floating_point():
        return [of.low + (of.high - of.low) * torch.rand(neutral.shape, generator=generator) for _ in range(steps)]
    sizes = torch.tensor(of.action_sizes)
    return [(torch.rand(neutral.shape, generator=generator) * sizes).long() for _ in range(steps)]


def settled(of: Simulation, action: Tensor) -> tuple[Tensor, ...]:
    """A step that computes every pair, and rows in full, without any recording."""
    with MaskedSelection(), BranchFree(of.scenario.world):
        return of.advance(action)


def state(of: Simulation) -> dict[str, Tensor]:
    return {name: place.content for name, place in survey(of.scenario).tensors.items()}


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


SCENARIOS = [
    pytest.param(name, marks=[] if number % 3 == 0 else pytest.mark.exhaustive) for number, name in enumerate(scenario_names())
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replays_are_steps(scenario: str) -> None:
    recorded, plain = simulation(scenario), simulation(scenario)
    stepping = RecordedSimulation(recorded, scenario, "record")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = played(recorded, stepping.advance)
    told = [warning for warning in told if "cannot be recorded" in str(warning.message)]
    if scenario in REFUSED:
        assert REFUSED[scenario] in stepping.reason
        assert len(told) == 1
        assert f"`{scenario}`" in str(told[0].message)
        same(found, played(plain, plain.advance))
        return
    assert not stepping.reason
    assert stepping.replays >= 4  # the others are first steps after a reset, of another kind
    expected = played(plain, plain.advance)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def played(of: Simulation, advance: Any) -> list[Any]:
    """Six steps with a reset before the last two: outcomes, state, and the generator's next number."""
    found: list[Any] = []
    with rng.isolated(4):
        for step, action in enumerate(actions(of, 6)):
            if step == 4:
                found.append(of.reset())
            found.append([part.clone() for part in advance(action)])
        return [*found, {name: content.clone() for name, content in state(of).items()}, torch.rand(1)]


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("scenario", ["balance", "navigation", "mpe/simple_tag", "give_way"])
def test_replays_are_steps_bit_for_bit_where_the_same_pairs_are_computed(scenario: str, continuous: bool) -> None:
    recorded, plain = simulation(scenario, 3, continuous), simulation(scenario, 3, continuous)
    stepping = RecordedSimulation(recorded, scenario, "record")
    for action in actions(recorded, 2):
        recorded.advance(action)
        plain.advance(action)
    for action in actions(recorded, 6):
        same(stepping.advance(action), settled(plain, action))
    assert stepping.replays == 6
    same(state(recorded), state(plain))


# --- questions and masks -----------------------------------------------------------------------------------------------------


def placed(scenario: str, positions: dict[int, list[list[float]]], **options: Any) -> Simulation:
    with rng.isolated(1):
        made = Simulation(scenario, 2, CPU, continuous=True, options=options)
    for agent, position in positions.items():
        made.agents[agent].set_pos(torch.tensor(position), batch_index=None)
    return made


@pytest.mark.parametrize("near", [True, False])
def test_a_scenarios_own_question_is_answered_for_the_batch(near: bool) -> None:
    """Navigation punishes nearness a little beyond contact, but only if some environment of the batch is in contact."""
    other = [0.0, 0.19] if near else [0.0, 0.9]
    places = {0: [[0.0, 0.0], [0.0, 0.0]], 1: [[0.0, 0.203], other]}
    plain, tested = (placed("navigation", places, n_agents=2, agent_radius=0.1, collisions=True) for _ in range(2))
    for of in (plain, tested):
        of.scenario.world.step = lambda: None  # no body moves
    action = plain.no_action()
    same(settled(tested, action), plain.advance(action))
    punished = plain.agents[0].agent_collision_rew.tolist()
    assert punished == ([-1.0, -1.0] if near else [0.0, 0.0])


def test_pairs_out_of_reach_everywhere_have_no_forces() -> None:
    """A line repels a little beyond its ends, where no pair is in reach: a step skips the pair, and so must a replay."""
    plain, tested = simulation("balance", 2), simulation("balance", 2)
    for of in (plain, tested):
        line, agent = of.scenario.line, of.agents[0]
        line.set_rot(torch.zeros(2, 1), batch_index=None)
        beyond = line.shape.length / 2 + agent.shape.radius + 0.003
        agent.set_pos(line.state.pos + torch.tensor([beyond, 0.0]), batch_index=None)
    action = plain.no_action()
    plain.advance(action)
    settled(tested, action)
    for one, other in zip(plain.scenario.world.entities, tested.scenario.world.entities, strict=True):
        torch.testing.assert_close(one.state.vel, other.state.vel, rtol=0, atol=1e-7)


def test_masked_rows_are_written_where_the_mask_is_true() -> None:
    mask, rows = torch.tensor([True, False, True]), torch.arange(6.0).view(3, 2)
    with MaskedSelection():
        rows[mask] += 1
        rows[~mask, 0] = rows[~mask, 0] * 10
        rows[mask] = torch.tensor([[5.0, 6.0]]) * 1
        rows[:, torch.tensor([False, True])] -= 1
    assert rows.tolist() == [[5.0, 5.0], [20.0, 2.0], [5.0, 5.0]]


@pytest.mark.parametrize("use", [lambda x, m: x[m].sum(), lambda x, m: x[m].shape, lambda x, m: len(x[m]), lambda x, m: x[m] + x])
def test_other_uses_of_masked_rows_are_refused(use: Any) -> None:
    with MaskedSelection(), pytest.raises(NotRecordable, match=r"test_vmas_recorded\.py"):
        use(torch.ones(3), torch.tensor([True, False, True]))


def test_rows_of_another_mask_are_refused() -> None:
    rows, mask = torch.ones(3), torch.tensor([True, False, True])
    with MaskedSelection(), pytest.raises(NotRecordable, match="where another does"):
        rows[mask] = rows[mask.clone()] * 2
    with MaskedSelection():
        chosen = rows[mask] * 2
        mask[1] = True
        with pytest.raises(NotRecordable, match="where another does"):
            rows[mask] = chosen


# --- changes between steps ---------------------------------------------------------------------------------------------------


def steady(scenario: str) -> tuple[Simulation, Simulation, RecordedSimulation, list[Tensor]]:
    """Two worlds after the same four steps, one of them recorded."""
    recorded, plain = simulation(scenario), simulation(scenario)
    stepping = RecordedSimulation(recorded, scenario, "record")
    todo = actions(recorded, 10)
    for action in todo[:4]:
        stepping.advance(action)
        plain.advance(action)
    return recorded, plain, stepping, todo[4:]


def test_what_a_user_changes_is_noticed() -> None:
    recorded, plain, stepping, todo = steady("navigation")
    for of in (recorded, plain):
        of.scenario.pos_shaping_factor = 7.0
    before = stepping.replays
    torch.testing.assert_close(stepping.advance(todo[0]), plain.advance(todo[0]))
    for of in (recorded, plain):
        of.agents[0].state.pos = of.agents[0].state.pos + 0.25  # another tensor
        of.agents[1].state.vel.mul_(0.5)  # in place
    torch.testing.assert_close(stepping.advance(todo[1]), plain.advance(todo[1]))
    assert stepping.replays == before + 2


def test_a_constant_that_changes_is_noticed() -> None:
    recorded, plain, stepping, todo = steady("balance")
    gravity = recorded.scenario.world._gravity
    for of in (recorded, plain):
        of.scenario.world._gravity.mul_(3)
    assert recorded.scenario.world._gravity is gravity
    with pytest.warns(UserWarning, match="cannot be recorded"):  # whether there is gravity decides in Python
        torch.testing.assert_close(stepping.advance(todo[0]), plain.advance(todo[0]))


def test_tensors_that_change_places() -> None:
    recorded, plain = simulation("mpe/simple"), simulation("mpe/simple")
    for of in (recorded, plain):
        held = vars(of.scenario)
        held |= {"first": torch.arange(3.0), "second": -torch.arange(3.0)}

        def swap(held: dict[str, Any] = held) -> None:
            held["first"], held["second"] = held["second"], held["first"]

        of.scenario.post_step = swap
    stepping = RecordedSimulation(recorded, "mpe/simple", "record")
    for action in actions(recorded, 5):
        same(stepping.advance(action), plain.advance(action))
        same((recorded.scenario.first, recorded.scenario.second), (plain.scenario.first, plain.scenario.second))
    assert stepping.replays >= 4


def test_actions_that_want_gradients_are_not_replayed() -> None:
    _, _, stepping, todo = steady("balance")
    before = stepping.replays
    with torch.enable_grad():
        stepping.advance(todo[0].requires_grad_())
    assert stepping.replays == before


# --- environments ------------------------------------------------------------------------------------------------------------


def environment(scenario: str, how: Any, num_envs: int = 5, max_steps: int | None = 9) -> VmasEnvironment:
    return VmasEnvironment(Runtime(CPU, 5, how), scenario=scenario, num_envs=num_envs, max_steps=max_steps)


def rolled(env: VmasEnvironment, todo: list[Tensor]) -> list[Tensor]:
    found = []
    for action in todo:
        arrived, current = env.step(action)
        found += [arrived[keys.OBSERVATION], arrived["agents", "reward"], arrived["done"], current[keys.OBSERVATION]]
    return found


def test_partial_resets_of_a_recorded_environment() -> None:
    found = []
    for how in ("record", "none"):
        with rng.isolated(3):
            env = environment("balance", how, 40, max_steps=None)
            env.reset()
            found.append(rolled(env, actions(env.simulation, 80)))
    ends = [int(done.sum()) for done in found[0][2::4]]
    assert any(0 < count < 40 for count in ends)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scenario", ["balance", "mpe/simple_reference"])
def test_a_recorded_run_continues_bit_for_bit(scenario: str) -> None:
    env = environment(scenario, "record")
    env.reset()
    todo = actions(env.simulation, 16)
    rolled(env, todo[:6])
    saved, drawn = env.state_dict(), rng.state()
    expected = rolled(env, todo[6:])
    rng.restore(drawn)
    resumed = environment(scenario, "record")
    resumed.load_state_dict(saved)
    same(rolled(resumed, todo[6:]), expected)
    rng.restore(drawn)
    env.load_state_dict(saved)  # the same environment, taken back
    same(rolled(env, todo[6:]), expected)


def test_a_graph_is_refused_without_a_gpu() -> None:
    recipe = load_recipe("mappo", ["trainer.compile=graph"])
    with pytest.raises(RecipeError, match=r"trainer\.compile.*record"):
        choose_compile(recipe, CPU)
    assert choose_compile(load_recipe("mappo"), CPU) == ("none", "record")
    assert choose_compile(load_recipe("mappo"), torch.device("cuda")) == ("none", "none")
    assert choose_compile(load_recipe("mappo", ["trainer.compile=record"]), torch.device("cuda")) == ("record", "record")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scenario", ["balance", "navigation", "mpe/simple_spread"])
def test_graphed_steps_are_steps(scenario: str) -> None:
    device = torch.device("cuda")
    with rng.isolated(1):
        graphed = Simulation(scenario, 8, device, continuous=True, options={})
    with rng.isolated(1):
        plain = Simulation(scenario, 8, device, continuous=True, options={})
    stepping = RecordedSimulation(graphed, scenario, "graph")
    for _ in range(6):
        action = plain.low + (plain.high - plain.low) * torch.rand(8, *plain.low.shape, device=device)
        torch.testing.assert_close(stepping.advance(action), plain.advance(action), rtol=1e-4, atol=1e-5)
    assert stepping.replays >= 4, stepping.reason
