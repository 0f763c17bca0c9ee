"""Returns against hand-computed numbers, double loops and TorchRL."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate, td_lambda_return_estimate

from marlkit.errors import OptionError
from marlkit.functional.returns import bootstrap_drift, generalised_advantage, lambda_return, n_step_return

assert_exact = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)
Rollout = dict[str, Tensor]


def random_rollout(seed: int, batch: int = 6, steps: int = 9, agents: int = 3, *, consistent: bool = False) -> Rollout:
    """A float64 rollout with random ends; ``consistent`` makes U_t = V_{t+1} inside episodes."""
    generator = torch.Generator().manual_seed(seed)
    rollout = {
        name: torch.randn(batch, steps, agents, 1, generator=generator, dtype=torch.float64)
        for name in ("reward", "value", "next_value")
    }
    end = torch.rand(batch, steps, 1, generator=generator)
    rollout["terminated"] = end < 0.15
    rollout["done"] = end < 0.35
    if consistent:
        going_on = ~rollout["done"][:, :-1].unsqueeze(2)
        rollout["next_value"][:, :-1] = torch.where(going_on, rollout["value"][:, 1:], rollout["next_value"][:, :-1])
    return rollout


def team(rollout: Rollout) -> Rollout:
    return {name: x for name, x in rollout.items() if name != "value"}


def continuations(rollout: Rollout, b: int, start: int) -> int:
    """Index of the last step that belongs to the episode of ``start`` and to the batch."""
    step = start
    while not rollout["done"][b, step, 0] and step < rollout["done"].shape[1] - 1:
        step += 1
    return step


def advantage_by_double_loop(rollout: Rollout, gamma: float, lmbda: float) -> np.ndarray:
    """Sum of (gamma lambda)^k delta_{t+k} up to the end of the episode, in O(T^2)."""
    reward, value, following = (rollout[name].numpy() for name in ("reward", "value", "next_value"))
    terminated = rollout["terminated"].numpy()
    advantage = np.zeros_like(value)
    for b, t in np.ndindex(*value.shape[:2]):
        for k, step in enumerate(range(t, continuations(rollout, b, t) + 1)):
            bootstrap = 0.0 if terminated[b, step, 0] else gamma * following[b, step]
            advantage[b, t] += (gamma * lmbda) ** k * (reward[b, step] + bootstrap - value[b, step])
    return advantage


def truncated_return(rollout: Rollout, b: int, t: int, n: int, gamma: float) -> np.ndarray:
    """Discounted rewards of at most n steps, and the bootstrap behind the last of them."""
    last = min(t + n - 1, continuations(rollout, b, t))
    total = np.zeros(rollout["reward"].shape[2:])
    for k, step in enumerate(range(t, last + 1)):
        total += gamma**k * rollout["reward"][b, step].numpy()
    if not rollout["terminated"][b, last, 0]:
        total += gamma ** (last - t + 1) * rollout["next_value"][b, last].numpy()
    return total


def lambda_return_by_mixture(rollout: Rollout, gamma: float, lmbda: float) -> np.ndarray:
    """(1 - lambda) sum_n lambda^{n-1} G^(n) + lambda^{L-1} G^(L), the definition of Sutton and Barto, eq. 12.3."""
    result = np.zeros(rollout["next_value"].shape)
    for b, t in np.ndindex(*result.shape[:2]):
        length = continuations(rollout, b, t) - t + 1
        for n in range(1, length):
            result[b, t] += (1 - lmbda) * lmbda ** (n - 1) * truncated_return(rollout, b, t, n, gamma)
        result[b, t] += lmbda ** (length - 1) * truncated_return(rollout, b, t, length, gamma)
    return result


def three_steps(terminated_at: int | None, truncated_at: int | None) -> Rollout:
    flags = torch.zeros(2, 1, 3, 1, dtype=torch.bool)
    if terminated_at is not None:
        flags[:, 0, terminated_at] = True
    if truncated_at is not None:
        flags[1, 0, truncated_at] = True
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    return {"reward": ones, "value": 0.5 * ones, "next_value": 0.5 * ones, "terminated": flags[0], "done": flags[1]}


@pytest.mark.parametrize(
    ("terminated_at", "truncated_at", "expected"),
    [
        (2, None, (1.8932, 1.31, 0.5)),
        (None, 2, (2.12648, 1.634, 0.95)),
        (None, None, (2.12648, 1.634, 0.95)),
        (None, 1, (1.634, 0.95, 0.95)),
        (1, None, (1.31, 0.5, 0.95)),
    ],
)
def test_advantage_of_three_steps_by_hand(
    terminated_at: int | None, truncated_at: int | None, expected: tuple[float, ...]
) -> None:
    rollout = three_steps(terminated_at, truncated_at)
    advantage, target = generalised_advantage(**rollout, gamma=0.9, lmbda=0.8)
    wanted = torch.tensor(expected, dtype=torch.float64).view(1, 3, 1, 1)
    assert_exact(advantage, wanted)
    assert_exact(target, wanted + 0.5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lmbda"), [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_advantage_equals_double_loop(seed: int, gamma: float, lmbda: float) -> None:
    rollout = random_rollout(seed)
    advantage, target = generalised_advantage(**rollout, gamma=gamma, lmbda=lmbda)
    expected = torch.from_numpy(advantage_by_double_loop(rollout, gamma, lmbda))
    assert_exact(advantage, expected)
    assert_exact(target, expected + rollout["value"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lmbda"), [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.7, 0.3)])
def test_lambda_return_equals_mixture_of_n_step_returns(seed: int, gamma: float, lmbda: float) -> None:
    rollout = random_rollout(seed)
    returned = lambda_return(**team(rollout), gamma=gamma, lmbda=lmbda)
    assert_exact(returned, torch.from_numpy(lambda_return_by_mixture(rollout, gamma, lmbda)))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 10, 50])
def test_n_step_return_equals_definition(n: int) -> None:
    rollout = random_rollout(seed=n)
    returned = n_step_return(**team(rollout), gamma=0.9, n=n)
    for b, t in np.ndindex(*returned.shape[:2]):
        np.testing.assert_allclose(returned[b, t].numpy(), truncated_return(rollout, b, t, n, 0.9), rtol=0, atol=1e-10)


def test_lambda_return_minus_value_is_advantage_where_values_agree() -> None:
    rollout = random_rollout(seed=5, consistent=True)
    _, target = generalised_advantage(**rollout, gamma=0.95, lmbda=0.7)
    assert_exact(lambda_return(**team(rollout), gamma=0.95, lmbda=0.7), target)


@pytest.mark.parametrize("seed", range(3))
def test_agreement_with_torchrl(seed: int) -> None:
    gamma, lmbda = 31 / 32, 7 / 8  # exact in float32, in which TorchRL keeps the factors of float64 rollouts
    rollout = random_rollout(seed, batch=16, steps=30)
    shape = rollout["value"].shape
    flags = {name: rollout[name].unsqueeze(2).expand(shape) for name in ("terminated", "done")}
    values = {"state_value": rollout["value"], "next_state_value": rollout["next_value"], "reward": rollout["reward"]}
    expected = generalized_advantage_estimate(gamma, lmbda, **values, **flags, time_dim=1)
    for ours, theirs in zip(generalised_advantage(**rollout, gamma=gamma, lmbda=lmbda), expected, strict=True):
        assert_exact(ours, theirs)
    theirs = td_lambda_return_estimate(gamma, lmbda, rollout["next_value"], rollout["reward"], **flags, time_dim=1)
    assert_exact(lambda_return(**team(rollout), gamma=gamma, lmbda=lmbda), theirs)


def every_return(rollout: Rollout) -> dict[str, Tensor]:
    advantage, target = generalised_advantage(**rollout, gamma=0.9, lmbda=0.8)
    rest = team(rollout)
    return {
        "advantage": advantage,
        "target": target,
        "lambda": lambda_return(**rest, gamma=0.9, lmbda=0.8),
        "3-step": n_step_return(**rest, gamma=0.9, n=3),
        "full": n_step_return(**rest, gamma=0.9, n=99),
    }


@pytest.mark.parametrize("absurd", [1e6, float("inf"), float("nan")])
def test_value_behind_a_terminated_step_is_never_used(absurd: float) -> None:
    rollout = random_rollout(seed=7)
    before = every_return(rollout)
    rollout["next_value"] = rollout["next_value"].masked_fill(rollout["terminated"].unsqueeze(2), absurd)
    for name, after in every_return(rollout).items():
        assert torch.equal(after, before[name]), name


def test_value_behind_a_truncated_step_is_used() -> None:
    rollout = three_steps(terminated_at=None, truncated_at=1)
    before = every_return(rollout)
    rollout["next_value"] = rollout["next_value"].clone()
    rollout["next_value"][:, 1] += 1e6
    for name, after in every_return(rollout).items():
        assert (after[:, 1] - before[name][:, 1] - 0.9e6).abs().max() < 1e-6, name
        assert torch.equal(after[:, 2], before[name][:, 2]), name


@pytest.mark.parametrize("end", ["terminated_at", "truncated_at"])
def test_state_after_the_reset_does_not_leak_into_the_episode_before(end: str) -> None:
    rollout = three_steps(**{"terminated_at": None, "truncated_at": None, end: 1})
    before = every_return(rollout)
    for name in ("value", "next_value", "reward"):
        rollout[name] = rollout[name].clone()
        rollout[name][:, 2] = 1e6
    for name, after in every_return(rollout).items():
        assert torch.equal(after[:, :2], before[name][:, :2]), name


def test_team_reward_and_flags_hold_for_every_agent() -> None:
    rollout = random_rollout(seed=11)
    team_reward = rollout["reward"][:, :, 0]
    spread = {**rollout, "reward": rollout["reward"][:, :, :1].expand_as(rollout["value"])}
    spread |= {name: rollout[name].unsqueeze(2).expand_as(rollout["value"]) for name in ("terminated", "done")}
    from_team = every_return({**rollout, "reward": team_reward})
    for name, per_agent in every_return(spread).items():
        assert torch.equal(per_agent, from_team[name]), name


def test_agents_and_environments_do_not_mix() -> None:
    rollout = random_rollout(seed=12)
    before = every_return(rollout)
    for name in ("reward", "value", "next_value"):
        rollout[name] = rollout[name].clone()
        rollout[name][2, :, 1] = 1e6
    for name, after in every_return(rollout).items():
        others = torch.ones(6, 3, dtype=torch.bool)
        others[2, 1] = False
        assert torch.equal(after.transpose(1, 2)[others], before[name].transpose(1, 2)[others]), name


def test_inputs_are_left_alone_and_outputs_carry_no_gradient() -> None:
    rollout = random_rollout(seed=13, batch=1, steps=1)
    copies = {name: x.clone() for name, x in rollout.items()}
    rollout["value"].requires_grad_()
    rollout["next_value"].requires_grad_()
    for name, returned in every_return(rollout).items():
        assert not returned.requires_grad, name
        assert returned.is_contiguous(), name
    for name, copy in copies.items():
        assert torch.equal(rollout[name], copy), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": torch.zeros(6, 9, 2, 1)}, r"reward of shape \[6, 9, 2, 1\].*\[6, 9, 3, 1\]"),
        ({"reward": torch.zeros(6, 9)}, r"reward of shape \[6, 9\]"),
        ({"done": torch.zeros(6, 1, 1, dtype=torch.bool)}, r"done of shape \[6, 1, 1\]"),
        ({"terminated": torch.zeros(6, 9, 1)}, "terminated must be bool, got torch.float32"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], words: str) -> None:
    rollout = {**random_rollout(seed=0), **change}
    with pytest.raises(ValueError, match=words):
        generalised_advantage(**rollout, gamma=0.9, lmbda=0.8)
    for n in (2, 9):
        with pytest.raises(ValueError, match=words):
            n_step_return(**team(rollout), gamma=0.9, n=n)


def test_zero_steps_are_refused() -> None:
    with pytest.raises(OptionError, match="`n`: must be at least 1, got 0"):
        n_step_return(**team(random_rollout(seed=0)), gamma=0.9, n=0)


def test_advantages_of_a_lagging_bootstrap_are_returns_less_values() -> None:
    """Four rewards of 1, a true end, values of 10 and bootstraps of 0: the returns are 4, 3, 2, 1."""
    value, next_value = torch.full((1, 4, 1, 1), 10.0, dtype=torch.float64), torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    reward, end = torch.ones_like(value), torch.tensor([False, False, False, True]).view(1, 4, 1)
    drift = bootstrap_drift(value, next_value, end, gamma=1.0, lmbda=1.0)
    _, target = generalised_advantage(reward + drift, value, next_value, end, end, gamma=1.0, lmbda=1.0)
    assert target.flatten().tolist() == [4.0, 3.0, 2.0, 1.0]


def test_the_drift_of_any_bootstrap_gives_the_lambda_return_and_vanishes_where_values_agree() -> None:
    draw = torch.Generator().manual_seed(3)
    value, next_value, reward = (torch.randn(5, 9, 2, 1, generator=draw, dtype=torch.float64) for _ in range(3))
    terminated = torch.rand(5, 9, 1, generator=draw) < 0.15
    done = terminated | (torch.rand(5, 9, 1, generator=draw) < 0.15)
    decay = {"gamma": 0.9, "lmbda": 0.7}
    drift = bootstrap_drift(value, next_value, done, **decay)
    advantage, target = generalised_advantage(reward + drift, value, next_value, terminated, done, **decay)
    expected = lambda_return(reward, next_value, terminated, done, **decay)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantage, expected - value, rtol=0, atol=1e-12)
    assert not bootstrap_drift(value, value.roll(-1, 1), done, **decay).any()
