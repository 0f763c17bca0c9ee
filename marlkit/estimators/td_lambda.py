"""TD(lambda) returns: n-step returns of every length, averaged (Sutton and Barto 2018, chapter 12)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from marlkit.contract import Contract
from marlkit.estimators._bootstrapping import READS, WRITES, BootstrappingEstimator
from marlkit.functional.returns import lambda_return
from marlkit.options import Discount, Probability
from marlkit.spec import TeamSpec


class TdLambdaEstimator(BootstrappingEstimator):
    """``G_t = r_t + gamma (1 - terminated_t) ((1 - L_t) U_t + L_t G_{t+1})``, ``L_t = lmbda (1 - done_t)``.

    ``L_t`` is zero at the last step of a rollout. ``U_t`` is ``V(s'_t)`` or ``Q(s'_t, a'_t)``; ``s'_t`` is the state before any
    reset. With a state value the advantage is ``A_t = G_t - V(s_t)``: generalised advantage estimation, unless targets lag.

    Args:
        spec: the team.
        gamma: discount factor; 0.9 to 0.999.
        lmbda: 0 for one-step returns (biased, quiet), 1 for whole returns (unbiased, noisy); 0.8 in COMA.
        options: those of :class:`BootstrappingEstimator`.
    """

    contract = Contract(reads=READS, writes=WRITES, needs={"data": ("on_policy",)})

    def __init__(self, spec: TeamSpec, *, gamma: Discount = 0.99, lmbda: Probability = 0.8, **options: Any) -> None:
        super().__init__(spec, **options)
        self.gamma = gamma
        self.lmbda = lmbda

    def returns(self, reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
        """The TD(lambda) return."""
        return lambda_return(reward, next_value, terminated, done, gamma=self.gamma, lmbda=self.lmbda)
