"""The theorems of PERLA (Jafferjee et al. 2022) and its matrix game through the critic itself, and what is learnt of the game.

For two agents a critic without hidden layers is a table: ``Q_i[b]`` is a weight of the other agent's action for each ``b``.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.functional import marginal
from marlkit.nn.networks import TeamLinear
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.spec import Discrete, TeamSpec
from marlkit.testing import fake_batch

GAME = torch.tensor([[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 0.0]])
FIRST, SECOND = (0.2, 0.4, 0.4), (1 / 3, 1 / 3, 1 / 3)
CURRENT: list[Any] = ["sampled", "executed"]


def rows_of(actions: Tensor, policies: Tensor, spec: TeamSpec) -> TensorDict:
    """Joint actions ``[R, N]`` in one state, with the agents' policies ``[N, A]`` as they are believed."""
    rows = fake_batch(spec, [len(actions)], [keys.STATE, keys.OBSERVATION]).apply(
        lambda x: torch.ones_like(x, dtype=policies.dtype)
    )
    rows.set(keys.ACTION, actions).set(keys.LOGITS, policies.log().expand(len(actions), -1, -1).clone())
    return TruePolicyOpponents(spec)(rows)


def table_critic(table: Tensor, **options: Any) -> MarginalisedCritic:
    """A critic of two agents whose ``Q_0[b]`` is ``table[b, a_1]``."""
    spec = TeamSpec(2, 1, Discrete(len(table)), team_reward=True)
    net = MarginalisedCritic(spec, style="q", hidden=[], agent_id=False, value_norm=False, **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.action_layer.weights[0][:, len(table) :].copy_(table)
    return net


def estimates(table: Tensor, other: Tensor, samples: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """``Qh_0`` ``[J, A]`` of each own action from each tuple of samples of agent 1's action, and their probabilities ``[J]``."""
    tuples = torch.tensor(list(itertools.product(range(len(other)), repeat=samples)))
    inside = other.cumsum(0) - other / 2  # a number that inversion turns into this action
    uniform = torch.full((len(tuples), samples, 2), 0.5, dtype=torch.float64)
    uniform[..., 1] = inside[tuples]
    monkeypatch.setattr(marginal, "counter_uniform", lambda seed, first, count: uniform.flatten(1)[:, first : first + count])
    net = table_critic(table, samples=samples, exact="never", chunk=10**6)  # all rows in one block
    batch = rows_of(torch.zeros(len(tuples), 2, dtype=torch.int64), torch.stack([torch.ones_like(other), other]), net.spec)
    return net.averaged(batch)[:, 0].detach(), other[tuples].prod(-1)


def variance(values: Tensor, weight: Tensor) -> float:
    mean = (weight * values).sum()
    return float((weight * (values - mean).square()).sum())


def test_variances_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """PERLA-1: Var(Q) = .8916, of the marginal .0096, of the means of two and ten samples .4506 and .0978."""
    table, own, other = (torch.tensor(x, dtype=torch.float64) for x in ([[1, 0], [0, 3]], [0.6, 0.4], [0.7, 0.3]))
    assert variance(table, own[:, None] * other) == pytest.approx(0.8916, abs=1e-10)
    exact = table_critic(table, exact="always")
    batch = rows_of(torch.zeros(1, 2, dtype=torch.int64), torch.stack([own, other]), exact.spec)
    found = exact.averaged(batch)[0, 0].detach()
    assert found.tolist() == pytest.approx([0.7, 0.9], abs=1e-10)
    assert variance(found, own) == pytest.approx(0.0096, abs=1e-10)
    for samples, expected in ((1, 0.8916), (2, 0.4506), (10, 0.0978)):
        found, probability = estimates(table, other, samples, monkeypatch)
        assert variance(found, probability[:, None] * own) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_critic_keeps_the_gradient_and_its_excess_variance_is_one_over_k(
    seed: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PERLA-2: theorem 3 holds for any Q; the variance beyond that of the marginal is divided by the number of samples."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    own, other = (torch.randn(2, 3, dtype=torch.float64, generator=generator)).softmax(-1)
    score = torch.eye(3, dtype=torch.float64) - own  # of the logits, for each own action

    def moments(values: Tensor, weight: Tensor) -> tuple[Tensor, float]:
        """Mean ``[A]`` and total variance of the gradients of values ``[A, X]`` with weights of the same shape."""
        gradient = score.unsqueeze(1) * values.unsqueeze(-1)
        mean = (weight.unsqueeze(-1) * gradient).sum((0, 1))
        return mean, float((weight * (gradient - mean).square().sum(-1)).sum())

    of_executed, executed_variance = moments(table, own[:, None] * other)
    of_marginal, marginal_variance = moments((table @ other).unsqueeze(1), own.unsqueeze(1))
    found, probability = estimates(table, other, samples, monkeypatch)
    of_samples, sample_variance = moments(found.T, own[:, None] * probability)
    torch.testing.assert_close(of_marginal, of_executed, rtol=0, atol=1e-10)
    torch.testing.assert_close(of_samples, of_executed, rtol=0, atol=1e-10)
    excess = executed_variance - marginal_variance
    assert excess > 1e-3
    assert sample_variance - marginal_variance == pytest.approx(excess / samples, abs=1e-10)


@pytest.mark.parametrize("current", CURRENT)
def test_the_advantage_of_a_wrong_critic_gives_the_gradient_of_its_executed_values(current: Any) -> None:
    """PERLA-2 with what is written: ``E[grad log pi_i A_i]`` of the marginalised advantage is that of ``Q_i(x, a)`` itself."""
    spec = TeamSpec(3, 2, Discrete(3), team_reward=True)
    torch.manual_seed(0)
    net = MarginalisedCritic(spec, style="q", current=current, exact="always", hidden=[6], value_norm=False).double()
    actions = marginal.joint_actions(3, 3)
    policies = torch.randn(3, 3, dtype=torch.float64).softmax(-1)
    rows = rows_of(actions, policies, spec)
    at_executed = net.at_executed(rows).gather(-1, actions.unsqueeze(-1))
    net(rows)
    weight = policies[torch.arange(3), actions].prod(-1).view(-1, 1, 1)
    score = torch.nn.functional.one_hot(actions, 3) - policies
    expected = (weight * score * at_executed).sum(0)
    advantage = rows[keys.ACTION_VALUE] - rows[keys.STATE_VALUE]
    torch.testing.assert_close((weight * score * advantage).sum(0), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1e-3


def payoff_critic(n_agents: int) -> MarginalisedCritic:
    """A critic that is exactly the payoff: 8 if all choose the first action, -12 if some but not all do, 0 if none does."""
    spec = TeamSpec(n_agents, 1, Discrete(3), team_reward=True)
    options: dict[str, Any] = {"hidden": [3], "activation": "relu", "agent_id": False, "value_norm": False, "exact": "always"}
    net = MarginalisedCritic(spec, style="q", current="executed", **options).double()
    first, last = cast(list[TeamLinear], list(net.network.layers))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        # The units are max(0, n), max(0, n - 1) and max(0, n - N + 2), n of the N - 1 others choosing the first action.
        net.action_layer.weights[0][:, ::3] = 1.0
        first.biases[0].copy_(torch.tensor([0.0, -1.0, 2.0 - n_agents]))
        last.weights[0][0, 2] = 20.0
        last.biases[0][0] = -12.0
        last.weights[0][1:, :2] = torch.tensor([-12.0, 12.0], dtype=torch.float64)
    return net


@pytest.mark.parametrize(("n_agents", "boundary"), [(2, 0.375), (3, 0.4365), (4, 0.4575)])
def test_the_gradient_turns_at_the_phase_boundary(n_agents: int, boundary: float) -> None:
    """PERLA-6: with the true payoff as critic, the first action gains only where others choose it often enough."""
    net = payoff_critic(n_agents)
    actions = marginal.joint_actions(n_agents, 3)
    for offset in (-0.2, -0.001, 0.001, 0.2):
        probability = boundary + offset
        policies = torch.tensor([probability, *[(1 - probability) / 2] * 2], dtype=torch.float64).expand(n_agents, 3)
        rows = rows_of(actions, policies, net.spec)
        first = (actions == 0).sum(-1)
        payoff = torch.where(first == n_agents, 8.0, torch.where(first > 0, -12.0, 0.0)).double()
        torch.testing.assert_close(net.predict(rows)[..., 0], payoff.unsqueeze(-1).expand(-1, n_agents), rtol=0, atol=1e-10)
        net(rows)
        chosen = actions[:, 0] == 0
        weight = policies[0][actions].prod(-1)
        score = chosen.double() - probability
        gradient = (weight * score * (rows[keys.ACTION_VALUE] - rows[keys.STATE_VALUE])[:, 0, 0]).sum()
        assert (gradient > 0) == (offset > 0), probability


# --- what is learnt in the game -----------------------------------------------------------------------------------------------


def learnt(current: Any, style: Any) -> MarginalisedCritic:
    """A critic fitted to a data set in which every joint action occurs as often as two fixed policies choose it."""
    spec = TeamSpec(2, 1, Discrete(3), team_reward=True)
    torch.manual_seed(0)
    net = MarginalisedCritic(spec, current=current, style=style, hidden=[16])
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    actions = torch.tensor(list(itertools.product((0, 1, 1, 2, 2), range(3))))
    target = GAME[actions[:, 0], actions[:, 1]].view(-1, 1, 1).expand(-1, 2, 1)
    for _ in range(200):
        rows = rows_of(actions, torch.tensor([FIRST, SECOND]), spec)
        net.normaliser.update(target)
        loss = (net.predict(rows) - net.normaliser.normalise(target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def value_of_first(net: MarginalisedCritic, second: tuple[float, ...]) -> float:
    """``V_0`` where agent 1 plays ``second``."""
    rows = rows_of(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([FIRST, second]), net.spec)
    with torch.no_grad():
        return float(net(rows)[keys.STATE_VALUE][0, 0])


MOVED = [(0.8, 0.1, 0.1), (0.05, 0.9, 0.05), (1.0, 1e-9, 1e-9)]


@pytest.mark.parametrize("style", ["v", "q"])
def test_regressed_at_executed_actions_it_learns_what_the_others_actions_are_worth(style: Any) -> None:
    net = learnt("executed", style)
    rows = rows_of(marginal.joint_actions(2, 3), torch.tensor([FIRST, SECOND]), net.spec)
    with torch.no_grad():
        found = net.normaliser.denormalise(net.at_executed(rows))[:, 0].view(3, 3, -1)
    if style == "v":
        truth = torch.tensor(FIRST) @ GAME
        assert truth.tolist() == pytest.approx([-8, -2.4, -2.4])
        assert (found[0, :, 0] - truth).abs().max() < 0.3
    else:
        assert (found[0].T - GAME).abs().max() < 0.3
    for second in MOVED:
        expected = float(torch.tensor(FIRST) @ GAME @ torch.tensor(second))
        assert value_of_first(net, second) == pytest.approx(expected, abs=0.3)


def test_regressed_at_samples_only_the_mean_is_learnt() -> None:
    """The samples have nothing to do with what was played: the value is right for the policies that played, and for no others."""
    net = learnt("sampled", "v")
    mean = float(torch.tensor(FIRST) @ GAME @ torch.tensor(SECOND))
    assert value_of_first(net, SECOND) == pytest.approx(mean, abs=0.3)
    truths = [float(torch.tensor(FIRST) @ GAME @ torch.tensor(second)) for second in MOVED]
    assert max(abs(value_of_first(net, second) - truth) for second, truth in zip(MOVED, truths, strict=True)) > 2
