"""Proximal policy optimisation with a clipped ratio per agent (Schulman et al. 2017; Yu et al. 2022 for teams)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract
from marlkit.functional import losses
from marlkit.learning import Metrics
from marlkit.optim._actor_critic import JointLossUpdate, Taken
from marlkit.options import PositiveFloat
from marlkit.spec import TeamSpec


class PpoClipUpdate(JointLossUpdate):
    """Minimise ``-mean(min(rho A, clip(rho, 1 - eps, 1 + eps) A)) - c_H H + c_V L_V`` over several epochs.

    ``rho_i = pi_i(a_i | o_i) / pi_old_i(a_i | o_i)`` per agent, never a product over agents. The critic is regressed in
    normalised units on the value target, with a clipped Huber loss. Agents that are not alive weigh nothing in the policy's loss.

    Args:
        spec: the team.
        clip_epsilon: how far the ratio may gain; 0.05 to 0.3.
        options: those of :class:`JointLossUpdate`.
    """

    contract = Contract(
        reads=(keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE, keys.VALUE_TARGET),
        traits=("per_agent", "by_gradient", "on_policy"),
        needs={"actor": ("stochastic",), "data": ("on_policy",)},
        at_most={"minibatch_size": ("env.num_envs", "data.steps")},
    )

    def __init__(self, spec: TeamSpec, *, clip_epsilon: PositiveFloat = 0.2, **options: Any) -> None:
        super().__init__(spec, **options)
        self.clip_epsilon = clip_epsilon

    def policy_loss(self, log_prob: Tensor, taken: Taken) -> tuple[Tensor, Metrics]:
        """The clipped surrogate of log-probabilities ``[*, n, 1]``, and the share of ratios beyond the clip."""
        old, alive = taken.log_prob, taken.alive
        loss = losses.ppo_clip_loss(log_prob, old, taken.advantage, alive, clip_epsilon=self.clip_epsilon)
        return loss, {"actor/clip_fraction": losses.clip_fraction(log_prob, old, alive, clip_epsilon=self.clip_epsilon)}
