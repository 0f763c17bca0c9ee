"""Estimators of bootstrapped returns against double loops, over both values; and their needs of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_texts import TEAM, problems, read
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Estimator
from marlkit.estimators._bootstrapping import Bootstrap
from marlkit.estimators.counterfactual import CounterfactualEstimator
from marlkit.estimators.gae import GaeEstimator
from marlkit.estimators.n_step import NStepEstimator
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.estimators.td_lambda import TdLambdaEstimator
from marlkit.spec import Discrete, TeamSpec

B, T, N = 5, 8, 2
GAMMA = 0.9
SPEC = TeamSpec(N, 3, Discrete(2))
VALUES = {"state_value": keys.STATE_VALUE, "action_value": keys.ACTION_VALUE}
BOTH: list[Bootstrap] = ["state_value", "action_value"]


def rollout(seed: int) -> TensorDict:
    """Random numbers under every key that an estimator may read; episodes end in both ways."""
    draw = torch.Generator().manual_seed(seed)
    batch = TensorDict({}, batch_size=[B, T])
    for key in (keys.STATE_VALUE, keys.ACTION_VALUE):
        for each in (key, keys.following(key)):
            batch.set(each, torch.randn(B, T, N, 1, generator=draw, dtype=torch.float64))
    batch.set(keys.REWARD, torch.randn(B, T, N, 1, generator=draw, dtype=torch.float64))
    chance = torch.rand(B, T, 1, generator=draw)
    batch.set(keys.TERMINATED, chance < 0.2)
    batch.set(keys.TRUNCATED, (chance >= 0.2) & (chance < 0.4))
    return batch.set(keys.DONE, chance < 0.4)


def n_step(batch: TensorDict, value: str, b: int, t: int, n: int) -> np.ndarray:
    """At most ``n`` rewards of the episode, and the value of the state after the last of them."""
    total, factor = np.zeros((N, 1)), 1.0
    for step in range(t, min(t + n, T)):
        total += factor * batch[keys.REWARD][b, step].numpy()
        factor *= GAMMA
        if batch[keys.TERMINATED][b, step]:
            return total
        if batch[keys.TRUNCATED][b, step]:
            break
    last: np.ndarray = total + factor * batch[keys.following(VALUES[value])][b, step].numpy()
    return last


def td_lambda(batch: TensorDict, value: str, b: int, t: int, lmbda: float) -> Any:
    """Every n-step return of the episode's rest by its weight; the longest has all the weight that is left."""
    left = 1 + next((k for k in range(T - t) if batch[keys.DONE][b, t + k]), T - t - 1)
    weights = [(1 - lmbda) * lmbda**k for k in range(left - 1)] + [lmbda ** (left - 1)]
    return np.sum([weight * n_step(batch, value, b, t, k + 1) for k, weight in enumerate(weights)], axis=0)


def estimators(bootstrap: Bootstrap) -> dict[str, Estimator]:
    found: dict[str, Estimator] = {"one_step": OneStepEstimator(SPEC, gamma=GAMMA, bootstrap=bootstrap)}
    for n in (1, 3, T, 2 * T):
        found[f"n_step-{n}"] = NStepEstimator(SPEC, gamma=GAMMA, n=n, bootstrap=bootstrap)
    for lmbda in (0.0, 0.3, 0.8, 1.0):
        found[f"td_lambda-{lmbda}"] = TdLambdaEstimator(SPEC, gamma=GAMMA, lmbda=lmbda, bootstrap=bootstrap)
    return found


def by_loop(name: str, batch: TensorDict, value: str) -> Tensor:
    kind, _, number = name.partition("-")
    found = np.zeros((B, T, N, 1))
    for b, t in np.ndindex(B, T):
        if kind == "td_lambda":
            found[b, t] = td_lambda(batch, value, b, t, float(number))
        else:
            found[b, t] = n_step(batch, value, b, t, int(number or 1))
    return torch.from_numpy(found)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bootstrap", BOTH)
@pytest.mark.parametrize("name", estimators("state_value"))
def test_returns_equal_double_loops(name: str, bootstrap: Bootstrap, seed: int) -> None:
    estimator, batch = estimators(bootstrap)[name], rollout(seed)
    assert min(batch[keys.TERMINATED].sum(), batch[keys.TRUNCATED].sum()) >= 3
    found = estimator(batch.select(*estimator.reads))
    expected = by_loop(name, batch, bootstrap)
    torch.testing.assert_close(found[keys.VALUE_TARGET], expected, rtol=0, atol=1e-12)
    if bootstrap == "state_value":
        torch.testing.assert_close(found[keys.ADVANTAGE], expected - batch[keys.STATE_VALUE], rtol=0, atol=1e-12)
    else:
        assert keys.ADVANTAGE not in set(found.keys(True, True))
        assert keys.ADVANTAGE not in estimator.writes


