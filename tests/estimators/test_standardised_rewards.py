"""Rewards in units of their running deviation: what is counted, what returns are made of, and what stays raw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import small
from tensordict import TensorDict

from marlkit import keys, run
from marlkit.component import Estimator
from marlkit.estimators.counterfactual import CounterfactualEstimator
from marlkit.estimators.gae import GaeEstimator
from marlkit.estimators.n_step import NStepEstimator
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.estimators.td_lambda import TdLambdaEstimator
from marlkit.recipe import load_recipe
from marlkit.run.metrics_file import read_metrics
from marlkit.spec import Discrete, TeamSpec

SPEC = TeamSpec(2, 3, Discrete(2))
ESTIMATORS = (GaeEstimator, NStepEstimator, TdLambdaEstimator, OneStepEstimator)


def rollout(reward: np.ndarray, dtype: torch.dtype = torch.float64) -> TensorDict:
    """Steps with a reward ``[B, T, N]``, values that are all 1 and no end."""
    batch = TensorDict({}, batch_size=reward.shape[:2])
    batch.set(keys.REWARD, torch.from_numpy(reward).to(dtype).unsqueeze(-1))
    for end in (keys.TERMINATED, keys.DONE):
        batch.set(end, torch.zeros(*reward.shape[:2], 1, dtype=torch.bool))
    values: list[keys.Key] = [keys.STATE_VALUE, keys.following(keys.STATE_VALUE)]
    for key in values:
        batch.set(key, torch.ones(*reward.shape, 1, dtype=dtype))
    return batch


def played(seed: int, envs: int, steps: int) -> np.ndarray:
    """Rewards of two agents, of unequal mean and deviation."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(envs, steps, 2)) * np.array([3.0, 0.2]) + np.array([40.0, -1.0])


@pytest.mark.parametrize("cls", ESTIMATORS)
@pytest.mark.parametrize("form", ["none", "scale", "shift"])
def test_returns_are_made_of_rewards_in_units_of_all_that_were_played(cls: Any, form: Any) -> None:
    """One-step returns by hand, where the episode ends: the target is the reward itself."""
    estimator: Estimator = cls(SPEC, standardise_reward=form).double()
    rewards = [played(seed, envs=4, steps=5 + seed) for seed in range(3)]
    for reward in rewards:
        estimator.observe(rollout(reward))
    every = np.concatenate([reward.reshape(-1, 2) for reward in rewards])
    mean, deviation = every.mean(0), every.std(0)
    batch = rollout(rewards[-1])
    for key in (keys.TERMINATED, keys.DONE):
        batch[key].fill_(True)
    given = batch[keys.REWARD].clone()
    expected = {
        "none": rewards[-1],
        "scale": rewards[-1] / deviation,
        "shift": (rewards[-1] - mean) / deviation,
    }[form]
    written = estimator(batch)
    np.testing.assert_allclose(written[keys.VALUE_TARGET][..., 0].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(written[keys.ADVANTAGE][..., 0].numpy(), expected - 1, rtol=1e-6)
    assert torch.equal(batch[keys.REWARD], given), "what is logged stays raw"


def test_a_reward_that_never_varied_keeps_its_size() -> None:
    for value in (0.0, 1e-8, 0.3, -7.0, 1e6):
        estimator = OneStepEstimator(SPEC, gamma=0.0, standardise_reward="scale")
        batch = rollout(np.full((3, 4, 2), value), torch.float32)
        for _ in range(3):
            estimator.observe(batch)
        torch.testing.assert_close(estimator(batch)[keys.VALUE_TARGET], torch.full((3, 4, 2, 1), value), rtol=1e-4, atol=0)


def test_statistics_are_kept_only_where_they_are_used() -> None:
    assert GaeEstimator(SPEC).state_dict() == {}
    first, second = (TdLambdaEstimator(SPEC, standardise_reward="scale").double() for _ in range(2))
    first.observe(rollout(played(0, 4, 5)))
    second.load_state_dict(first.state_dict())
    batch = rollout(played(1, 4, 5))
    assert torch.equal(first(batch.clone())[keys.VALUE_TARGET], second(batch.clone())[keys.VALUE_TARGET])


def test_the_target_of_a_counterfactual_advantage_sees_what_was_played() -> None:
    target = NStepEstimator(SPEC, standardise_reward="shift", bootstrap="action_value")
    CounterfactualEstimator(SPEC, target=target).observe(rollout(played(0, 4, 5), torch.float32))
    assert target.rewards_seen is not None
    assert target.rewards_seen.item() == 20


def test_returns_are_logged_in_the_environments_units(tmp_path: Path) -> None:
    found = []
    for form in ("none", "shift"):
        recipe = load_recipe("ippo", small("ippo", "trainer.iterations=1", f"estimator.standardise_reward={form}"))
        metrics = read_metrics(run.train(recipe, tmp_path / form, progress=False) / "metrics.csv")
        found.append((metrics["episode/return"][0], metrics["critic/loss"][0]))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]
