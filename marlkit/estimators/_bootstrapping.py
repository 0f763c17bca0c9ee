"""The common part of estimators whose returns are bootstrapped with one value: the choice of the value, keys and advantage."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.contract import When
from marlkit.estimators._ends import terminated_and_done
from marlkit.estimators._rewards import RewardEstimator
from marlkit.keys import Key
from marlkit.spec import TeamSpec

Bootstrap = Literal["state_value", "action_value"]

READS = (
    keys.REWARD,
    keys.TERMINATED,
    keys.DONE,
    When("bootstrap=state_value", (keys.STATE_VALUE, keys.following(keys.STATE_VALUE))),
    When("bootstrap=action_value", (keys.following(keys.ACTION_VALUE),)),
)
"""The keys that the contract of such an estimator reads."""

WRITES = (keys.VALUE_TARGET, When("bootstrap=state_value", (keys.ADVANTAGE,)))
"""The keys that the contract of such an estimator writes."""


class BootstrappingEstimator(RewardEstimator):
    """Base of estimators of a return ``G_t`` that ends in the value ``U`` of a next state.

    With `state_value` the value is that of the state, which is also a baseline: the advantage is ``A_t = G_t - V(s_t)``. With
    `action_value` it is that of the next action, and no advantage is written, because there is no baseline.

    Args:
        spec: the team.
        bootstrap: `state_value`, or `action_value` of the next action, without an advantage.
        options: those of :class:`marlkit.estimators._rewards.RewardEstimator`.
    """

    def __init__(self, spec: TeamSpec, *, bootstrap: Bootstrap = "state_value", **options: Any) -> None:
        super().__init__(spec, **options)
        self.value: Key = {"state_value": keys.STATE_VALUE, "action_value": keys.ACTION_VALUE}[bootstrap]

    @abstractmethod
    def returns(self, reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
        """``G_t``, ``[B, T, N, 1]``; the arguments are those of :mod:`marlkit.functional.returns`."""

    @torch.no_grad()
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ``VALUE_TARGET`` and, with a baseline, ``ADVANTAGE`` on a batch ``[B, T]``."""
        following = batch[keys.following(self.value)]
        target = self.returns(self.rewards(batch), following, *terminated_and_done(batch))
        if self.value == keys.STATE_VALUE:
            batch.set(keys.ADVANTAGE, target - batch[keys.STATE_VALUE])
        return batch.set(keys.VALUE_TARGET, target)
