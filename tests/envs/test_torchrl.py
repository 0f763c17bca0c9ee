"""TorchRL adapter, against TorchRL's own VMAS wrapper and against counters whose every number is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

pytest.importorskip("torchrl")

from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from marlkit import keys, rng
from marlkit.component import Runtime
from marlkit.envs._factory import check
from marlkit.envs.torchrl import TorchrlEnvironment
from marlkit.errors import MarlkitError, OptionError
from marlkit.spec import Continuous, Discrete
from marlkit.testing import check_environment

RUNTIME = Runtime(torch.device("cpu"), seed=3)
HERE = __name__


class Counters(EnvBase):
    """Two agents, each with a counter that its action is added to; over once the first agent's counter passes ``limit``.

    With ``cut``, an episode is also truncated once the second agent's counter passes it.
    """

    def __init__(self, batch: int | None = 3, limit: float = 5.0, discrete: bool = False, cut: bool = False) -> None:
        shape = () if batch is None else (batch,)
        super().__init__(batch_size=shape)
        self.limit, self.cut = limit, cut
        self.counter = torch.zeros(*shape, 2, 1)
        agents = Composite(observation=Unbounded((*shape, 2, 1)), shape=(*shape, 2))
        self.observation_spec = Composite(agents=agents, state=Unbounded((*shape, 1)), shape=shape)
        action = Categorical(4, shape=(*shape, 2)) if discrete else Bounded(-1.0, 2.0, shape=(*shape, 2, 1))
        self.action_spec = Composite(agents=Composite(action=action, shape=(*shape, 2)), shape=shape)
        self.reward_spec = Composite(agents=Composite(reward=Unbounded((*shape, 2, 1)), shape=(*shape, 2)), shape=shape)
        flags = {name: Categorical(2, shape=(*shape, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(**flags, shape=shape)

    def _now(self) -> dict[str, Any]:
        seen = {"agents": {"observation": self.counter.clone()}, "state": self.counter.sum(-2)}
        over = self.counter[..., 0, :] > self.limit
        cut = (self.counter[..., 1, :] > self.limit) if self.cut else torch.zeros_like(over)
        return {**seen, "terminated": over, "truncated": cut, "done": over | cut}

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        chosen = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        if tensordict is not None and tensordict.get("_reset", None) is not None:
            chosen = tensordict["_reset"]
        self.counter = self.counter.masked_fill(chosen.unsqueeze(-1), 0.0)
        return TensorDict(self._now(), batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["agents", "action"]
        self.counter = self.counter + action.reshape(self.counter.shape).float()
        now = self._now()
        now["agents"]["reward"] = self.counter * torch.tensor([[1.0], [10.0]])
        return TensorDict(now, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


class Exporting(Counters):
    """Counters that can say where they are."""

    def export_state(self) -> dict[str, Tensor]:
        return {"counter": self.counter.clone()}

    def import_state(self, state: dict[str, Tensor]) -> None:
        self.counter = state["counter"].clone()


class Lonely(EnvBase):
    """One agent at the root of the dictionary that observes two things and chooses one of three moves, one-hot."""

    def __init__(self) -> None:
        super().__init__(batch_size=())
        self.place = torch.zeros(1)
        self.observation_spec = Composite(place=Unbounded((1,)), twice=Unbounded((1,)))
        self.action_spec = OneHot(3)
        self.reward_spec = Unbounded((1,))

    def _now(self) -> dict[str, Tensor]:
        return {"place": self.place.clone(), "twice": 2 * self.place, "done": self.place >= 4, "terminated": self.place >= 4}

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        self.place = torch.zeros(1)
        return TensorDict(self._now())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.place = self.place + tensordict["action"].float().argmax(-1, keepdim=True)
        return TensorDict({**self._now(), "reward": -self.place})

    def _set_seed(self, seed: int | None) -> None:
        torch.manual_seed(seed or 0)


class SeveralGroups(Counters):
    def __init__(self) -> None:
        super().__init__()
        action = Composite(action=Unbounded((3, 1, 1)), shape=(3, 1))
        self.action_spec = Composite(reds=action, blues=action.clone(), shape=(3,))


def not_an_environment() -> int:
    return 1


def create(name: str = "Counters", num_envs: int = 3, actions: Any = "continuous", **options: Any) -> TorchrlEnvironment:
    return TorchrlEnvironment(RUNTIME, factory=f"{HERE}.{name}", num_envs=num_envs, actions=actions, **options)


def moves(*pairs: tuple[float, float]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float32).unsqueeze(-1)


@pytest.mark.parametrize("batch", [3, None], ids=["batched", "copies"])
def test_only_the_finished_are_reset_and_next_holds_the_state_before(batch: int | None) -> None:
    env = create(options={"batch": batch})
    assert env.spec.action == Continuous(1, ((-1.0,), (-1.0,)), ((2.0,), (2.0,)))
    assert (env.spec.n_agents, env.spec.observation, env.spec.state) == (2, 1, 1)
    assert env.reset()["agents", "observation"].flatten().tolist() == [0] * 6
    for _ in range(2):
        arrived, current = env.step(moves((2, 1), (1, 1), (9, -9)))  # the last is clipped to (2, -1)
    assert arrived["agents", "observation"].squeeze(-1).tolist() == [[4, 2], [2, 2], [4, -2]]
    assert arrived["agents", "reward"].squeeze(-1).tolist() == [[4, 20], [2, 20], [4, -20]]
    assert not arrived["done"].any()
    arrived, current = env.step(moves((2, 1), (1, 1), (1, 0)))
    assert arrived["terminated"].flatten().tolist() == arrived["done"].flatten().tolist() == [True, False, False]
    assert arrived["agents", "observation"].squeeze(-1).tolist() == [[6, 3], [3, 3], [5, -2]]
    assert arrived["state"].flatten().tolist() == [9, 6, 3]
    assert current["agents", "observation"].squeeze(-1).tolist() == [[0, 0], [3, 3], [5, -2]]
    assert current["is_first"].flatten().tolist() == [True, False, False]
    arrived, current = env.step(moves((1, 1), (1, 1), (0, 0)))
    assert arrived["agents", "observation"].squeeze(-1).tolist() == [[1, 1], [4, 4], [5, -2]]


def test_the_time_limit_truncates_each_environment_by_itself() -> None:
    env = create(max_steps=4)
    env.reset()
    truncated, terminated = [], []
    for _ in range(8):
        arrived, _ = env.step(moves((2, 0), (0, 0), (1, 0)))
        truncated.append(arrived["truncated"].flatten().tolist())
        terminated.append(arrived["terminated"].flatten().tolist())
    # The first ends at its third step (counter 6), the last would pass 5 at its sixth; the limit of 4 comes first.
    assert [step for step, row in enumerate(terminated, 1) if row[0]] == [3, 6]
    assert [step for step, row in enumerate(truncated, 1) if row[0]] == []
    assert [step for step, row in enumerate(truncated, 1) if row[1] and row[2]] == [4, 8]


def test_the_environments_own_truncation_is_kept_and_resets() -> None:
    env = create(options={"cut": True})
    env.reset()
    for _ in range(3):
        arrived, current = env.step(moves((0, 2), (2, 2), (0, 0)))
    assert arrived["truncated"].flatten().tolist() == [True, False, False]
    assert arrived["terminated"].flatten().tolist() == [False, True, False]
    assert current["agents", "observation"].flatten().tolist() == [0] * 6


def test_discrete_actions_and_pooled_rewards() -> None:
    env = create(actions="discrete", options={"discrete": True}, reward="mean")
    assert env.spec.action == Discrete(4)
    assert env.spec.team_reward
    assert env.reset()["agents", "action_mask"].all()
    arrived, _ = env.step(torch.tensor([[0, 3], [1, 1], [2, 0]]))
    assert arrived["agents", "observation"].squeeze(-1).tolist() == [[0, 3], [1, 1], [2, 0]]
    assert arrived["agents", "reward"].squeeze(-1).tolist() == [[15, 15], [5.5, 5.5], [1, 1]]


def test_a_single_agent_is_a_team_of_one() -> None:
    env = create("Lonely", num_envs=2, actions="discrete")
    assert (env.spec.n_agents, env.spec.observation, env.spec.action) == (1, 2, Discrete(3))
    env.reset()
    arrived, _ = env.step(torch.tensor([[1], [2]]))
    assert arrived["agents", "observation"].tolist() == [[[1, 2]], [[2, 4]]]
    assert arrived["agents", "reward"].tolist() == [[[-1]], [[-2]]]
    arrived, current = env.step(torch.tensor([[1], [2]]))
    assert arrived["terminated"].flatten().tolist() == [False, True]
    assert current["agents", "observation"].tolist() == [[[2, 4]], [[0, 0]]]


@pytest.mark.parametrize("actions", ["continuous", "discrete"])
def test_it_steps_as_torchrls_own_vmas_wrapper(actions: Any) -> None:
    vmas = pytest.importorskip("vmas")
    options = {"scenario": "simple_spread", "continuous_actions": actions == "continuous", "seed": 3}
    env = TorchrlEnvironment(RUNTIME, factory="torchrl.envs.VmasEnv", actions=actions, options=options, num_envs=3, max_steps=3)
    plain = vmas.make_env("simple_spread", num_envs=3, continuous_actions=actions == "continuous", seed=3)
    env.reset()
    for mine, theirs in zip(env.env.world.agents + env.env.world.landmarks, plain.agents + plain.world.landmarks, strict=True):
        theirs.set_pos(mine.state.pos.clone(), batch_index=None)
        theirs.set_vel(mine.state.vel.clone(), batch_index=None)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        action = torch.rand(3, 3, 2, generator=generator) * 2 - 1
        if actions == "discrete":
            action = torch.randint(0, 9, (3, 3), generator=generator)
        arrived, current = env.step(action)
        observation, reward, _, _ = plain.step([own.clone() for own in action.unbind(1)])
        assert torch.equal(arrived["agents", "observation"], torch.stack(observation, 1))
        assert torch.equal(arrived["agents", "reward"].squeeze(-1), torch.stack(reward, 1))
        assert bool(arrived["truncated"].all()) == (step == 3) == bool(current["is_first"].all())
        assert not arrived["terminated"].any()


def test_all_declared_keys_are_written() -> None:
    env = create(max_steps=2)
    sizes = {**env.spec.sizes(), "1": 1}
    current = env.reset()
    arrived, following = env.step(torch.zeros(3, 2, 1))
    afterwards = {keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE}
    for key in env.writes:
        info = keys.describe(key)
        shape = (3, *(sizes[dimension] for dimension in info.dimensions(discrete=False)))
        own = key[1:] if key in afterwards else key
        for step in [arrived] if key in afterwards else [current, arrived, following]:
            assert step[own].shape == shape
            assert step[own].dtype == getattr(torch, info.dtype)


def test_construction_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    create()
    assert torch.equal(before, torch.get_rng_state())


def test_an_environment_that_exports_its_state_resumes_exactly() -> None:
    env = create("Exporting", max_steps=4)
    env.reset()
    action = moves((2, 1), (1, -1), (0.5, 0))
    env.step(action)
    saved = env.state_dict()
    expected = [env.step(action)[0] for _ in range(6)]
    again = create("Exporting", max_steps=4)
    again.load_state_dict(saved)
    found = [again.step(action)[0] for _ in range(6)]
    for one, other in zip(expected, found, strict=True):
        assert (one == other).all()


def test_one_that_does_not_can_be_saved_but_says_that_it_cannot_be_resumed() -> None:
    env = create()
    saved = env.state_dict()
    with pytest.raises(MarlkitError, match=r"Counters cannot export its state.*export_state\(\)"):
        env.load_state_dict(saved)


@pytest.mark.parametrize(
    ("changes", "option", "words"),
    [
        ({"actions": "discrete"}, "actions", "actions are continuous"),
        ({"num_envs": 2}, "num_envs", r"batch size \[3\]; set num_envs to 3"),
        ({"options": {"size": 2}}, "options", "unexpected keyword argument 'size'"),
        ({"name": "Missing"}, "factory", "cannot be imported"),
        ({"name": "not_an_environment"}, "factory", "returned int"),
        ({"name": "RUNTIME"}, "factory", "is no function or class"),
        ({"name": "SeveralGroups"}, "factory", "several groups of agents"),
    ],
)
def test_what_does_not_fit_is_said(changes: Any, option: str, words: str) -> None:
    with rng.isolated(0), pytest.raises(OptionError, match=words) as caught:
        create(**changes)
    assert caught.value.option == option


def test_the_rules_of_every_environment_are_kept() -> None:
    check_environment(lambda runtime: create("Exporting", max_steps=4), steps=9)
    check_environment(lambda runtime: create("Lonely", actions="discrete"), steps=9, resumable=False)
    with pytest.raises(MarlkitError, match="cannot export its state"):
        check_environment(lambda runtime: create(max_steps=4), steps=9)


def test_actions_of_a_wrong_shape_are_refused() -> None:
    env = create()
    env.reset()
    with pytest.raises(MarlkitError, match=r"\[B, N, D\] = \[3, 2, 1\]"):
        env.step(torch.zeros(3, 2))


def test_a_factory_must_be_a_dotted_path() -> None:
    assert list(check({"factory": "torchrl.envs.VmasEnv"})) == []
    [(option, message)] = check({"factory": "VmasEnv"})
    assert option == "factory"
    assert "dotted path" in message
