"""What critics have in common that value every own action at once: the executed action's value, and the mean under the policy."""

from __future__ import annotations

from abc import abstractmethod

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Critic, least
from marlkit.functional.counterfactual import executed_value, policy_value


class VectorCritic(Critic):
    """Base of critics whose output holds ``Q_i[b]`` for every own action ``b`` (discrete actions), and no own action as input.

    The value of the executed action is picked from it, and the state value ``sum_b pi_i(b) Q_i[b]`` is exact.
    """

    @abstractmethod
    def action_values(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` of every own action, by each network, in normalised units: ``[K, *, N, A]``."""

    def predictions(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` of the executed actions, by each network, in normalised units: ``[K, *, N, 1]``."""
        return executed_value(self.action_values(batch), batch[keys.ACTION])

    def predict(self, batch: TensorDictBase) -> Tensor:
        """The least of :meth:`predictions`, ``[*, N, 1]``."""
        return least(self.predictions(batch))

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ``Q_i`` of every own action, of the executed one, and its mean under the policy, in real units."""
        return write_action_values(batch, self.normaliser.denormalise(least(self.action_values(batch))))


def write_action_values(batch: TensorDictBase, values: Tensor) -> TensorDictBase:
    """Write ``Q_i`` ``[*, N, A]`` of every own action, of the one taken, and its mean under the policy, on a batch ``[*]``."""
    batch.set(keys.ACTION_VALUES, values)
    batch.set(keys.ACTION_VALUE, executed_value(values, batch[keys.ACTION]))
    return batch.set(keys.STATE_VALUE, policy_value(values, batch[keys.LOGITS]))
