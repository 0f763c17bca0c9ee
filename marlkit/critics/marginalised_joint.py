"""The joint critic averaged over what the others may do: PERLA's critic (Jafferjee et al. 2022) for MADDPG."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract, When
from marlkit.critics._over_others import READS, OverOthersCritic
from marlkit.keys import Key
from marlkit.nn.actions import action_features
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import ValueNorm
from marlkit.spec import TeamSpec

OWN: Key = ("agents", "own_features")
"""What each agent does or may do, as features ``[*, N, F]``; stays inside the critic."""


class MarginalisedJointCritic(OverOthersCritic):
    """``Q_i(x_i, a_i) = (1/K) sum_k Q_i(x_i, a_i, a_-i^(k))``, ``a_j^(k) ~ pi_j(. | o_j)``, differentiable in ``a_i``.

    Targets are bootstrapped with this mean, and agent i's actor climbs it, so that neither is told by one joint action alone.
    What is regressed is ``Q_i(x_i, a_i, a_-i)`` at the executed joint action, whose target is a proper Bellman equation. On
    replayed steps the samples are drawn from what the agents would do now.

    Agent i's own action enters beside the view, once for all samples. Continuous actions enter within the bounds of the
    environment, as it executes them, and what an agent's actions are padded with never enters.

    Args:
        spec: the team.
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
        options: those of :class:`OverOthersCritic`.
    """

    contract = Contract(
        reads=(
            *READS,
            keys.ACTION,
            keys.JOINT_ACTION,
        ),
        writes=(keys.ACTION_VALUE, keys.EXECUTED_VALUE),
        traits=("differentiable_in_action", When("share=none", ("separate_parameters",))),
        needs={"actor": ("independent_agents",), "env": (When("exact=always", ("discrete",)),)},
        predicts=keys.EXECUTED_VALUE,
    )

    def __init__(self, spec: TeamSpec, *, value_norm: ValueNorm = True, **options: Any) -> None:
        # An actor that climbs saturates on the slope of a critic that has learnt nothing, unless there is hardly any.
        super().__init__(spec, 1, spec.action_features, 0.01, **options)
        self.normaliser = ValueNormaliser(enabled=value_norm)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` of the actions taken, the others' executed ones too, in normalised units: ``[*, N, 1]``."""
        return self.at_executed(self._with_own(batch))

    def action_value(self, batch: TensorDictBase, own: Tensor, joint: Tensor) -> Tensor:
        """The mean over samples of ``Q_i`` of ``own`` ``[*, N, F]``, ``[1, *, N, 1]``; the samples stand for ``joint``."""
        return self.averaged(self._with_own(batch, own)).unsqueeze(0)

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write the mean over samples, and the value at the executed actions, of a batch ``[*]`` in real units."""
        seen = self._with_own(batch)
        batch.set(keys.EXECUTED_VALUE, self.normaliser.denormalise(self.at_executed(seen)))
        return batch.set(keys.ACTION_VALUE, self.normaliser.denormalise(self.averaged(seen)))

    def _with_own(self, batch: TensorDictBase, own: Tensor | None = None) -> TensorDictBase:
        """A copy of the batch that knows the own actions' features, those taken unless given."""
        if own is None:
            own = action_features(batch[keys.ACTION], self.spec, self.action_layer.weights[0].dtype)
        return batch.copy().set(OWN, self.bounds.without_padding(own))

    def _view(self, batch: TensorDictBase) -> Tensor:
        view = super()._view(batch)
        return torch.cat([view.expand(*view.shape[:-2], self.spec.n_agents, -1), batch[OWN]], -1)
