"""Proximal policy optimisation with a clipped ratio per agent (Schulman et al. 2017; Yu et al. 2022 for teams)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Learning, Metrics, Update
from marlkit.contract import Contract
from marlkit.functional import losses
from marlkit.functional.reduce import masked_mean, standardise
from marlkit.keys import Key
from marlkit.minibatches import minibatches, units
from marlkit.options import NonNegativeFloat, PositiveFloat, PositiveInt
from marlkit.spec import TeamSpec

OLD_PREDICTION: Key = ("agents", "old_prediction")
"""The critic's prediction in normalised units when the iteration began; stays inside the update."""


class PpoClipUpdate(Update):
    """Minimise ``-mean(min(rho A, clip(rho, 1 - eps, 1 + eps) A)) - c_H H + c_V L_V`` over several epochs.

    ``rho_i = pi_i(a_i | o_i) / pi_old_i(a_i | o_i)`` per agent, never a product over agents. The critic is regressed in
    normalised units on the value target, with a clipped Huber loss. Agents that are not alive weigh nothing in the policy's loss.

    Args:
        spec: the team.
        clip_epsilon: how far the ratio may gain; 0.05 to 0.3.
        epochs: passes over the batch; 4 to 15.
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
        traits=("per_agent", "on_policy"),
        needs={"actor": ("stochastic",), "data": ("on_policy",)},
        at_most={"minibatch_size": ("env.num_envs", "data.steps")},
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        clip_epsilon: PositiveFloat = 0.2,
        epochs: PositiveInt = 5,
        minibatch_size: PositiveInt | None = None,
        entropy_coef: NonNegativeFloat = 0.01,
        entropy_coef_end: NonNegativeFloat | None = None,
        value_coef: NonNegativeFloat = 1.0,
        value_clip: PositiveFloat | None = 0.2,
        huber_delta: PositiveFloat | None = 10.0,
        normalise_advantage: bool = True,
        max_grad_norm: PositiveFloat | None = 10.0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.clip_epsilon = clip_epsilon
        self.epochs = epochs
        self.minibatch_size = minibatch_size
        self.entropy_coefs = (entropy_coef, entropy_coef if entropy_coef_end is None else entropy_coef_end)
        self.value_coef = value_coef
        self.value_clip = value_clip
        self.huber_delta = huber_delta
        self.normalise_advantage = normalise_advantage
        self.max_grad_norm = max_grad_norm

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """All agents and the critic together, one backward pass per minibatch."""

        def loss(rows: TensorDictBase) -> tuple[Tensor, Metrics]:
            policy, policy_metrics = self._policy_loss(rows, learning, None)
            value, value_metrics = self._value_loss(rows, learning)
            return policy + self.value_coef * value, policy_metrics | value_metrics

        return self._fit(self.prepare(batch, learning), learning, loss)

    def prepare(self, batch: TensorDictBase, learning: Learning) -> TensorDictBase:
        """Keep what the losses read; normalise the advantages; note the critic's old predictions."""
        actor, critic = learning.actor, learning.critic
        memory = (keys.HIDDEN,) if actor.sequence_length is not None else ()
        predicted = critic.contract.predicts
        wanted = dict.fromkeys([*self.reads, *actor.reads, *critic.reads, *memory])
        prepared = batch.select(*wanted)
        prepared.set(OLD_PREDICTION, critic.normaliser.normalise(batch[predicted]))
        if self.normalise_advantage:
            prepared.set(keys.ADVANTAGE, standardise(batch[keys.ADVANTAGE], batch[keys.ALIVE]))
        return prepared

    def fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int]) -> Metrics:
        """The policies of ``agents`` alone."""
        return self._fit(batch, learning, lambda rows: self._policy_loss(rows, learning, agents))

    def fit_critic(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """The critic alone."""
        return self._fit(batch, learning, lambda rows: self._value_loss(rows, learning))

    def _fit(
        self, batch: TensorDictBase, learning: Learning, loss: Callable[[TensorDictBase], tuple[Tensor, Metrics]]
    ) -> Metrics:
        rows = units(batch, learning.actor.sequence_length)
        history: list[Metrics] = []
        for _ in range(self.epochs):
            for minibatch in minibatches(rows, self.minibatch_size):
                total, metrics = loss(minibatch)
                history.append(metrics | learning.minimise(total, self.max_grad_norm))
        return {name: torch.stack([metrics[name] for metrics in history]).mean() for name in history[0]}

    def _policy_loss(self, rows: TensorDictBase, learning: Learning, agents: Sequence[int] | None) -> tuple[Tensor, Metrics]:
        of = slice(None) if agents is None else list(agents)
        axis = (slice(None),) * rows.batch_dims
        action, old, alive, advantage = (
            rows[key][(*axis, of)] for key in (keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE)
        )
        policy = learning.actor.distribution(rows, agents)
        log_prob = policy.log_prob(action)
        loss = losses.ppo_clip_loss(log_prob, old, advantage, alive, clip_epsilon=self.clip_epsilon)
        entropy = masked_mean(policy.entropy(), alive)
        start, end = self.entropy_coefs
        coefficient = start + (end - start) * learning.progress
        metrics = {
            "actor/loss": loss.detach(),
            "actor/entropy": entropy.detach(),
            "actor/kl": losses.approximate_kl(log_prob, old, alive),
            "actor/clip_fraction": losses.clip_fraction(log_prob, old, alive, clip_epsilon=self.clip_epsilon),
        }
        return loss - coefficient * entropy, metrics

    def _value_loss(self, rows: TensorDictBase, learning: Learning) -> tuple[Tensor, Metrics]:
        critic, target = learning.critic, rows[keys.VALUE_TARGET]
        critic.normaliser.update(target)
        prediction, goal = critic.predict(rows), critic.normaliser.normalise(target)
        weight = torch.ones_like(goal, dtype=torch.bool)
        loss = losses.value_loss(
            prediction, rows[OLD_PREDICTION], goal, weight, clip=self.value_clip, huber_delta=self.huber_delta
        )
        return loss, {
            "critic/loss": loss.detach(),
            "critic/explained_variance": losses.explained_variance(prediction.detach(), goal, weight),
        }
