"""VMAS adapter: every scenario steps as VMAS steps it, is saved and continued bit for bit, and refuses what does not fit."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("vmas")

from small_scenarios import OPTIONS
from vmas import make_env
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario

from marlkit import keys, rng
from marlkit.component import Runtime
from marlkit.envs._vmas.scenarios import scenario_files
from marlkit.envs.vmas import VmasEnvironment
from marlkit.errors import MarlkitError, OptionError
from marlkit.spec import Continuous

RUNTIME = Runtime(torch.device("cpu"), seed=5)


@pytest.fixture(autouse=True)
def _isolated() -> Any:
    with rng.isolated(0):
        yield


def create(scenario: str = "balance", num_envs: int = 4, **options: Any) -> VmasEnvironment:
    options.setdefault("scenario_options", OPTIONS.get(scenario))
    return VmasEnvironment(RUNTIME, scenario=scenario, num_envs=num_envs, **options)


def random_action(env: VmasEnvironment, generator: torch.Generator, stretch: float = 1.0) -> Tensor:
    """Uniform within the own bounds of every agent, times ``stretch``."""
    spec, batch = env.spec, (env.num_envs, env.spec.n_agents)
    if isinstance(spec.action, Continuous):
        low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
        return stretch * (low + (high - low) * torch.rand(*batch, spec.action.size, generator=generator))
    return (torch.rand(batch, generator=generator) * torch.tensor(spec.own_action_sizes)).long()


def for_vmas(env: VmasEnvironment, action: Tensor) -> list[Tensor]:
    """The same actions as VMAS takes them: a list with one tensor per agent, without padding."""
    if env.spec.discrete:
        return list(action.unsqueeze(-1).unbind(1))
    return [own[:, :size].clone() for own, size in zip(action.unbind(1), env.spec.own_action_sizes, strict=True)]


def check_observation(found: Tensor, vmas: list[Any]) -> None:
    for own, theirs in zip(found.unbind(1), vmas, strict=True):
        flat = torch.cat([theirs[key] for key in sorted(theirs)], 1) if isinstance(theirs, dict) else theirs
        assert torch.equal(own[:, : flat.shape[1]], flat)
        assert (own[:, flat.shape[1] :] == 0).all()


@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
@pytest.mark.parametrize("scenario", scenario_files())
def test_every_scenario_steps_bit_for_bit_as_vmas_does(scenario: str, continuous: bool) -> None:
    env = create(scenario, continuous_actions=continuous)
    name, options = scenario.rpartition("/")[2], OPTIONS.get(scenario, {})
    vmas = make_env(name, num_envs=4, continuous_actions=continuous, seed=5, **options)
    rng.seed_all(9)
    check_observation(env.reset()["agents", "observation"], vmas.reset(seed=9))
    drawn, generator = rng.state(), torch.Generator().manual_seed(1)
    for _ in range(6):
        action = random_action(env, generator)
        rng.restore(drawn)
        arrived, _ = env.step(action)
        drawn = rng.state()
        observation, reward, done, _ = vmas.step(for_vmas(env, action))
        check_observation(arrived["agents", "observation"], observation)
        assert torch.equal(arrived["agents", "reward"], torch.stack(reward, 1).reshape(4, -1, 1))
        assert torch.equal(arrived["terminated"], done.unsqueeze(-1))
        if done.any():
            break  # from here on VMAS waits to be told to reset, the adapter resets


@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
@pytest.mark.parametrize("scenario", ["balance", "mpe/simple_speaker_listener", "debug/diff_drive"])
def test_what_it_writes_has_the_declared_keys_shapes_and_types(scenario: str, continuous: bool) -> None:
    env = create(scenario, continuous_actions=continuous, max_steps=2)
    sizes = {**env.spec.sizes(), "1": 1}
    current = env.reset()
    arrived, following = env.step(random_action(env, torch.Generator()))
    afterwards = {keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE}
    for key in env.writes:
        info = keys.describe(key)
        shape = (4, *(sizes[dimension] for dimension in info.dimensions(discrete=env.spec.discrete)))
        own = key[1:] if key in afterwards else key
        for step in [arrived] if key in afterwards else [current, arrived, following]:
            assert step[own].shape == shape, key
            assert step[own].dtype == getattr(torch, info.dtype), key
    assert env.traits == env.spec.traits == {"continuous" if continuous else "discrete"}


def test_smaller_agents_are_padded_and_masked() -> None:
    env = create("simple_speaker_listener")
    current = env.reset()
    # The speaker moves (2) and says one of three words; the listener only moves. The speaker sees a colour (3).
    assert env.spec.own_action_sizes == (5, 2)
    assert env.spec.own_observation_sizes == (3, 11)
    assert current["agents", "action_dims"][0].tolist() == [[True] * 5, [True, True, False, False, False]]
    assert env.spec.action == Continuous(5, ((-1, -1, 0, 0, 0), (-1,) * 5), ((1,) * 5, (1,) * 5))
    assert (current["agents", "observation"][:, 0, 3:] == 0).all()
    discrete = create("simple_speaker_listener", continuous_actions=False)
    assert discrete.spec.own_action_sizes == (27, 9)
    assert discrete.reset()["agents", "action_mask"][2].sum(-1).tolist() == [27, 9]


def test_padding_of_an_action_has_no_effect_and_the_rest_is_clipped() -> None:
    generator = torch.Generator().manual_seed(3)
    one, other = (create("simple_speaker_listener") for _ in range(2))
    with rng.isolated(1):
        one.reset()
    with rng.isolated(1):
        other.reset()
    for _ in range(3):
        action = random_action(one, generator, stretch=3.0)
        inside = action.clamp(torch.tensor([[-1.0, -1, 0, 0, 0], [-1.0] * 5]), torch.tensor(1.0))
        inside[:, 1, 2:] = 0.7
        assert torch.equal(one.step(action)[0]["state"], other.step(inside)[0]["state"])


def test_time_limit_truncates_and_next_holds_the_state_before_the_reset() -> None:
    env = create("mpe/simple_spread", max_steps=3)
    assert env.spec.horizon == 3
    assert env.reset()["is_first"].all()
    still = torch.zeros(4, 3, 2)
    for step in range(1, 7):
        arrived, current = env.step(still)
        last = step % 3 == 0
        assert arrived["truncated"].all() == last == arrived["done"].all()
        assert not arrived["terminated"].any()
        assert not arrived["is_first"].any()
        assert bool(current["is_first"].all()) == last
        moved = (arrived["agents", "observation"] != current["agents", "observation"]).flatten(1).any(1)
        assert moved.all() == last


def test_the_scenario_terminates_and_only_the_finished_are_reset() -> None:
    """In `balance` an episode ends when the line or the package touches the ground: here whenever all run to the left."""
    env = create("balance", num_envs=16, max_steps=500)
    env.reset()
    ended = torch.zeros(16)
    run = torch.zeros(16, 3, 2)
    run[::2, :, 0] = -1.0  # the others stand still
    for _ in range(80):
        arrived, current = env.step(run)
        done = arrived["terminated"].squeeze(-1)
        same = (arrived["state"] == current["state"]).all(1)
        assert torch.equal(same, ~done)
        assert torch.equal(current["is_first"].squeeze(-1), done)
        assert not arrived["truncated"].any()
        ended += done
    assert (ended[::2] > 0).all()
    assert (ended == 0).any()


def test_terminated_is_not_truncated_at_the_same_step() -> None:
    env = create("balance", num_envs=8, max_steps=25)
    env.reset()
    for _ in range(60):
        arrived, _ = env.step(torch.zeros(8, 3, 2))
        assert not (arrived["terminated"] & arrived["truncated"]).any()
        assert torch.equal(arrived["done"], arrived["terminated"] | arrived["truncated"])


@pytest.mark.parametrize(("reward", "factor"), [("mean", 1 / 3), ("sum", 1.0)])
def test_pooled_rewards_are_the_teams(reward: Any, factor: float) -> None:
    pooled, own = (
        create("navigation", reward=reward, scenario_options={"n_agents": 3}),
        create("navigation", scenario_options={"n_agents": 3}),
    )
    assert pooled.spec.team_reward
    assert "team_reward" in pooled.traits
    assert not own.spec.team_reward
    generator = torch.Generator().manual_seed(0)
    with rng.isolated(1):
        pooled.reset()
    with rng.isolated(1):
        own.reset()
    action = random_action(own, generator)
    together, separate = (env.step(action)[0]["agents", "reward"] for env in (pooled, own))
    expected = factor * (separate[:, 0] + separate[:, 1] + separate[:, 2])
    torch.testing.assert_close(together, expected.unsqueeze(1).expand(-1, 3, -1))


def test_construction_is_seeded_and_leaves_the_global_generators_alone() -> None:
    before = rng.state()
    one, other = create("navigation"), create("navigation")
    after = rng.state()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert before["python"] == after["python"]
    for mine, theirs in zip(one.simulation.scenario.world.agents, other.simulation.scenario.world.agents, strict=True):
        assert torch.equal(mine.state.pos, theirs.state.pos)


def test_resets_draw_from_torchs_global_generator() -> None:
    env = create("navigation", max_steps=2)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        env.reset()
        torch.manual_seed(seed)
        states.append([env.step(torch.zeros(4, 4, 2))[1]["state"] for _ in range(2)][-1])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# --- saving ------------------------------------------------------------------------------------------------------------------

SAVED = [
    *("balance", "football", "road_traffic", "wind_flocking", "sampling", "discovery", "ball_passage"),
    *("debug/het_mass", "debug/drone", "debug/vel_control", "mpe/simple_reference", "debug/waterfall", "dropout"),
]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def future(env: VmasEnvironment, steps: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    seen = []
    with rng.isolated(21):
        for _ in range(steps):
            arrived, current = env.step(random_action(env, generator))
            seen += [*arrived.values(True, True), *current.values(True, True)]
    return [tensor.clone() for tensor in seen]


@pytest.mark.parametrize("scenario", SAVED)
def test_a_new_environment_continues_bit_for_bit_from_a_saved_one(scenario: str) -> None:
    env = create(scenario, max_steps=7)
    env.reset()
    staggered = env.state_dict()
    staggered["steps"] = torch.tensor([0, 2, 5, 3])
    env.load_state_dict(staggered)  # from now on the environments finish one by one, and the twin is in use
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        env.step(random_action(env, generator))
    saved = env.state_dict()
    assert saved["fresh"] is not None
    expected = future(env)
    again = create(scenario, max_steps=7)
    again.load_state_dict(through_a_file(saved))
    found = future(again)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_the_saved_state_does_not_change_afterwards() -> None:
    env = create("navigation", max_steps=4)
    env.reset()
    saved = env.state_dict()
    copy = through_a_file(saved)
    future(env)
    again = create("navigation", max_steps=4)
    again.load_state_dict(saved)
    future(again)
    for one, other in zip(saved["world"]["tensors"], copy["world"]["tensors"], strict=True):
        assert torch.equal(one, other)


def test_another_simulations_state_is_refused() -> None:
    state = create("navigation").state_dict()
    with pytest.raises(MarlkitError, match="4 environments of `navigation`, this one of 4 of `balance`"):
        create("balance").load_state_dict(state)
    with pytest.raises(MarlkitError, match="this one of 3 of `navigation`"):
        create("navigation", num_envs=3).load_state_dict(state)
    other = create("navigation", scenario_options={"n_agents": 2})
    with pytest.raises(MarlkitError, match="was it saved from another scenario, other options"):
        other.load_state_dict(state)


# --- bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "options", "option", "words"),
    [
        ("balanse", None, "scenario", "no scenario `balanse`. Did you mean `balance`?"),
        (
            "balance",
            {"n_agent": 4},
            "scenario_options.n_agent",
            "no option `n_agent`. Did you mean `n_agents`? It has: n_agents, package_mass",
        ),
        ("balance", {"n_agents": 1}, "scenario_options", "assert self.n_agents > 1"),
        ("navigation", {"n_agents": "many"}, "scenario_options", "TypeError"),
        ("os.path.Missing", None, "scenario", "cannot be imported"),
        ("collections.OrderedDict", None, "scenario", "must be a subclass of vmas.simulator.scenario.BaseScenario"),
    ],
)
def test_what_vmas_cannot_do_is_said(scenario: str, options: Any, option: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        create(scenario, scenario_options=options)
    assert caught.value.option == option
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("continuous", "action"),
    [
        (True, torch.zeros(4, 3)),
        (True, torch.zeros(4, 3, 2, dtype=torch.int64)),
        (True, torch.zeros(3, 3, 2)),
        (False, torch.zeros(4, 3)),
        (False, torch.zeros(4, 3, 9, dtype=torch.int64)),
    ],
)
def test_actions_of_a_wrong_shape_or_type_are_refused(continuous: bool, action: Tensor) -> None:
    env = create(continuous_actions=continuous)
    env.reset()
    with pytest.raises(MarlkitError, match=r"takes actions as .* = \[4, 3.*, got torch"):
        env.step(action)


class Remembering(BaseScenario):
    """One agent that drifts; what happened is remembered in several ways."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        world = World(batch_dim, device)
        world.add_agent(Agent("walker"))
        self.difficulty = 0
        self.table = torch.zeros(batch_dim, 3, device=device)
        self.view = self.table[:, 1]
        self.alias = {"table": self.table}
        self.per_environment = ["fresh"] * batch_dim if kwargs.pop("lists", False) else []
        self.pairs = torch.zeros(batch_dim, batch_dim) if kwargs.pop("pairs", False) else None
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        assert env_index is None
        batch = self.world.batch_dim
        self.table[:] = self.difficulty + torch.rand(batch, 3)
        self.world.agents[0].set_pos(torch.rand(batch, 2), batch_index=None)

    def observation(self, agent: Agent) -> dict[str, Tensor]:
        return {"b": self.table, "a": agent.state.pos}

    def reward(self, agent: Agent) -> Tensor:
        self.view += 1
        if not hasattr(self, "late"):
            self.late = torch.zeros(self.world.batch_dim)
        self.late = self.late + 1
        return agent.state.pos[:, 0]

    def done(self) -> Tensor:
        return self.late == torch.arange(len(self.late))


