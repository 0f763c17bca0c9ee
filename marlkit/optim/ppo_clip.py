"""Proximal policy optimisation with a clipped ratio per agent (Schulman et al. 2017; Yu et al. 2022 for teams)."""

from __future__ import annotations

from typing import Any, Literal

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract, When
from marlkit.functional import losses
from marlkit.learning import Learning, Metrics
from marlkit.nn.distributions import NormalTeam
from marlkit.optim._actor_critic import OLD_DIMS, OLD_LOG_PROBS, JointLossUpdate, Taken
from marlkit.options import PositiveFloat
from marlkit.spec import TeamSpec


class PpoClipUpdate(JointLossUpdate):
    """Minimise ``-mean(min(rho A, clip(rho, 1 - eps, 1 + eps) A)) - c_H H + c_V L_V`` over several epochs.

    ``rho_i = pi_i(a_i | o_i) / pi_old_i(a_i | o_i)`` per agent, never a product over agents. With a ratio per dimension, each
    dimension d of a continuous action has its own, ``rho_id``, and is clipped by itself:
    ``-mean_i(sum_d min(rho_id A_i, clip(rho_id, 1 - eps, 1 + eps) A_i))``, as in MAT's code (Wen et al. 2022).

    The critic is regressed in normalised units on the value target, with a clipped Huber loss. Agents that are not alive weigh
    nothing in the policy's loss.

    Args:
        spec: the team.
        clip_epsilon: how far the ratio may gain; 0.05 to 0.3.
        ratio: of an `agent`, or of each `dimension` of its action, where actions are continuous.
        options: those of :class:`JointLossUpdate`.
    """

    contract = Contract(
        reads=(
            keys.ACTION,
            keys.LOG_PROB,
            When("ratio=dimension & continuous", (keys.LOC, keys.SCALE)),
            keys.ALIVE,
            keys.ADVANTAGE,
            keys.VALUE_TARGET,
        ),
        traits=("per_agent", "by_gradient", "on_policy"),
        needs={"actor": ("stochastic",), "data": ("on_policy",)},
        at_most={"minibatch_size": ("env.num_envs * data.steps",)},
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        clip_epsilon: PositiveFloat = 0.2,
        ratio: Literal["agent", "dimension"] = "agent",
        **options: Any,
    ) -> None:
        super().__init__(spec, **options)
        self.clip_epsilon = clip_epsilon
        # A discrete action has one dimension.
        self.by_dimension = ratio == "dimension" and not spec.discrete

    def prepare(self, batch: TensorDictBase, learning: Learning) -> TensorDictBase:
        """As every update of actor and critic; with a ratio per dimension, note the log-probabilities of a batch ``[B, T]``."""
        prepared = super().prepare(batch, learning)
        if not self.by_dimension:
            return prepared
        dims = learning.actor.available(batch)
        played = NormalTeam(batch[keys.LOC], batch[keys.SCALE], dims)
        return prepared.set(OLD_LOG_PROBS, played.log_prob_by_dimension(batch[keys.ACTION])).set(OLD_DIMS, dims)

    def policy_loss(self, log_prob: Tensor, taken: Taken) -> tuple[Tensor, Metrics]:
        """The clipped surrogate of log-probabilities ``[*, n, 1]``, and the share of ratios beyond the clip."""
        old, alive, clip = taken.log_prob, taken.alive, self.clip_epsilon
        if taken.dimensions is None:
            loss = losses.ppo_clip_loss(log_prob, old, taken.advantage, alive, clip_epsilon=clip)
            return loss, {"actor/clip_fraction": losses.clip_fraction(log_prob, old, alive, clip_epsilon=clip)}
        found, old, owned = taken.dimensions
        loss = losses.ppo_clip_loss_by_dimension(found, old, taken.advantage, alive, owned, clip_epsilon=clip)
        return loss, {"actor/clip_fraction": losses.clip_fraction(found, old, alive & owned, clip_epsilon=clip)}
