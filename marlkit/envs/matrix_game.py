"""Matrix games: one discrete move each, every agent is paid the entry of a payoff table.

`cooperation` is the game of Jafferjee et al. 2022 ("PERLA", section on matrix games), `climbing` and `penalty` are those of Claus
and Boutilier 1998 ("The dynamics of reinforcement learning in cooperative multiagent systems", figures 2 and 3).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from marlkit.component import Runtime
from marlkit.contract import Contract
from marlkit.envs._adapter import WRITES
from marlkit.envs.one_step import OneStepGame
from marlkit.errors import OptionError
from marlkit.options import PositiveInt, Range
from marlkit.spec import Discrete, TeamSpec

CLIMBING = ((11.0, -30.0, 0.0), (-30.0, 7.0, 6.0), (0.0, 0.0, 5.0))
PENALTY = ((10.0, 0.0, -100.0), (0.0, 2.0, 0.0), (-100.0, 0.0, 10.0))
"""With k = -100, a value at which Claus and Boutilier find convergence to the optimum rare; other k: option `payoff`."""


class MatrixGameEnvironment(OneStepGame):
    """One step, one of A moves per agent, the same reward for all.

    - `cooperation`: 8 if all choose the first move, -12 if some but not all do, 0 if none does; any N and A. The paper's table
      is for two agents; -12 for every mixed outcome is the reading taken here for more.
    - `climbing`: 11 at (0, 0), next to penalties of -30, with a safe path through 7, 6 and 5; two agents, three moves.
    - `penalty`: 10 at (0, 0) and (2, 2), -100 where one agent aims at each, 2 in the middle; two agents, three moves.
    - `xor`: 1 if not all choose the same move, else 0; for two agents r = [a1 ≠ a2]; any N and A.

    Args:
        runtime: device.
        game: which table.
        payoff: a table of your own instead, as nested lists: N levels of A numbers.
        num_envs: number of games B played at once.
        n_agents: number of agents N, 2 to 20; `null` means what the table needs, or 2.
        n_actions: number of moves A, 2 to 15; `null` means what the table needs, or 3 (2 for `xor`).

    Raises:
        OptionError: the table is not N levels of A numbers, or `n_agents` or `n_actions` does not fit it.
    """

    contract = Contract(
        writes=WRITES,
        traits=("discrete", "team_reward"),
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        game: Literal["cooperation", "climbing", "penalty", "xor"] = "cooperation",
        payoff: list[Any] | None = None,
        num_envs: PositiveInt = 64,
        n_agents: Annotated[int, Range(at_least=2, at_most=20)] | None = None,
        n_actions: Annotated[int, Range(at_least=2, at_most=15)] | None = None,
    ) -> None:
        self._game = game
        self._table: Tensor | None = None
        if payoff is not None or game in _TABLES:
            self._table = _table(_TABLES[game] if payoff is None else payoff).to(runtime.device)
            given = {"n_agents": (n_agents, self._table.ndim), "n_actions": (n_actions, self._table.shape[0])}
            for option, (wanted, has) in given.items():
                if wanted not in (None, has):
                    raise OptionError(option, f"the payoff table has {has}, not {wanted}; leave it out or set it to {has}")
            n_agents, n_actions = self._table.ndim, self._table.shape[0]
        n_agents = n_agents or 2
        n_actions = n_actions or (2 if game == "xor" else 3)
        spec = TeamSpec(n_agents=n_agents, observation=1, action=Discrete(n_actions), horizon=1, team_reward=True)
        super().__init__(runtime, spec, num_envs)

    def payoff(self, action: Tensor) -> Tensor:
        """The entries of the table at joint moves ``[B, N]``: ``[B]``."""
        if self._table is not None:
            entries: Tensor = self._table[tuple(action.unbind(1))]
            return entries
        if self._game == "xor":
            return (action != action[:, :1]).any(1).float()
        first = action == 0
        return torch.where(first.all(1), 8.0, torch.where(first.any(1), -12.0, 0.0))


_TABLES: dict[str, Any] = {"climbing": CLIMBING, "penalty": PENALTY}


def _table(payoff: Any) -> Tensor:
    try:
        table = torch.tensor(payoff, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise OptionError("payoff", f"must be N levels of lists of A numbers each ({error})") from error
    if table.ndim == 0 or len(set(table.shape)) != 1:
        raise OptionError("payoff", f"must have A entries on each of its N levels, got the shape {list(table.shape)}")
    if table.ndim < 2 or len(table) < 2:
        raise OptionError("payoff", f"must have at least 2 levels of 2 entries, got the shape {list(table.shape)}")
    if not table.isfinite().all():
        raise OptionError("payoff", "must have finite entries")
    return table