@pytest.mark.parametrize("bootstrap", BOTH)
@pytest.mark.parametrize("name", estimators("state_value"))
def test_ends_and_cuts(name: str, bootstrap: Bootstrap) -> None:
    """GAE-3: values after a true end, and all steps after a reset, do not enter; the value after a cut does."""
    estimator, plain = estimators(bootstrap)[name], rollout(3)
    target = estimator(plain.clone())[keys.VALUE_TARGET]
    following = keys.following(VALUES[bootstrap])
    batch = plain.clone()
    batch[following][plain[keys.TERMINATED].squeeze(-1)] = 1e6
    assert torch.equal(estimator(batch)[keys.VALUE_TARGET], target)
    for b, t in plain[keys.DONE].squeeze(-1).nonzero().tolist():
        batch = plain.clone()
        for key in (keys.REWARD, VALUES[bootstrap], following):
            batch[key][b, t + 1 :] = 1e6
        assert torch.equal(estimator(batch)[keys.VALUE_TARGET][b, : t + 1], target[b, : t + 1])
    batch, cut = plain.clone(), plain[keys.TRUNCATED].squeeze(-1)
    batch[following][cut] += 1e6
    moved = estimator(batch)[keys.VALUE_TARGET] - target
    torch.testing.assert_close(moved[cut], torch.full_like(moved[cut], GAMMA * 1e6), rtol=1e-9, atol=0)


def test_td_lambda_of_agreeing_values_is_gae() -> None:
    batch = rollout(4)
    goes_on = ~batch[keys.DONE][:, :-1].unsqueeze(-1)
    following = keys.following(keys.STATE_VALUE)
    batch[following][:, :-1] = torch.where(goes_on, batch[keys.STATE_VALUE][:, 1:], batch[following][:, :-1])
    first = TdLambdaEstimator(SPEC, gamma=GAMMA, lmbda=0.7)(batch.clone())
    second = GaeEstimator(SPEC, gamma=GAMMA, lmbda=0.7)(batch.clone())
    for key in (keys.ADVANTAGE, keys.VALUE_TARGET):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bootstrap", BOTH)
def test_counterfactual_advantage_beside_the_target_of_its_part(bootstrap: Bootstrap) -> None:
    batch = rollout(5)
    estimator = CounterfactualEstimator(SPEC, target=TdLambdaEstimator(SPEC, gamma=GAMMA, lmbda=0.8, bootstrap=bootstrap))
    assert set(estimator.writes) == {keys.ADVANTAGE, keys.VALUE_TARGET}
    found = estimator(batch.select(*estimator.reads))
    expected = by_loop("td_lambda-0.8", batch, bootstrap)
    torch.testing.assert_close(found[keys.VALUE_TARGET], expected, rtol=0, atol=1e-12)
    assert torch.equal(found[keys.ADVANTAGE], batch[keys.ACTION_VALUE] - batch[keys.STATE_VALUE])


def test_nothing_carries_a_gradient() -> None:
    for bootstrap in BOTH:
        part = OneStepEstimator(SPEC, bootstrap=bootstrap)
        for estimator in (part, CounterfactualEstimator(SPEC, target=part)):
            batch = rollout(6)
            for key in (keys.STATE_VALUE, keys.ACTION_VALUE):
                batch.set(key, batch[key].requires_grad_())
                batch.set(keys.following(key), batch[keys.following(key)].requires_grad_())
            estimator(batch)
            assert not any(batch[key].requires_grad for key in estimator.writes)


# --- in recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gae", "n_step", "td_lambda"])
def test_returns_over_several_steps_need_data_in_order(name: str, tmp_path: Path) -> None:
    found = [p for p in problems(tmp_path, overrides=[f"estimator={name}", "data=replay"]) if p.where == "estimator"]
    assert len(found) == 1
    assert f"`{name}` needs the trait `on_policy`, which data `replay`" in found[0].message
    assert "`data=rollout`" in found[0].remedy


def test_one_step_returns_take_any_data(tmp_path: Path) -> None:
    assert all(p.where != "estimator" for p in problems(tmp_path, overrides=["estimator=one_step", "data=replay"]))


def test_the_needs_of_a_part_are_checked(tmp_path: Path) -> None:
    text = TEAM.replace("{type: gae, gamma: 0.9}", "{type: counterfactual, target: {type: td_lambda, bootstrap: action_value}}")
    discrete = ["env.continuous_actions=false", "critic=counterfactual"]
    assert read(tmp_path, text, discrete).options("estimator.target")["lmbda"] == 0.8
    places = {p.where for p in problems(tmp_path, text, [*discrete, "data=replay"])}
    assert "estimator.target" in places
    assert "estimator" not in places


def test_a_critic_without_action_values_does_not_fit(tmp_path: Path) -> None:
    text = TEAM.replace("{type: gae, gamma: 0.9}", "{type: counterfactual, target: one_step}")
    found = problems(tmp_path, text, ["env.continuous_actions=false"])
    assert [p.where for p in found] == ["estimator"]
    assert "`counterfactual` reads agents.action_value" in found[0].message
    assert "counterfactual" in found[0].remedy


def test_no_critic_is_proposed_that_the_environment_rules_out(tmp_path: Path) -> None:
    """The counterfactual critic needs discrete actions, and here they are continuous."""
    text = TEAM.replace("critic: centralised", "critic: example_team.ActionValueCritic")
    remedies = [p.remedy for p in problems(tmp_path, text)]
    assert all("centralised" in remedy and "counterfactual" not in remedy for remedy in remedies)
    remedies = [p.remedy for p in problems(tmp_path, text, ["env.continuous_actions=false"])]
    assert all("counterfactual" in remedy for remedy in remedies)


def test_components_without_required_parts_are_proposed_first(tmp_path: Path) -> None:
    found = problems(tmp_path, TEAM.replace("{type: gae, gamma: 0.9}", "example_team.ValueEstimator"))
    assert "(`estimator=gae`)" in found[0].remedy
    assert "counterfactual" not in found[0].remedy, "it would need an option that has no default"
