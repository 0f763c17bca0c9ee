"""What the on-policy updates of an actor and a critic have in common: preparation, minibatches, the critic's regression.

:class:`ActorCriticUpdate` leaves the step of the policy open; :class:`JointLossUpdate` takes it together with the critic's, by
gradient descent on one loss, and leaves open what the policy's loss is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.batches import minibatches, units
from marlkit.component import Update, each, least
from marlkit.functional import losses
from marlkit.functional.reduce import masked_mean, mean_over_agents, standardise, sum_of
from marlkit.functional.schedule import linear
from marlkit.keys import Key
from marlkit.learning import Learning, Metrics, mean_metrics
from marlkit.options import NonNegativeFloat, PositiveFloat, PositiveInt, Repeats
from marlkit.spec import TeamSpec

OLD_PREDICTION: Key = ("agents", "old_prediction")
"""What the critic predicted when the iteration began, as its normaliser notes it; stays inside the update."""

OLD_LOG_PROBS: Key = ("agents", "old_log_probs")
"""Log-probabilities of what was played by action dimension, where an update wants them; stay inside the update."""

OLD_DIMS: Key = ("agents", "old_dims")
"""The action dimensions that agents have, beside :data:`OLD_LOG_PROBS`."""


Loss = Callable[[TensorDictBase], tuple[Tensor, Metrics]]


class Dimensions(NamedTuple):
    """What some agents did by dimension of their actions, ``[*, n, D]``: log-probabilities now and then, and which they have."""

    log_prob: Tensor
    old_log_prob: Tensor
    owned: Tensor


class Taken(NamedTuple):
    """What some agents did: all but ``action`` are ``[*, n, 1]``; ``dimensions`` where the update has prepared them."""

    action: Tensor
    log_prob: Tensor
    alive: Tensor
    advantage: Tensor
    dimensions: Dimensions | None = None


def taken_by(agents: Sequence[int] | None, rows: TensorDictBase) -> Taken:
    """The part of ``rows`` ``[*]`` that the policy's loss of ``agents`` (``None``: all) is made of."""
    axis = (slice(None),) * rows.batch_dims
    of = slice(None) if agents is None else list(agents)
    return Taken(*(rows[key][(*axis, of)] for key in (keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE)))


