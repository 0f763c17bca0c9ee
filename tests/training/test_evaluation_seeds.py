"""Evaluations of a frozen policy are equal, whatever the environment draws from, and other seeds give other ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

pytest.importorskip("torchrl")

from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from marlkit import rng
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Environment, Runtime
from marlkit.envs.torchrl import TorchrlEnvironment
from marlkit.testing import check_environment
from marlkit.training.evaluation import Episodes, play_episodes


class Drifting(EnvBase):
    """One agent whose place drifts at random, drawn from a generator of its own, as Gymnasium's environments do.

    Args:
        source: `numpy` or `torch`, its own generator, or `global`.
        batch: number of environments; `null` for one without a batch.
    """

    def __init__(self, source: str = "numpy", batch: int | None = None) -> None:
        shape = () if batch is None else (batch,)
        super().__init__(batch_size=shape)
        self.source = source
        self.numpy, self.torch = np.random.default_rng(), torch.Generator()
        self.torch.seed()
        self.place = torch.zeros(*shape, 1)
        self.observation_spec = Composite(observation=Unbounded((*shape, 1)), shape=shape)
        self.action_spec = Bounded(-1.0, 1.0, shape=(*shape, 1))
        self.reward_spec = Unbounded((*shape, 1))
        self.done_spec = Binary(shape=(*shape, 1), dtype=torch.bool)

    def _noise(self) -> torch.Tensor:
        if self.source == "numpy":
            return torch.from_numpy(self.numpy.standard_normal(tuple(self.place.shape))).float()
        return torch.randn(self.place.shape, generator=self.torch if self.source == "torch" else None)

    def _now(self) -> dict[str, Any]:
        return {"observation": self.place.clone(), "done": self.place.abs() > 3}

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        chosen = torch.ones_like(self.place, dtype=torch.bool) if tensordict is None else tensordict.get("_reset", None)
        fresh = self._noise().clamp(-2, 2)
        self.place = fresh if chosen is None else torch.where(chosen, fresh, self.place)
        return TensorDict(self._now(), batch_size=self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.place = self.place + 0.5 * self._noise() + 0.1 * tensordict["action"]
        return TensorDict({**self._now(), "reward": self.place.clone()}, batch_size=self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        self.numpy = np.random.default_rng(seed)
        self.torch.manual_seed(seed or 0)


def drifting(runtime: Runtime, source: str, batch: int | None) -> Environment:
    options = {"source": source, "batch": batch}
    return TorchrlEnvironment(
        runtime, factory=f"{__name__}.Drifting", actions="continuous", options=options, num_envs=4, max_steps=12
    )


@pytest.fixture(params=["numpy", "torch", "global"])
def env(request: pytest.FixtureRequest) -> Environment:
    return drifting(Runtime(torch.device("cpu"), 0), request.param, 4)


def evaluated(env: Environment, seed: int) -> Episodes:
    torch.manual_seed(0)
    return play_episodes(env, StochasticActor(env.spec, hidden=[4]), seed=seed, steps=12)


def test_a_frozen_policy_is_evaluated_alike_every_time(env: Environment) -> None:
    first = evaluated(env, seed=1)
    for _ in range(3):
        again = evaluated(env, seed=1)
        assert torch.equal(again.returns, first.returns)
        assert torch.equal(again.lengths, first.lengths)


def test_also_after_episodes_that_ended_otherwise_and_in_another_copy(env: Environment) -> None:
    first = evaluated(env, seed=1)
    evaluated(env, seed=2)
    assert torch.equal(evaluated(env, seed=1).returns, first.returns)
    other = drifting(Runtime(torch.device("cpu"), 5), env.options["options"]["source"], 4)
    assert torch.equal(evaluated(other, seed=1).returns, first.returns)


def test_other_seeds_give_other_episodes(env: Environment) -> None:
    returns = [evaluated(env, seed).returns for seed in (1, 2, 3)]
    assert len({tuple(found.tolist()) for found in returns}) == 3
    assert all(len(found.unique()) == 4 for found in returns), "the environments of a batch differ too"


def test_the_global_generators_stay_as_they_were(env: Environment) -> None:
    actor = StochasticActor(env.spec, hidden=[4])
    before = rng.state()
    play_episodes(env, actor, seed=1, steps=12)
    assert not rng.drawn_since(before)


@pytest.mark.parametrize("batch", [4, None])
def test_it_keeps_the_rule_of_seeds(batch: int | None) -> None:
    check_environment(lambda runtime: drifting(runtime, "numpy", batch), steps=14, resumable=False)
