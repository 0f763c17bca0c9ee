"""Spaces of TorchRL: what is supported acts as the environment means it, and the rest is refused where it is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

pytest.importorskip("torchrl")

from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, MultiOneHot, NonTensor, OneHot, Unbounded
from torchrl.envs import EnvBase

from marlkit import keys, rng
from marlkit.component import Runtime
from marlkit.envs.torchrl import TorchrlEnvironment
from marlkit.errors import OptionError
from marlkit.spec import Continuous, Discrete
from marlkit.testing import check_environment

B, N = 3, 2
INF = float("inf")


def stacked(*specs: Any) -> Any:
    """One spec per agent, of B environments."""
    return torch.stack([spec.expand(B, *spec.shape) for spec in specs], 1)


ACTIONS: dict[str, Any] = {
    "numbers": Bounded(-1.0, 2.0, shape=(B, N, 2)),
    "a number without its own dimension": Bounded(-1.0, 2.0, shape=(B, N)),
    "without bounds": Unbounded((B, N, 2)),
    "infinite bounds": Bounded(-INF, INF, shape=(B, N, 2)),
    "one infinite bound": Bounded(torch.tensor([-1.0, -INF]).expand(B, N, 2), torch.tensor(INF).expand(B, N, 2)),
    "double precision": Bounded(-1.0, 2.0, shape=(B, N, 2), dtype=torch.float64),
    "numbered": Categorical(4, shape=(B, N)),
    "numbered, 32 bits": Categorical(4, shape=(B, N), dtype=torch.int32),
    "numbered with its own dimension": Categorical(4, shape=(B, N, 1)),
    "one-hot": OneHot(4, shape=(B, N, 4)),
    "several numbered": MultiCategorical([3, 2], shape=(B, N, 2)),
    "several one-hot": MultiOneHot([3, 2], shape=(B, N, 5)),
    "a list of numbered": Categorical(4, shape=(B, N, 2)),
    "bits": Binary(shape=(B, N, 4)),
    "whole numbers": Bounded(0, 5, shape=(B, N, 1), dtype=torch.int64),
    "a picture": Bounded(-1.0, 1.0, shape=(B, N, 3, 3)),
    "numbered without a limit": Categorical(-1, shape=(B, N)),
    "other numbers of actions": stacked(OneHot(3), OneHot(4)),
    "several named": Composite(move=Categorical(3, shape=(B, N)), speak=Categorical(2, shape=(B, N)), shape=(B, N)),
}
OBSERVATIONS: dict[str, Any] = {
    "numbers": Unbounded((B, N, 2)),
    "a number without its own dimension": Unbounded((B, N)),
    "double precision": Unbounded((B, N, 2), dtype=torch.float64),
    "bytes": Bounded(0, 255, shape=(B, N, 2, 2), dtype=torch.uint8),
    "bits": Binary(shape=(B, N, 3)),
    "numbered": Categorical(5, shape=(B, N)),
    "texts": NonTensor((B, N)),
    "other sizes": stacked(Unbounded((2,)), Unbounded((3,))),
    "another number of agents": Unbounded((B, N + 1, 2)),
}


class Spaces(EnvBase):
    """Two agents with any kind of actions and observations; remembers the last action.

    Args:
        action: a name of :data:`ACTIONS`.
        observation: a name of :data:`OBSERVATIONS`.
        mask: type of a mask that forbids the last action, if there is to be one.
        rewards: shape of the reward behind the batch; `agents` of the group.
        over: whether episodes are over at reset.
    """

    def __init__(
        self, action: str = "numbered", observation: str = "numbers", mask: str = "", rewards: Any = "agents", over: str = ""
    ) -> None:
        super().__init__(batch_size=(B,))
        self.taken: Any = None
        self.over, self.resets = over, 0
        agents = Composite(observation=OBSERVATIONS[observation], shape=(B,) if "another" in observation else (B, N))
        if mask:
            agents["action_mask"] = Unbounded((B, N, 3 if mask == "short" else 4), dtype=getattr(torch, mask, torch.bool))
        self.observation_spec = Composite(agents=agents, shape=(B,))
        self.action_spec = Composite(agents=Composite(action=ACTIONS[action], shape=(B, N)), shape=(B,))
        shape = (N, 1) if rewards == "agents" else tuple(rewards)
        reward = Unbounded((B, *shape), dtype=torch.float64)
        self.reward_spec = Composite(agents=Composite(reward=reward, shape=(B, N)), shape=(B,)) if rewards == "agents" else reward
        self.done_spec = Composite(done=Binary(shape=(B, 1), dtype=torch.bool), shape=(B,))

    def _now(self, over: bool = False) -> TensorDict:
        seen = TensorDict({"agents": self.observation_spec["agents"].zero(), "done": torch.full((B, 1), over)}, batch_size=[B])
        if ("agents", "action_mask") in seen.keys(True):
            mask = torch.tensor([1, 1, 1, 0])[: seen["agents", "action_mask"].shape[-1]]
            seen["agents", "action_mask"] = mask.to(seen["agents", "action_mask"].dtype).expand(B, N, -1)
        return seen

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        self.resets += 1
        return self._now(over=self.over == "at once" or (self.over == "later" and self.resets > 1))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.taken = tensordict["agents", "action"]
        now = self._now(over=bool(self.over))
        for key in self.reward_keys:
            now[key] = torch.ones(self.full_reward_spec[key].shape, dtype=torch.float64)
        return now

    def _set_seed(self, seed: int | None) -> None:
        pass


def create(actions: Any = "discrete", **options: Any) -> TorchrlEnvironment:
    runtime = Runtime(torch.device("cpu"), seed=0)
    return TorchrlEnvironment(runtime, factory=f"{__name__}.Spaces", actions=actions, num_envs=B, options=options, max_steps=2)


CHOICE = torch.tensor([[0, 3], [1, 1], [2, 0]])


@pytest.mark.parametrize("action", ["numbered", "numbered, 32 bits", "numbered with its own dimension", "one-hot"])
def test_choices(action: str) -> None:
    env = create(action=action)
    assert env.spec.action == Discrete(4)
    env.reset()
    env.step(CHOICE)
    taken = env.env.taken
    assert taken.shape == ACTIONS[action].shape
    assert taken.dtype == ACTIONS[action].dtype
    assert torch.equal((taken.long().argmax(-1) if action == "one-hot" else taken.reshape(B, N)).long(), CHOICE)


@pytest.mark.parametrize(
    ("action", "size", "low", "clipped"),
    [
        ("numbers", 2, -1.0, [-1.0, 2.0]),
        ("a number without its own dimension", 1, -1.0, [-1.0]),
        ("without bounds", 2, None, [-5.0, 5.0]),
        ("infinite bounds", 2, None, [-5.0, 5.0]),
        ("one infinite bound", 2, None, [-1.0, 5.0]),
        ("double precision", 2, -1.0, [-1.0, 2.0]),
    ],
)
def test_numbers(action: str, size: int, low: float | None, clipped: list[float]) -> None:
    env = create("continuous", action=action)
    assert isinstance(env.spec.action, Continuous)
    assert (env.spec.action.size, env.spec.action.low) == (size, None if low is None else ((low,) * size,) * N)
    env.reset()
    env.step(torch.tensor([-5.0, 5.0])[:size].expand(B, N, size))
    assert env.env.taken.dtype == ACTIONS[action].dtype
    assert env.env.taken.reshape(B, N, size)[1, 1].tolist() == clipped


@pytest.mark.parametrize("mask", ["bool", "int64", "uint8", "float32"])
def test_masks_of_any_type_are_taken_as_booleans(mask: str) -> None:
    env = create(mask=mask)
    seen = env.reset()[keys.ACTION_MASK]
    assert seen.dtype == torch.bool
    assert seen.tolist() == [[[True, True, True, False]] * N] * B
    assert env.step(CHOICE)[0][keys.ACTION_MASK].dtype == torch.bool


@pytest.mark.parametrize(
    ("observation", "size"),
    [
        ("numbers", 2),
        ("a number without its own dimension", 1),
        ("double precision", 2),
        ("bytes", 4),
        ("bits", 3),
        ("numbered", 1),
    ],
)
def test_observations(observation: str, size: int) -> None:
    env = create(observation=observation)
    assert env.spec.observation == size
    seen = env.reset()[keys.OBSERVATION]
    assert (seen.dtype, tuple(seen.shape)) == (torch.float32, (B, N, size))
    check_environment(lambda runtime: create(observation=observation), steps=4, resumable=False)


@pytest.mark.parametrize(("rewards", "shared"), [("agents", False), ([1], True), ([N], True)])
def test_rewards(rewards: Any, shared: bool) -> None:
    env = create(rewards=rewards)
    assert env.spec.team_reward == shared
    env.reset()
    reward: Tensor = env.step(CHOICE)[0]["agents", "reward"]
    assert (reward.dtype, reward.flatten().tolist()) == (torch.float32, [1.0] * B * N)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"action": "several numbered"}, r"actions of this kind cannot be used: MultiCategorical.*either one of a fixed number"),
    ({"action": "several one-hot"}, "actions of this kind cannot be used: MultiOneHot"),
    (
        {"action": "a list of numbered"},
        r"actions of this kind cannot be used: Categorical, torch.int64, of the shape \[3, 2, 2\]",
    ),
    ({"action": "bits"}, "actions of this kind cannot be used: Binary"),
    ({"action": "whole numbers"}, "actions of this kind cannot be used: BoundedDiscrete"),
    ({"action": "a picture"}, "actions of this kind cannot be used"),
    ({"action": "numbered without a limit"}, "actions of this kind cannot be used"),
    ({"action": "other numbers of actions"}, "actions of this kind cannot be used"),
    ({"action": "several named"}, "several groups of agents or several actions"),
    ({"observation": "texts"}, "the observation `agents.observation` must be numbers of a fixed shape"),
    ({"observation": "other sizes"}, "must be numbers of a fixed shape, the same for every agent"),
    ({"observation": "another number of agents"}, "actions are of 2 agents and observations of 3"),
    ({"mask": "short"}, r"`agents.action_mask` has the shape \[3, 2, 3\], not \[3, 2, 4\]"),
    ({"rewards": [5]}, r"one number for each of 2 agents or one for all, not reward \[3, 5\]"),
    ({"over": "at once"}, "fails when it is reset"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_the_rest_is_refused_at_the_factory(options: dict[str, Any], words: str) -> None:
    with rng.isolated(0), pytest.raises(OptionError, match=words) as caught:
        create(**options)
    assert caught.value.option == "factory"
