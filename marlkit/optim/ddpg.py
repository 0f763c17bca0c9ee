"""Deterministic policy gradients (DDPG, MADDPG, TD3), with F2A2's joint gradients on request.

Lillicrap et al. 2016; Lowe et al. 2017; Fujimoto et al. 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.batches import units
from marlkit.component import Update, each, least
from marlkit.contract import Contract, When
from marlkit.errors import OptionError
from marlkit.functional import coupling as joint_gradients
from marlkit.functional.losses import explained_variance, value_loss
from marlkit.functional.reduce import masked_mean, sum_of
from marlkit.keys import Key
from marlkit.learning import Learning, Metrics
from marlkit.nn.actions import action_features
from marlkit.nn.distributions import behaviour_distribution
from marlkit.options import Finite, NonNegativeFloat, PositiveFloat, PositiveInt, Probability
from marlkit.spec import TeamSpec

JOINT: Key = ("opponents", "joint_features")
"""The joint action in each view, as features ``[*, V, N, F]``; stays inside the update."""

LOGIT_PENALTY = 1e-3
"""Weight of the squared logits of discrete policies in MADDPG's reference implementation."""


class DdpgUpdate(Update):
    """One step of the critic on ``mean((Q_i(a) - y)^2)``, then one of the actor on ``-mean Q_i(a_1, .., mu_i(o_i), .., a_N)``.

    Of a critic with several networks each is regressed, and the actor climbs the first. With twins, `actor_every: 2`, noise on
    the target's actions and copies that wait for the actor this is TD3.

    Agent i's actor receives the gradient of ``Q_i`` through its own action only, and the critic none from the actor's loss.
    ``coupling`` adds to each what it owes to the other's objective (F2A2, Proposition 4; :mod:`marlkit.functional.coupling` has
    the formulas); the actor's step uses the critic's new parameters, for the error too. Errors and values are in the critic's
    normalised units. Agents that are not alive weigh nothing but in the critic's regression.

    Args:
        spec: the team.
        others: the others' actions in the actor's loss: `played` as in the batch (MADDPG), or `believed` to be chosen now.
        actor_weight: alpha1, weight of the actor's objective.
        critic_weight: alpha2, weight of the critic's.
        actor_every: updates from one step of the actor to the next, the first with the first update; 2 in TD3.
        coupling: kappa, share of the joint gradients: 0 is DDPG, 1 is F2A2-DDPG.
        ratio_limit: eps, what ratios of the current policy and the one that played are cut to; 1 in F2A2.
        coefficient_floor: what the coupled actor's coefficient is raised to; `null`, as published: it may turn ascent to descent.
        action_penalty: weight of the mean squared logits, shifted to mean zero; `null`: 0.001 for discrete actions (MADDPG).
        huber_delta: error beyond which the critic's loss grows linearly, in normalised units; `null`: squared loss.
        max_grad_norm: gradient norm that actor and critic are each clipped to; `null`: unclipped.
    """

    updates: Tensor

    contract = Contract(
        reads=(
            *(keys.ACTION, keys.JOINT_ACTION, keys.ALIVE, keys.VALUE_TARGET),
            When("discrete", (keys.ACTION_MASK,)),
            When("coupling!=0", (keys.LOG_PROB,)),
            When("coupling!=0 & discrete", (keys.BEHAVIOUR_LOGITS,)),
            When("coupling!=0 & continuous", (keys.BEHAVIOUR_LOC, keys.BEHAVIOUR_SCALE)),
        ),
        traits=("by_gradient",),
        needs={"actor": ("reparametrised",), "critic": ("differentiable_in_action",)},
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        others: Literal["played", "believed"] = "played",
        actor_weight: PositiveFloat = 1.0,
        critic_weight: PositiveFloat = 1.0,
        actor_every: PositiveInt = 1,
        coupling: Probability = 0.0,
        ratio_limit: PositiveFloat = 1.0,
        coefficient_floor: Finite | None = None,
        action_penalty: NonNegativeFloat | None = None,
        huber_delta: PositiveFloat | None = None,
        max_grad_norm: PositiveFloat | None = 10.0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.others = others
        self.weights = {"actor_weight": actor_weight, "critic_weight": critic_weight}
        self.actor_every = actor_every
        self.coupling = coupling
        self.ratio_limit = ratio_limit
        self.coefficient_floor = coefficient_floor
        if action_penalty and not spec.discrete:
            message = f"is for logits, but this environment's actions are continuous: must be 0 or null, got {action_penalty}"
            raise OptionError("action_penalty", message)
        self.action_penalty = (LOGIT_PENALTY if action_penalty is None else action_penalty) if spec.discrete else 0.0
        self.huber_delta = huber_delta
        self.max_grad_norm = max_grad_norm
        if actor_every > 1:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """Critic, then actor if it is its turn, on a batch ``[*, T]``."""
        actor, critic = learning.actor, learning.critic
        believing = set(learning.opponents.reads) - set(actor.writes) if self.others == "believed" else ()
        wanted = dict.fromkeys([*self.reads, *actor.reads, *critic.reads, *believing])
        critic.learn_scale(batch[keys.VALUE_TARGET], learning.ranks)

        def only_critic(given: TensorDictBase) -> Metrics:
            rows = units(given, actor.sequence_length)
            if self.coupling:
                rows.set(JOINT, self._joint_action(rows, learning))
            return self._fit_critic(rows, learning)

        def both(given: TensorDictBase) -> Metrics:
            rows = units(given, actor.sequence_length)
            rows.set(JOINT, self._joint_action(rows, learning))
            return self._fit_critic(rows, learning) | self._fit_actor(rows, learning)

        if self._is_actors_turn():
            return learning.run_step("update", both, batch.select(*wanted))
        return learning.run_step("critic", only_critic, batch.select(*wanted))

    def _is_actors_turn(self) -> bool:
        if self.actor_every == 1:
            return True
        due = int(self.updates) % self.actor_every == 0
        self.updates += 1
        return due

    def _fit_critic(self, rows: TensorDictBase, learning: Learning) -> Metrics:
        predictions = learning.critic.predictions(rows)
        goal = learning.critic.normaliser.normalise(rows[keys.VALUE_TARGET])
        half_square = sum_of(
            value_loss(own, None, goal, None, clip=None, huber_delta=self.huber_delta) for own in each(predictions)
        )
        loss = 2 * self.weights["critic_weight"] * half_square
        metrics = {
            "critic/loss": loss.detach(),
            "critic/explained_variance": explained_variance(least(predictions.detach()), goal, None),
        }
        if self.coupling:
            if len(predictions) > 1:
                message = f"must be 0 with a critic of {len(predictions)} networks: Proposition 4 couples one"
                raise OptionError("coupling", f"{message}, got {self.coupling}")
            with torch.no_grad():
                own = learning.actor.reparametrised(rows)
            (prediction,), (resampled,) = map(each, (predictions, learning.critic.action_value(rows, own, rows[JOINT])))
            coupled = joint_gradients.critic_coupling(
                prediction,
                resampled,
                self._error(prediction, goal),
                self._ratio(rows, learning),
                self._inverse_ratio(rows, own, learning),
                rows[keys.ALIVE],
                **self.weights,
            )
            loss = loss + self.coupling * learning.ranks.weigh(rows[keys.ALIVE], coupled)
        return metrics | learning.minimise(loss, self.max_grad_norm)

    def _fit_actor(self, rows: TensorDictBase, learning: Learning) -> Metrics:
        # Until the backward pass is over, which may evaluate the critic once more.
        with _held(learning.critic):
            loss, metrics = self._actor_loss(rows, learning)
            return metrics | learning.minimise(loss, self.max_grad_norm)

    def _actor_loss(self, rows: TensorDictBase, learning: Learning) -> tuple[Tensor, Metrics]:
        alive = rows[keys.ALIVE]
        own = learning.actor.reparametrised(rows)
        value = each(learning.critic.action_value(rows, own, rows[JOINT]))[0]
        coefficient, statistics = self._coefficient(rows, own, learning)
        loss = learning.ranks.weigh(alive, joint_gradients.actor_loss(value, coefficient, alive))
        metrics = {"actor/loss": loss.detach(), "actor/value": masked_mean(value.detach(), alive), **statistics}
        if self.action_penalty:
            loss = loss + self.action_penalty * self._squared_logits(rows, learning)
        return loss, metrics

    @torch.no_grad()
    def _joint_action(self, rows: TensorDictBase, learning: Learning) -> Tensor:
        """The joint action in each view, as features ``[*, V, N, F]``."""
        if self.others == "believed":
            chosen = learning.actor.bootstrap(rows.copy())
            rows = learning.opponents(chosen, played=False)
        return action_features(rows[keys.JOINT_ACTION], self.spec, rows[keys.VALUE_TARGET].dtype)

    @torch.no_grad()
    def _coefficient(self, rows: TensorDictBase, own: Tensor, learning: Learning) -> tuple[Tensor, Metrics]:
        """What weighs the value of each ``own`` resampled action in the actor's loss (alpha1 without coupling), and metrics."""
        goal = learning.critic.normaliser.normalise(rows[keys.VALUE_TARGET])
        if not self.coupling:
            return torch.full_like(goal, self.weights["actor_weight"]), {}
        error = self._error(each(learning.critic.predictions(rows))[0], goal)
        inverse_ratio = self._inverse_ratio(rows, own, learning)
        coefficient = joint_gradients.actor_coefficient(
            error, inverse_ratio, coupling=self.coupling, floor=self.coefficient_floor, **self.weights
        )
        return coefficient, _statistics(coefficient, inverse_ratio, rows[keys.ALIVE])

    @torch.no_grad()
    def _ratio(self, rows: TensorDictBase, learning: Learning) -> Tensor:
        """``c`` of each agent's own stored action."""
        now = learning.actor.distribution(rows).log_prob(rows[keys.ACTION])
        return joint_gradients.truncated_ratio(now, rows[keys.LOG_PROB], self.ratio_limit)

    @torch.no_grad()
    def _inverse_ratio(self, rows: TensorDictBase, own: Tensor, learning: Learning) -> Tensor:
        """``c'`` of each agent's ``own`` resampled action, given as features."""
        action = own.argmax(-1) if self.spec.discrete else own
        policy = learning.actor.distribution(rows)
        then = behaviour_distribution(policy, rows)
        return joint_gradients.truncated_ratio(then.log_prob(action), policy.log_prob(action), self.ratio_limit)

    @torch.no_grad()
    def _error(self, prediction: Tensor, goal: Tensor) -> Tensor:
        """``delta``: half the derivative of the critic's loss, which Huber's bounds."""
        error = prediction - goal
        return error if self.huber_delta is None else error.clamp(-self.huber_delta, self.huber_delta)

    def _squared_logits(self, rows: TensorDictBase, learning: Learning) -> Tensor:
        """Mean square of the available actions' logits; a policy does not depend on what is added to all of them."""
        mask = rows[keys.ACTION_MASK]
        logits = learning.actor.distribution(rows).parameters()[keys.LOGITS].masked_fill(~mask, 0.0)
        mean = logits.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        counted = mask & rows[keys.ALIVE]
        return learning.ranks.weigh(counted, masked_mean((logits - mean).square(), counted))


def _statistics(coefficient: Tensor, inverse_ratio: Tensor, weight: Tensor) -> Metrics:
    """Mean, least and share of negative ones of the actor's coefficients, and mean of ``c'``."""
    least = coefficient.masked_fill(~weight, float("inf")).min()
    return {
        "coupling/coefficient": masked_mean(coefficient, weight),
        "coupling/coefficient_min": torch.where(weight.any(), least, 0.0),
        "coupling/inverse_ratio": masked_mean(inverse_ratio, weight),
        "coupling/negative": masked_mean((coefficient < 0).to(coefficient.dtype), weight),
    }


@contextmanager
def _held(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through ``module`` and not into it."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
