"""What sums and monotone mixtures can represent: the games of QTRAN (Son et al. 2019) and of QMIX (Rashid et al. 2018)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit.critics.factorised import FactorisedCritic
from marlkit.spec import Discrete, TeamSpec

CLIMB = [[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 0.0]]
RISING = [[0.0, 1.0], [1.0, 8.0]]
"""State 2B of the two-step game; in state 2A all is worth 7, and the first agent's action in state 1 decides which follows."""
EQUAL = [[7.0, 7.0], [7.0, 7.0]]


@pytest.fixture(autouse=True)
def _in_double_precision() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Game:
    """A mixture of two agents' tables, one per state, fitted to payoffs of all joint actions by least squares.

    Args:
        mixing: of the critic.
        actions: of each agent.
        states: number of them.
    """

    def __init__(self, mixing: Any, actions: int, states: int = 1) -> None:
        spec = TeamSpec(2, 1, Discrete(actions), state=states, team_reward=True)
        self.critic = FactorisedCritic(spec, mixing=mixing, embedding=8, hidden=[16])
        self.table = torch.nn.Parameter(0.1 * torch.randn(states, 2, actions))
        self.joint = torch.tensor(list(itertools.product(range(actions), repeat=2)))
        self.states = torch.eye(states)

    def values(self) -> Tensor:
        """``Q`` of each state and joint action, ``[S, A, A]``."""
        shape = (len(self.states), len(self.joint))
        agents = {
            "action_values": self.table.unsqueeze(1).expand(*shape, *self.table.shape[1:]),
            "action": self.joint.expand(*shape, 2),
        }
        batch = TensorDict({"agents": agents, "state": self.states.unsqueeze(1).expand(*shape, -1)}, batch_size=list(shape))
        return self.critic.predict(batch)[..., 0, 0].unflatten(1, self.table.shape[-1:] * 2)

    def fit(self, payoffs: Any, steps: int = 500) -> Tensor:
        """The values that are nearest to the payoffs ``[S, A, A]``, after so many steps at most."""
        goal = torch.as_tensor(payoffs)
        parameters = [self.table, *self.critic.parameters()]
        solver = torch.optim.LBFGS(
            parameters, max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def error() -> Tensor:
            solver.zero_grad()
            loss = (self.values() - goal).square().sum()
            loss.backward()
            return loss

        solver.step(error)
        return self.values().detach()


def test_sums_fit_rows_and_columns_less_the_mean() -> None:
    found = Game("sum", 3).fit([CLIMB])[0]
    assert found[0, 0].item() == pytest.approx(-56 / 9, abs=1e-6)
    assert found[0, 1].item() == pytest.approx(-44 / 9, abs=1e-6)
    assert found[1, 1].item() == pytest.approx(-32 / 9, abs=1e-6)
    assert found.argmax().item() != 0, "the best joint action is not the greedy one"


def test_a_monotone_mixture_cannot_represent_what_depends_on_the_order_of_another() -> None:
    found = Game("monotone", 3).fit([CLIMB], steps=60)[0]
    # Whether the first action is ranked above another or below it, two payoffs of a row or column are on the wrong side.
    assert (found - torch.tensor(CLIMB)).square().sum() > 100


def test_a_monotone_mixture_represents_a_monotone_game_and_a_sum_does_not() -> None:
    torch.testing.assert_close(Game("sum", 2).fit([RISING])[0], torch.tensor([[-1.5, 2.5], [2.5, 6.5]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(Game("monotone", 2).fit([RISING])[0], torch.tensor(RISING), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("mixing", "best"), [("sum", 0), ("monotone", 1)])
def test_sums_settle_for_the_worse_state_of_the_two_step_game_and_mixtures_find_the_better(mixing: str, best: int) -> None:
    game = Game(mixing, 2, states=3)
    later = game.fit([[[0.0, 0.0], [0.0, 0.0]], EQUAL, RISING])[1:].amax((1, 2))
    assert later.tolist() == pytest.approx([7.0, 6.5] if mixing == "sum" else [7.0, 8.0], abs=1e-2)
    first = later.unsqueeze(-1).expand(2, 2)
    values = game.fit(torch.stack([first, torch.tensor(EQUAL), torch.tensor(RISING)]))[0]
    assert values.amax(1).argmax().item() == best
