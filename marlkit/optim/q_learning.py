"""Q-learning of a team (Watkins 1989; DQN, Mnih et al. 2015): values and policy are one regression."""

from __future__ import annotations

from tensordict import TensorDictBase

from marlkit import keys
from marlkit.batches import units
from marlkit.component import Update, each, least
from marlkit.contract import Contract
from marlkit.functional.losses import explained_variance, value_loss
from marlkit.functional.reduce import sum_of
from marlkit.learning import Learning, Metrics
from marlkit.options import PositiveFloat
from marlkit.spec import TeamSpec


class QLearningUpdate(Update):
    """One step on ``mean((Q(a) - y)^2)`` of the critic, which is made of the actor's action values and so trains both.

    The target ``y`` is the estimator's. From replay it is bootstrapped with the greedy action, chosen and valued as `targets`
    says (double Q-learning); from what was just played, with the action that was taken next (Sarsa).

    Args:
        spec: the team.
        huber_delta: error beyond which the loss grows linearly, in normalised units; `null`: squared loss.
        max_grad_norm: gradient norm that actor and critic are each clipped to; `null`: unclipped.
    """

    contract = Contract(
        reads=(keys.VALUE_TARGET,),
        traits=("by_gradient",),
        needs={"env": ("discrete",), "critic": ("individual_global_max",)},
    )

    def __init__(
        self, spec: TeamSpec, *, huber_delta: PositiveFloat | None = None, max_grad_norm: PositiveFloat | None = 10.0
    ) -> None:
        super().__init__()
        self.spec = spec
        self.huber_delta = huber_delta
        self.max_grad_norm = max_grad_norm

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """One step of actor and critic on a batch ``[*, T]``."""
        actor, critic = learning.actor, learning.critic
        renewed = keys.WITH_GRADIENT & set(actor.writes)
        wanted = dict.fromkeys(key for key in (*self.reads, *actor.reads, *critic.reads) if key not in renewed)
        critic.learn_scale(batch[keys.VALUE_TARGET], learning.ranks)

        def step(given: TensorDictBase) -> Metrics:
            rows = units(given, actor.sequence_length)
            actor.distribution(rows)  # writes the action values with their gradient
            predictions = critic.predictions(rows)
            goal = critic.normaliser.normalise(rows[keys.VALUE_TARGET])
            loss = 2 * sum_of(
                value_loss(own, None, goal, None, clip=None, huber_delta=self.huber_delta) for own in each(predictions)
            )
            value = least(predictions.detach())
            metrics = {
                "critic/loss": loss.detach(),
                "critic/explained_variance": explained_variance(value, goal, None),
                "critic/value": critic.normaliser.denormalise(value).mean(),
            }
            return metrics | learning.minimise(loss, self.max_grad_norm)

        return learning.run_step("update", step, batch.select(*wanted))
