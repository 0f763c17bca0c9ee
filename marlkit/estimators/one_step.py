"""One-step returns: a reward and the value of where it led, from data of any age (Sutton 1988; with replay, Lin 1992)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from marlkit.contract import Contract
from marlkit.estimators._bootstrapping import READS, WRITES, BootstrappingEstimator
from marlkit.functional.returns import lambda_return
from marlkit.options import Discount
from marlkit.spec import TeamSpec


class OneStepEstimator(BootstrappingEstimator):
    """``G_t = r_t + gamma (1 - terminated_t) U_t``.

    ``U_t`` is ``V(s'_t)`` or ``Q(s'_t, a'_t)``, ``s'_t`` being the state before any reset. Steps need not follow one another, so
    that batches may come from the past. With a state value the advantage is ``A_t = G_t - V(s_t)``.

    Args:
        spec: the team.
        gamma: discount factor; 0.9 to 0.999.
        options: those of :class:`BootstrappingEstimator`.
    """

    contract = Contract(reads=READS, writes=WRITES)

    def __init__(self, spec: TeamSpec, *, gamma: Discount = 0.99, **options: Any) -> None:
        super().__init__(spec, **options)
        self.gamma = gamma

    def returns(self, reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
        """The TD(0) return."""
        return lambda_return(reward, next_value, terminated, done, gamma=self.gamma, lmbda=0.0)
