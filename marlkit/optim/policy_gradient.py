"""The policy gradient of the action taken (Sutton et al. 2000), with a critic: A2C, IA2C, MAA2C, and COMA's actor."""

from __future__ import annotations

from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract
from marlkit.functional import losses
from marlkit.learning import Metrics
from marlkit.optim._actor_critic import JointLossUpdate, Taken
from marlkit.options import NonNegativeFloat, PositiveFloat, PositiveInt
from marlkit.spec import TeamSpec


class PolicyGradientUpdate(JointLossUpdate):
    """Minimise ``-mean(log pi_i(a_i | o_i) A_i) - c_H H + c_V L_V``; the advantage carries no gradient.

    The critic is regressed in normalised units on the value target. Agents that are not alive weigh nothing in the policy's loss.

    Args:
        spec: the team.
        epochs: passes over the batch; 1, as the loss does not allow for a policy that has already moved.
        minibatch_size: joint steps per minibatch; `null`: the whole batch.
        entropy_coef: weight c_H of the entropy; 0 to 0.1.
        entropy_coef_end: its value at the end of the training, reached linearly; `null`: unchanged.
        value_coef: weight c_V of the critic's loss; 0.5 to 1.
        value_clip: how far the critic may gain per iteration, in normalised units; `null`: unclipped.
        huber_delta: error beyond which the critic's loss grows linearly, in normalised units; `null`: squared loss.
        normalise_advantage: shift and scale the advantages of a batch to mean 0 and deviation 1.
        max_grad_norm: gradient norm that actor and critic are each clipped to; `null`: unclipped.
    """

    contract = Contract(
        reads=(keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE, keys.VALUE_TARGET),
        traits=("per_agent", "by_gradient", "on_policy"),
        needs={"actor": ("stochastic",), "data": ("on_policy",)},
        at_most={"minibatch_size": ("env.num_envs", "data.steps")},
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        epochs: PositiveInt = 1,
        minibatch_size: PositiveInt | None = None,
        entropy_coef: NonNegativeFloat = 0.01,
        entropy_coef_end: NonNegativeFloat | None = None,
        value_coef: NonNegativeFloat = 1.0,
        value_clip: PositiveFloat | None = None,
        huber_delta: PositiveFloat | None = None,
        normalise_advantage: bool = False,
        max_grad_norm: PositiveFloat | None = 10.0,
    ) -> None:
        super().__init__(
            spec,
            entropy_coef=entropy_coef,
            entropy_coef_end=entropy_coef_end,
            epochs=epochs,
            minibatch_size=minibatch_size,
            value_coef=value_coef,
            value_clip=value_clip,
            huber_delta=huber_delta,
            normalise_advantage=normalise_advantage,
            max_grad_norm=max_grad_norm,
        )

    def policy_loss(self, log_prob: Tensor, taken: Taken) -> tuple[Tensor, Metrics]:
        """``-mean(log pi A)``."""
        return losses.policy_gradient_loss(log_prob, taken.advantage, taken.alive), {}
