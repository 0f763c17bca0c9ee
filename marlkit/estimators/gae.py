"""Generalised advantage estimation (Schulman et al. 2016), over any critic that writes a state value."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase

from marlkit import keys
from marlkit.contract import Contract
from marlkit.estimators._ends import terminated_and_done
from marlkit.estimators._rewards import RewardEstimator
from marlkit.functional.returns import bootstrap_drift, generalised_advantage
from marlkit.options import Discount, Probability
from marlkit.spec import TeamSpec


class GaeEstimator(RewardEstimator):
    """``A_t = delta_t + gamma lmbda (1 - done_t) A_{t+1}``, ``delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)``.

    ``s'_t`` is the state before any reset, so that a time limit is bootstrapped and a true end is not. Where the value that
    lagging targets give ``s'_t`` differs from the critic's value of ``s_{t+1}``, the difference is removed from the recursion, so
    that the value target is the TD(lambda) return.

    Args:
        spec: the team.
        gamma: discount factor; 0.9 to 0.999.
        lmbda: 0 for one-step errors (bias, low variance), 1 for whole returns (no bias, high variance); usually 0.9 to 0.97.
        options: those of :class:`marlkit.estimators._rewards.RewardEstimator`.
    """

    contract = Contract(
        reads=(keys.REWARD, keys.TERMINATED, keys.DONE, keys.STATE_VALUE, keys.following(keys.STATE_VALUE)),
        writes=(keys.ADVANTAGE, keys.VALUE_TARGET),
        needs={"data": ("on_policy",)},
    )

    def __init__(self, spec: TeamSpec, *, gamma: Discount = 0.99, lmbda: Probability = 0.95, **options: Any) -> None:
        super().__init__(spec, **options)
        self.gamma = gamma
        self.lmbda = lmbda

    @torch.no_grad()
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ``ADVANTAGE`` and ``VALUE_TARGET`` (``A_t + V(s_t)``) on a rollout ``[B, T]``."""
        value, next_value = batch[keys.STATE_VALUE], batch[keys.following(keys.STATE_VALUE)]
        decay = {"gamma": self.gamma, "lmbda": self.lmbda}
        terminated, done = terminated_and_done(batch)
        drift = bootstrap_drift(value, next_value, done, **decay)
        advantage, target = generalised_advantage(self.rewards(batch) + drift, value, next_value, terminated, done, **decay)
        return batch.set(keys.ADVANTAGE, advantage).set(keys.VALUE_TARGET, target)
