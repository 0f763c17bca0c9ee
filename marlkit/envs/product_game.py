"""The product game: every agent is paid the product of all actions; zero is a saddle, and the signs have to be agreed on."""

from __future__ import annotations

from torch import Tensor

from marlkit.component import Runtime
from marlkit.contract import Contract
from marlkit.envs._adapter import WRITES
from marlkit.envs.one_step import OneStepGame
from marlkit.options import PositiveInt
from marlkit.spec import Continuous, TeamSpec


class ProductGameEnvironment(OneStepGame):
    r"""One step, one unbounded real action per agent, team reward :math:`r = \prod_i a_i`.

    The gradient of agent i's expected reward with respect to its mean is the product of the others' means, so that an estimate
    of the counterfactual quantities can be compared with the exact value.

    Args:
        runtime: device.
        num_envs: number of games B played at once.
        n_agents: number of agents N; 2 gives r = a1·a2.
    """

    contract = Contract(
        writes=WRITES,
        traits=("continuous", "team_reward"),
    )

    def __init__(self, runtime: Runtime, *, num_envs: PositiveInt = 64, n_agents: PositiveInt = 2) -> None:
        spec = TeamSpec(n_agents=n_agents, observation=1, action=Continuous(1), horizon=1, team_reward=True)
        super().__init__(runtime, spec, num_envs)

    def payoff(self, action: Tensor) -> Tensor:
        """The product over agents of ``[B, N, 1]``: ``[B]``."""
        return action.squeeze(-1).prod(dim=1)
