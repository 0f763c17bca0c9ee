"""n-step returns: n rewards, then the value of the state that they lead to (PERLA on level-based foraging, IA2C)."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from marlkit import keys
from marlkit.component import Estimator
from marlkit.contract import Contract
from marlkit.functional.returns import n_step_return
from marlkit.options import Discount, PositiveInt
from marlkit.spec import TeamSpec


class NStepEstimator(Estimator):
    """``G_t = sum_{k<n} gamma^k r_{t+k} + gamma^n V(s_{t+n})``, cut short where the episode or the rollout ends.

    The advantage is ``A_t = G_t - V(s_t)``.

    Args:
        spec: the team.
        gamma: discount factor; 0.9 to 0.999.
        n: number of rewards; 5 (EPyMARL) to 10 (PERLA).
    """

    contract = Contract(
        reads=(keys.REWARD, keys.TERMINATED, keys.DONE, keys.STATE_VALUE, keys.following(keys.STATE_VALUE)),
        writes=(keys.ADVANTAGE, keys.VALUE_TARGET),
    )

    def __init__(self, spec: TeamSpec, *, gamma: Discount = 0.99, n: PositiveInt = 5) -> None:
        super().__init__()
        self.spec = spec
        self.gamma = gamma
        self.n = n

    @torch.no_grad()
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ``ADVANTAGE`` and ``VALUE_TARGET`` on a rollout ``[B, T]``."""
        target = n_step_return(
            batch[keys.REWARD],
            batch[keys.following(keys.STATE_VALUE)],
            batch[keys.TERMINATED],
            batch[keys.DONE],
            gamma=self.gamma,
            n=self.n,
        )
        return batch.set(keys.ADVANTAGE, target - batch[keys.STATE_VALUE]).set(keys.VALUE_TARGET, target)
