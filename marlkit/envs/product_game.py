"""The product game: every agent is paid the product of all actions; zero is a saddle, and the signs have to be agreed on."""

from __future__ import annotations

import torch
from torch import Tensor

from marlkit.component import Runtime
from marlkit.contract import Contract
from marlkit.envs._adapter import WRITES
from marlkit.envs.one_step import OneStepGame
from marlkit.errors import OptionError
from marlkit.options import Finite, PositiveFloat, PositiveInt
from marlkit.spec import Continuous, TeamSpec


class ProductGameEnvironment(OneStepGame):
    r"""One step, one real action x per agent, team reward :math:`r = \prod_i a_i`, :math:`a_i = start_i + deviation \, x_i`.

    The gradient of agent i's expected reward with respect to the mean of :math:`a_i` is the product of the others' means, so that
    an estimate of the counterfactual quantities can be compared with the exact value.

    A policy starts about :math:`x = 0`, that is where the game says. From (-0.25, 0.25) trust-region steps of radius 0.5 that two
    agents take at once lower the expected reward from -0.0625 to -0.5625, and raise it to 0.9375 where they take turns (the
    example of Kuba et al. 2022 for sequential updates)::

        env: {type: product_game, start: [-0.25, 0.25], limit: 2.0}

    Args:
        runtime: device.
        num_envs: number of games B played at once.
        n_agents: number of agents N; 2 gives r = a1·a2.
        start: what each agent's action is counted from; `null`: 0.
        deviation: what an action of 1 adds to it.
        limit: size that no :math:`a_i` exceeds; `null`: unbounded.

    Raises:
        OptionError: `start` is not one number for each agent.
    """

    contract = Contract(
        writes=WRITES,
        traits=("continuous", "team_reward"),
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        num_envs: PositiveInt = 64,
        n_agents: PositiveInt = 2,
        start: list[Finite] | None = None,
        deviation: PositiveFloat = 1.0,
        limit: PositiveFloat | None = None,
    ) -> None:
        if start is not None and len(start) != n_agents:
            raise OptionError("start", f"must be one number for each of the {n_agents} agents, got {start}")
        self._start = torch.tensor([0.0] * n_agents if start is None else start, device=runtime.device)
        self._deviation, self._limit = deviation, limit
        spec = TeamSpec(n_agents=n_agents, observation=1, action=Continuous(1), horizon=1, team_reward=True)
        super().__init__(runtime, spec, num_envs)

    def payoff(self, action: Tensor) -> Tensor:
        """The product over agents of what actions ``[B, N, 1]`` stand for: ``[B]``."""
        played = self._start + self._deviation * action.squeeze(-1)
        if self._limit is not None:
            played = played.clamp(-self._limit, self._limit)
        return played.prod(dim=1)
