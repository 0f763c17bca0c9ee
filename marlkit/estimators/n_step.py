"""n-step returns: n rewards, then the value of the state that they lead to (PERLA on level-based foraging, IA2C)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from marlkit.contract import Contract
from marlkit.estimators._bootstrapping import READS, WRITES, BootstrappingEstimator
from marlkit.functional.returns import n_step_return
from marlkit.options import Discount, PositiveInt
from marlkit.spec import TeamSpec


class NStepEstimator(BootstrappingEstimator):
    """``G_t = sum_{k<n} gamma^k r_{t+k} + gamma^n U_{t+n}``, cut short where the episode or the rollout ends.

    ``U_{t+n}`` is ``V(s_{t+n})`` or ``Q(s_{t+n}, a_{t+n})``. With a state value the advantage is ``A_t = G_t - V(s_t)``.

    Args:
        spec: the team.
        gamma: discount factor; 0.9 to 0.999.
        n: number of rewards; 5 (EPyMARL) to 10 (PERLA).
        options: those of :class:`BootstrappingEstimator`.
    """

    contract = Contract(reads=READS, writes=WRITES, needs={"data": ("on_policy",)})

    def __init__(self, spec: TeamSpec, *, gamma: Discount = 0.99, n: PositiveInt = 5, **options: Any) -> None:
        super().__init__(spec, **options)
        self.gamma = gamma
        self.n = n

    def returns(self, reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
        """The n-step return."""
        return n_step_return(reward, next_value, terminated, done, gamma=self.gamma, n=self.n)
