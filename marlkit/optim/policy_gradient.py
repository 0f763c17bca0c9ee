"""The policy gradient of the action taken (Sutton et al. 2000), with a critic: A2C, IA2C, MAA2C, HAA2C, COMA, F2A2-COMA."""

from __future__ import annotations

import math
from typing import Any, Literal

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract
from marlkit.errors import OptionError
from marlkit.functional import coupling as joint_gradients
from marlkit.functional import losses
from marlkit.functional.reduce import masked_mean
from marlkit.learning import Learning, Metrics
from marlkit.optim._actor_critic import JointLossUpdate, Taken
from marlkit.options import PositiveFloat, Probability, Repeats
from marlkit.spec import TeamSpec


class PolicyGradientUpdate(JointLossUpdate):
    """Minimise ``-mean(log pi_i(a_i | o_i) A_i) - c_H H + c_V L_V``; the advantage carries no gradient.

    With the ratio ``rho_i = pi_i(a_i | o_i) / pi_old_i(a_i | o_i)`` to the policy of the iteration's start, ``-mean(rho_i A_i)``
    instead: the same gradient at first, and still one of the return where the policy has moved. Inside `sequential` this is
    HAA2C, ``-mean(rho_m M_m)`` (Zhong et al. 2024, "Heterogeneous-agent reinforcement learning").

    The critic is regressed in normalised units on the value target. Agents that are not alive weigh nothing in the policy's loss.

    ``coupling`` adds to actor and critic what each owes to the other's objective (F2A2, Li et al. 2023, Proposition 3;
    :mod:`marlkit.functional.coupling` has the formulas), with ``alpha1 = 1``, ``alpha2 = c_V / 2`` and ``delta`` the error of the
    prediction that the advantage was estimated with. Weights are in the critic's normalised units: in rewards, as published,
    with `critic.value_norm: false`.

    Args:
        spec: the team.
        surrogate: `log_prob`, or `ratio` for several steps on one batch.
        epochs: passes over the batch; 1 with `log_prob`, which does not allow for a policy that has already moved; 5 in HAA2C.
        coupling: kappa, share of the joint gradients: 0 is the ordinary policy gradient, 1 is F2A2-COMA with a counterfactual
            critic.
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
        coupling: Probability = 0.0,
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
        if coupling and not self.value_coef:
            raise OptionError("coupling", f"must be 0 where the critic's loss weighs nothing (value_coef: 0), got {coupling}")
        self.coupling = coupling

    def prepare(self, batch: TensorDictBase, learning: Learning) -> TensorDictBase:
        """As without coupling, with the advantages that it leaves of a batch ``[B, T]``."""
        if self.coupling:
            _, deviation = learning.critic.normaliser.mean_and_deviation()
            error = batch[learning.critic.predicts] - batch[keys.VALUE_TARGET]
            # Of the error in normalised units, and in the unit of the advantage: divided by the deviation twice, times it once.
            weight = 0.5 * self.value_coef / deviation
            advantage = joint_gradients.coupled_advantage(
                batch[keys.ADVANTAGE], error, coupling=self.coupling, critic_weight=weight
            )
            batch = batch.copy().set(keys.ADVANTAGE, advantage)
        return super().prepare(batch, learning)

    def critics_further_loss(self, predictions: Tensor, rows: TensorDictBase, learning: Learning) -> Tensor | None:
        """``-kappa mmean(Q) / c_V``, all of which ``c_V`` weighs, of predictions ``[1, *, N, 1]``: what is owed to the actor."""
        if not self.coupling:
            return None
        if len(predictions) > 1:
            message = f"must be 0 with a critic of {len(predictions)} networks: Proposition 3 couples one, got {self.coupling}"
            raise OptionError("coupling", message)
        alive = rows[keys.ALIVE]
        return -self.coupling / self.value_coef * learning.ranks.weigh(alive, masked_mean(predictions[0], alive))

    def policy_loss(self, log_prob: Tensor, taken: Taken) -> tuple[Tensor, Metrics]:
        """``-mean(log pi A)``, or ``-mean(rho A)``, of log-probabilities ``[*, n, 1]``."""
        if self.surrogate == "ratio":
            old, unclipped = taken.log_prob, math.inf
            return losses.ppo_clip_loss(log_prob, old, taken.advantage, taken.alive, clip_epsilon=unclipped), {}
        return losses.policy_gradient_loss(log_prob, taken.advantage, taken.alive), {}
