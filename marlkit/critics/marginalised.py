"""The marginalised critic: values averaged over what the other agents may do (PERLA, Jafferjee et al. 2022)."""

from __future__ import annotations

from typing import Any, Literal

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract, When
from marlkit.critics._over_others import READS, OverOthersCritic
from marlkit.critics._vector import write_action_values
from marlkit.functional.counterfactual import executed_value
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import ValueNorm
from marlkit.spec import TeamSpec


class MarginalisedCritic(OverOthersCritic):
    """``V_i = (1/K) sum_k V_i(x_i, a_-i^(k))``, ``a_j^(k) ~ pi_j(. | o_j)``: what values are bootstrapped with, and the baseline.

    ``x_i`` is the state (PERLA_MAPPO) or agent i's own observation (PERLA_IPPO). With `style: q` the network gives
    ``Q_i(x_i, b, a_-i)`` of every own action ``b``, and the mean over samples is taken of each; the state value is its mean under
    agent i's own policy. Neither depends on the action that agent i took.

    What is regressed on the return decides what is learnt. With `current: sampled` it is the mean over samples, as in Algorithm 1
    of the paper: the samples have nothing to do with what was played, so that only their mean is determined, not how the value
    depends on the others' actions. With `current: executed` it is the value at the others' executed actions, ``V_i(x_i, a_-i) =
    E[r + gamma V_i(x'_i)]``, which determines that too, and needs no samples where there are gradients (docs/perla.md).

    Args:
        spec: the team.
        current: the value that is regressed: `executed`, at the executed actions, or `sampled`, the mean over samples.
        style: `v`, a state value, or `q`, values of every own discrete action, as the estimator `counterfactual` reads them.
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
        options: those of :class:`OverOthersCritic`.
    """

    contract = Contract(
        reads=(
            *READS,
            When("current=executed", (keys.JOINT_ACTION,)),
            When("style=q", (keys.ACTION,)),
            When("style=q & discrete", (keys.LOGITS,)),
        ),
        writes=(
            keys.STATE_VALUE,
            When("style=q", (keys.ACTION_VALUES, keys.ACTION_VALUE)),
            When("current=executed", (keys.EXECUTED_VALUE,)),
        ),
        traits=(When("style=q", ("action_values",)), When("share=none", ("separate_parameters",))),
        needs={
            "actor": ("independent_agents",),
            "env": (When("style=q", ("discrete",)), When("exact=always", ("discrete",))),
        },
        formerly={"current": "sampled"},
        predicts=(
            When("current=sampled & style=v", (keys.STATE_VALUE,)),
            When("current=sampled & style=q", (keys.ACTION_VALUE,)),
            When("current=executed", (keys.EXECUTED_VALUE,)),
        ),
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        current: Literal["executed", "sampled"] = "executed",
        style: Literal["v", "q"] = "v",
        value_norm: ValueNorm = True,
        **options: Any,
    ) -> None:
        super().__init__(spec, spec.action_features if style == "q" else 1, **options)
        self.current = current
        self.style = style
        self.normaliser = ValueNormaliser(enabled=value_norm)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """The value that is regressed, of the own action taken with `style: q`, in normalised units: ``[*, N, 1]``."""
        values = self.at_executed(batch) if self.current == "executed" else self.averaged(batch)
        return executed_value(values, batch[keys.ACTION]) if self.style == "q" else values

    def action_values(self, batch: TensorDictBase) -> Tensor:
        """The mean over samples of ``Q_i`` of every own action, in normalised units: ``[1, *, N, A]`` (`style: q`)."""
        return self.averaged(batch).unsqueeze(0)

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write the means over samples, and with `current: executed` the value at the executed actions, in real units."""
        values = self.normaliser.denormalise(self.averaged(batch))
        if self.current == "executed":
            batch.set(keys.EXECUTED_VALUE, self.normaliser.denormalise(self.predict(batch)))
        return write_action_values(batch, values) if self.style == "q" else batch.set(keys.STATE_VALUE, values)
