"""The policy gradient of the action taken (Sutton et al. 2000), with a critic: A2C, IA2C, MAA2C, HAA2C, and COMA's actor."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract
from marlkit.functional import losses
from marlkit.learning import Metrics
from marlkit.optim._actor_critic import JointLossUpdate, Taken
from marlkit.options import PositiveFloat, Repeats
from marlkit.spec import TeamSpec


class PolicyGradientUpdate(JointLossUpdate):
    """Minimise ``-mean(log pi_i(a_i | o_i) A_i) - c_H H + c_V L_V``; the advantage carries no gradient.

    With the ratio ``rho_i = pi_i(a_i | o_i) / pi_old_i(a_i | o_i)`` to the policy of the iteration's start, ``-mean(rho_i A_i)``
    instead: the same gradient at first, and still one of the return where the policy has moved. Inside `sequential` this is
    HAA2C, ``-mean(rho_m M_m)`` (Zhong et al. 2024, "Heterogeneous-agent reinforcement learning").

    The critic is regressed in normalised units on the value target. Agents that are not alive weigh nothing in the policy's loss.

    Args:
        spec: the team.
        surrogate: `log_prob`, or `ratio` for several steps on one batch.
        epochs: passes over the batch; 1 with `log_prob`, which does not allow for a policy that has already moved; 5 in HAA2C.
        options: those of :class:`JointLossUpdate`, some of them with another default.
    """

    contract = Contract(
        reads=(keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE, keys.VALUE_TARGET),
        traits=("per_agent", "by_gradient", "on_policy"),
        needs={"actor": ("stochastic",), "data": ("on_policy",)},
        at_most={"minibatch_size": ("env.num_envs * data.steps",)},
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        surrogate: Literal["log_prob", "ratio"] = "log_prob",
        epochs: Repeats = 1,
        value_clip: PositiveFloat | None = None,
        huber_delta: PositiveFloat | None = None,
        normalise_advantage: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            spec,
            epochs=epochs,
            value_clip=value_clip,
            huber_delta=huber_delta,
            normalise_advantage=normalise_advantage,
            **options,
        )
        self.surrogate = surrogate

    def policy_loss(self, log_prob: Tensor, taken: Taken) -> tuple[Tensor, Metrics]:
        """``-mean(log pi A)``, or ``-mean(rho A)``, of log-probabilities ``[*, n, 1]``."""
        if self.surrogate == "ratio":
            old, unclipped = taken.log_prob, math.inf
            return losses.ppo_clip_loss(log_prob, old, taken.advantage, taken.alive, clip_epsilon=unclipped), {}
        return losses.policy_gradient_loss(log_prob, taken.advantage, taken.alive), {}