OWN = f"{__name__}.Remembering"


def own_scenario(**options: Any) -> VmasEnvironment:
    return VmasEnvironment(RUNTIME, scenario=OWN, num_envs=6, scenario_options=options)


def test_shared_memory_survives_a_merge_and_dicts_are_flattened_in_the_order_of_their_keys() -> None:
    env = own_scenario()
    env.reset()
    scenario = env.simulation.scenario
    for step in range(1, 5):
        before = scenario.table.clone()
        arrived, current = env.step(torch.zeros(6, 1, 2))
        assert arrived["terminated"].flatten().tolist() == [row == step for row in range(6)] or step > 1
        assert scenario.alias["table"] is scenario.table
        assert scenario.view.data_ptr() == scenario.table[:, 1].data_ptr()
        done = arrived["done"].squeeze(-1)
        assert torch.equal(scenario.table[~done][:, 1], before[~done][:, 1] + 1)
        assert (scenario.table[done] < 1).all()
        seen = torch.cat([scenario.world.agents[0].state.pos, scenario.table], 1)
        assert torch.equal(current["agents", "observation"][:, 0], seen)


def test_what_the_user_changes_for_all_environments_holds_for_the_fresh_ones() -> None:
    env = own_scenario()
    env.reset()
    env.simulation.scenario.difficulty = 100
    arrived, current = env.step(torch.zeros(6, 1, 2))
    assert arrived["done"].flatten().tolist() == [False, True, False, False, False, False]
    assert ((env.simulation.scenario.table[:, 0] >= 100) == arrived["done"].squeeze(-1)).all()
    assert (current["agents", "observation"][1, 0, 2:] >= 100).all()


@pytest.mark.parametrize(("option", "name"), [("lists", "scenario.per_environment"), ("pairs", "scenario.pairs")])
def test_state_without_separable_rows_is_refused_by_name(option: str, name: str) -> None:
    with pytest.raises(MarlkitError, match=name):
        own_scenario(**{option: True})


def test_a_picture_of_an_environment() -> None:
    env = create("navigation")
    env.reset()
    picture = env.draw(2)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    env.step(torch.ones(4, 4, 2))
    assert env.draw(2).shape == picture.shape
    assert not np.array_equal(env.draw(2), picture)