class ActorCriticUpdate(Update):
    """Base of the updates that regress the critic in normalised units, with a clipped Huber loss (Yu et al. 2022).

    Args:
        spec: the team.
        epochs: passes over the batch.
        minibatch_size: joint steps per minibatch; `null`: the whole batch.
        critic_epochs: passes that fit the critic alone, before a policy that steps by gradient descent, each with one step for
            each time step of the rollout, as COMA's critic takes them (Foerster et al. 2018, algorithm 1); `null`: `epochs`
            passes in minibatches of `minibatch_size`, in the same steps as such a policy.
        value_coef: weight c_V of the critic's loss; 0.5 to 1.
        value_clip: how far the critic may gain per iteration, in normalised units; `null`: unclipped.
        huber_delta: error beyond which the critic's loss grows linearly, in normalised units; `null`: squared loss.
        valued_agents: whose values are regressed: of `all`, with the returns that the team goes on to have, or of those `alive`
            alone, in the statistics of the targets too (`use_value_active_masks` of the MAPPO reference).
        team_advantage: give every agent the mean of the advantages of those that are alive. Under one reward for all this is the
            advantage over ``(1/N) sum_i V_i`` (MAT), while each ``V_i`` is regressed on its own target.
        normalise_advantage: shift and scale the advantages of a batch to mean 0 and deviation 1.
        max_grad_norm: gradient norm that actor and critic are each clipped to; `null`: unclipped.
    """

    def __init__(
        self,
        spec: TeamSpec,
        epochs: int,
        minibatch_size: int | None,
        *,
        critic_epochs: Repeats | None = None,
        value_coef: NonNegativeFloat = 1.0,
        value_clip: PositiveFloat | None = 0.2,
        huber_delta: PositiveFloat | None = 10.0,
        valued_agents: Literal["all", "alive"] = "all",
        team_advantage: bool = False,
        normalise_advantage: bool = True,
        max_grad_norm: PositiveFloat | None = 10.0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.epochs = epochs
        self.minibatch_size = minibatch_size
        self.critic_epochs = critic_epochs
        self.value_coef = value_coef
        self.value_clip = value_clip
        self.huber_delta = huber_delta
        self.leaves_out_the_dead = valued_agents == "alive"
        self.team_advantage = team_advantage
        self.normalise_advantage = normalise_advantage
        self.max_grad_norm = max_grad_norm

    def prepare(self, batch: TensorDictBase, learning: Learning) -> TensorDictBase:
        """Keep what the losses read of a batch ``[B, T]``; prepare the advantages; store the critic's old predictions."""
        actor, critic = learning.actor, learning.critic
        wanted = dict.fromkeys([*self.reads, *actor.reads, *critic.reads])
        prepared = batch.select(*wanted)
        prepared.set(OLD_PREDICTION, critic.normaliser.noted(batch[critic.predicts]))
        advantage, alive = batch[keys.ADVANTAGE], batch[keys.ALIVE]
        if self.team_advantage:
            advantage = mean_over_agents(advantage, alive)
        if self.normalise_advantage:
            advantage = standardise(advantage, alive, mean=learning.ranks.masked_mean)
        return prepared.set(keys.ADVANTAGE, advantage)

    def fit_critic(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """The critic alone, on a batch ``[B, T]``; an encoder that it shares with the actor stays as it is."""

        def loss(rows: TensorDictBase) -> tuple[Tensor, Metrics]:
            if keys.WITH_GRADIENT & set(learning.critic.reads) & set(learning.actor.writes):
                # The policy has moved since the batch was encoded. Without gradient: the critic's loss would move it once more.
                with torch.no_grad():
                    learning.actor.distribution(rows)
            value, metrics = self.value_loss(rows, learning)
            return self.value_coef * value, metrics

        if self.critic_epochs is None:
            return self.fit("critic", batch, learning, loss, self.epochs, self.minibatch_size)
        return self.fit("critic", batch, learning, loss, self.critic_epochs, len(batch))

    def fit(
        self, name: Hashable, batch: TensorDictBase, learning: Learning, loss: Loss, epochs: int, minibatch_size: int | None
    ) -> Metrics:
        """Minimise ``loss`` of each minibatch, over all epochs; the means of its metrics and of the gradients' norms.

        Args:
            name: tells this loss from others; see :class:`marlkit.learning.RunStep`.
            batch: a prepared batch ``[B, T]``.
            learning: what to work on.
            loss: loss and metrics of some rows.
            epochs: passes over the batch.
            minibatch_size: joint steps per minibatch; ``None``: the whole batch.
        """

        def step(minibatch: TensorDictBase) -> Metrics:
            total, metrics = loss(minibatch)
            return metrics | learning.minimise(total, self.max_grad_norm)

        rows = units(batch, learning.actor.sequence_length)
        history: list[Metrics] = []
        for _ in range(epochs):
            for minibatch in minibatches(rows, minibatch_size):
                history.append(learning.run_step(name, step, minibatch))
        return mean_metrics(history)

    def value_loss(self, rows: TensorDictBase, learning: Learning) -> tuple[Tensor, Metrics]:
        """The loss ``[]`` of the critic's networks, summed, without its weight; updates the running statistics of its targets."""
        critic, target = learning.critic, rows[keys.VALUE_TARGET]
        alive = rows[keys.ALIVE] if self.leaves_out_the_dead else None
        critic.learn_scale(target, learning.ranks, alive)
        predictions, goal = critic.predictions(rows), critic.normaliser.normalise(target)
        old = critic.normaliser.recalled(rows[OLD_PREDICTION])
        weight = torch.ones_like(goal, dtype=torch.bool) if alive is None else alive
        loss = sum_of(
            losses.value_loss(prediction, old, goal, weight, clip=self.value_clip, huber_delta=self.huber_delta)
            for prediction in each(predictions)
        )
        weighed = loss if alive is None else learning.ranks.weigh(alive, loss)
        further = self.critics_further_loss(predictions, rows, learning)
        return weighed if further is None else weighed + further, {
            "critic/loss": loss.detach(),
            "critic/explained_variance": losses.explained_variance(least(predictions.detach()), goal, weight),
        }

    def critics_further_loss(self, predictions: Tensor, rows: TensorDictBase, learning: Learning) -> Tensor | None:
        """What is minimised with the regression, in its units, of the predictions ``[K, *, N, 1]``: nothing unless overridden."""
        return None


class JointLossUpdate(ActorCriticUpdate):
    """Base of the updates that minimise ``L_pi - c_H H + c_V L_V`` by gradient descent, all agents and the critic together.

    Args:
        spec: the team.
        epochs: passes over the batch; 4 to 15.
        minibatch_size: joint steps per minibatch; `null`: the whole batch.
        entropy_coef: weight c_H of the entropy; 0 to 0.1.
        entropy_coef_end: its value at the end of the training, reached linearly; `null`: unchanged.
        options: those of :class:`ActorCriticUpdate`.
    """

    def __init__(
        self,
        spec: TeamSpec,
        *,
        epochs: Repeats = 5,
        minibatch_size: PositiveInt | None = None,
        entropy_coef: NonNegativeFloat = 0.01,
        entropy_coef_end: NonNegativeFloat | None = None,
        **options: Any,
    ) -> None:
        super().__init__(spec, epochs, minibatch_size, **options)
        self.entropy_coefs = (entropy_coef, entropy_coef_end)

    @abstractmethod
    def policy_loss(self, log_prob: Tensor, taken: Taken) -> tuple[Tensor, Metrics]:
        """``L_pi`` of the current log-probabilities ``[*, n, 1]``, and what else there is to log of it."""

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """All agents, with the critic or after it, one backward pass per minibatch of a batch ``[B, T]``."""
        batch = self.prepare(batch, learning)
        if self.critic_epochs is not None:
            return self.fit_critic(batch, learning) | self._fit_policy("policy", batch, learning, None)

        def loss(rows: TensorDictBase) -> tuple[Tensor, Metrics]:
            # The policy first: an encoder that the critic shares is evaluated with it.
            policy, policy_metrics = self._regularised(rows, learning, None)
            value, value_metrics = self.value_loss(rows, learning)
            return policy + self.value_coef * value, policy_metrics | value_metrics

        return self.fit("policy and critic", batch, learning, loss, self.epochs, self.minibatch_size)

    def fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int]) -> Metrics:
        """The policies of ``agents`` alone, on a prepared batch ``[B, T]``."""
        return self._fit_policy(("policy", *agents), batch, learning, agents)

    def _fit_policy(self, name: Hashable, batch: TensorDictBase, learning: Learning, agents: Sequence[int] | None) -> Metrics:
        def loss(rows: TensorDictBase) -> tuple[Tensor, Metrics]:
            return self._regularised(rows, learning, agents)

        return self.fit(name, batch, learning, loss, self.epochs, self.minibatch_size)

    def _regularised(self, rows: TensorDictBase, learning: Learning, agents: Sequence[int] | None) -> tuple[Tensor, Metrics]:
        taken = taken_by(agents, rows)
        policy = learning.actor.distribution(rows, agents)
        log_prob = policy.log_prob(taken.action)
        if OLD_LOG_PROBS in rows.keys(include_nested=True):
            old, owned = (rows[key] if agents is None else rows[key][..., list(agents), :] for key in (OLD_LOG_PROBS, OLD_DIMS))
            taken = taken._replace(dimensions=Dimensions(policy.log_prob_by_dimension(taken.action), old, owned))
        loss, more = self.policy_loss(log_prob, taken)
        entropy = masked_mean(policy.entropy(), taken.alive)
        coefficient = linear(*self.entropy_coefs, learning.progress)
        metrics = {
            "actor/loss": loss.detach(),
            "actor/entropy": entropy.detach(),
            "actor/kl": losses.approximate_kl(log_prob, taken.log_prob, taken.alive),
        }
        return learning.ranks.weigh(taken.alive, loss - coefficient * entropy), metrics | more
