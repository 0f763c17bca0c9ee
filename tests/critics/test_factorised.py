"""Team values made of the agents' own: against loops of numpy, finite differences and enumeration (MIX-1)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.critics.factorised import FactorisedCritic
from marlkit.spec import Discrete, TeamSpec

ROWS, N, ACTIONS, STATE = 5, 3, 4, 6
SPEC = TeamSpec(N, 2, Discrete(ACTIONS), state=STATE, team_reward=True)


@pytest.fixture(autouse=True)
def _in_double_precision() -> object:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch_of(values: Tensor, action: Tensor, state: Tensor) -> TensorDict:
    agents = {"action_values": values, "action": action}
    return TensorDict({"agents": agents, "state": state}, batch_size=values.shape[:1])


def some(seed: int = 0) -> TensorDict:
    draw = torch.Generator().manual_seed(seed)
    action = torch.randint(ACTIONS, (ROWS, N), generator=draw)
    return batch_of(torch.randn(ROWS, N, ACTIONS, generator=draw), action, 3 * torch.randn(ROWS, STATE, generator=draw))


def qmix(hidden: list[int]) -> FactorisedCritic:
    return FactorisedCritic(SPEC, mixing="monotone", embedding=4, hidden=hidden, initialisation="uniform")


def by_hand(critic: FactorisedCritic, values: np.ndarray, state: np.ndarray) -> float:
    """QMIX of one row, neuron by neuron."""
    weights = {name: value.detach().numpy() for name, value in critic.named_parameters()}

    def network(name: str) -> np.ndarray:
        x = state
        for layer in range(1 + (f"networks.{name}.layers.1.weights.0" in weights)):
            x = np.maximum(x, 0.0) if layer else x
            x = weights[f"networks.{name}.layers.{layer}.weights.0"] @ x + weights[f"networks.{name}.layers.{layer}.biases.0"]
        return x

    into, bias, out, (last,) = map(network, ("weight", "bias", "final_weight", "final_bias"))
    total = last
    for neuron in range(4):
        x = bias[neuron] + sum(abs(into[4 * agent + neuron]) * values[agent] for agent in range(N))
        total += abs(out[neuron]) * (x if x > 0 else np.exp(x) - 1)
    return float(total)


@pytest.mark.parametrize("hidden", [[], [5]], ids=["linear", "two layers"])
def test_the_monotone_mixture_is_that_of_qmix(hidden: list[int]) -> None:
    critic, batch = qmix(hidden), some()
    found = critic(batch.clone())[keys.ACTION_VALUE]
    assert found.shape == (ROWS, N, 1)
    for row in range(ROWS):
        taken = [batch[keys.ACTION_VALUES][row, agent, batch[keys.ACTION][row, agent]].item() for agent in range(N)]
        wanted = by_hand(critic, np.array(taken), batch[keys.STATE][row].numpy())
        assert found[row].flatten().tolist() == pytest.approx([wanted] * N, abs=1e-12)


def test_a_sum_is_the_teams_and_without_mixing_each_agent_has_its_own() -> None:
    batch = some()
    own = batch[keys.ACTION_VALUES].gather(-1, batch[keys.ACTION].unsqueeze(-1))
    assert torch.equal(FactorisedCritic(SPEC).predict(batch), own)
    torch.testing.assert_close(FactorisedCritic(SPEC, mixing="sum").predict(batch), own.sum(1, keepdim=True).expand(-1, N, -1))
    alone = TeamSpec(1, 2, Discrete(ACTIONS), team_reward=True)
    single = batch_of(batch[keys.ACTION_VALUES][:, :1], batch[keys.ACTION][:, :1], batch[keys.STATE])
    assert torch.equal(FactorisedCritic(alone).predict(single), FactorisedCritic(alone, mixing="sum").predict(single))


@pytest.mark.parametrize("mixing", ["sum", "monotone"])
def test_no_value_falls_where_an_agents_rises(mixing: str) -> None:
    critic = qmix([5]) if mixing == "monotone" else FactorisedCritic(SPEC, mixing="sum")
    for seed in range(20):
        batch = some(seed)
        before = critic.predict(batch)
        for agent in range(N):
            moved = batch.clone()
            moved[keys.ACTION_VALUES][:, agent] += 1e-3
            assert (critic.predict(moved) >= before).all()


@pytest.mark.parametrize("mixing", ["sum", "monotone"])
def test_greedy_agents_are_a_greedy_team(mixing: str) -> None:
    critic = qmix([5]) if mixing == "monotone" else FactorisedCritic(SPEC, mixing="sum")
    batch = some()
    joint = torch.tensor(list(itertools.product(range(ACTIONS), repeat=N)))
    for row in range(ROWS):
        values, state = (batch[key][row].expand(len(joint), *batch[key].shape[1:]) for key in (keys.ACTION_VALUES, keys.STATE))
        best = critic.predict(batch_of(values, joint, state))[:, 0, 0].argmax()
        assert joint[best].tolist() == batch[keys.ACTION_VALUES][row].argmax(-1).tolist()
