"""The counterfactual advantage: an action's value minus the mean over the agent's own actions (COMA, Foerster et al. 2018)."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from marlkit import keys
from marlkit.component import Estimator
from marlkit.contract import Contract
from marlkit.ranks import ALONE, Ranks
from marlkit.spec import TeamSpec


class CounterfactualEstimator(Estimator):
    """``A_i = Q_i(s, a) - sum_b pi_i(b | o_i) Q_i(s, (b, a_-i))``, both from the critic.

    The sum is the state value of a critic over own actions, such as `counterfactual` or `attention`.

    Args:
        spec: the team.
        target: estimator of the value target; in COMA `{type: td_lambda, lmbda: 0.8, bootstrap: action_value}`.
    """

    contract = Contract(reads=(keys.ACTION_VALUE, keys.STATE_VALUE), writes=(keys.ADVANTAGE,))

    def __init__(self, spec: TeamSpec, *, target: Estimator) -> None:
        super().__init__()
        self.spec = spec
        self.target = target

    def observe(self, played: TensorDictBase, ranks: Ranks = ALONE) -> None:
        """Let ``target`` see the steps ``[B, T]`` that were just played."""
        self.target.observe(played, ranks)

    @torch.no_grad()
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ``VALUE_TARGET`` as ``target`` does, and ``ADVANTAGE``, on a batch ``[B, T]``."""
        self.target(batch)
        return batch.set(keys.ADVANTAGE, batch[keys.ACTION_VALUE] - batch[keys.STATE_VALUE])
