"""Trust region policy optimisation: a natural gradient step to the edge of a divergence (TRPO, Schulman et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from marlkit import keys
from marlkit.batches import units
from marlkit.component import Actor
from marlkit.contract import Contract
from marlkit.functional import losses
from marlkit.functional.reduce import masked_mean
from marlkit.functional.trust_region import (
    Found,
    conjugate_gradient,
    flatten,
    hessian_product,
    search_back,
    step_to_edge,
    unflatten,
)
from marlkit.learning import Learning, Metrics
from marlkit.optim._actor_critic import ActorCriticUpdate, taken_by
from marlkit.options import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Repeats
from marlkit.ranks import Ranks
from marlkit.spec import TeamSpec


class TrustRegionUpdate(ActorCriticUpdate):
    """Maximise ``S = mean(rho A)`` where ``mean(KL(pi_old || pi)) <= delta``; then regress the critic.

    One step per iteration on the whole batch, without an optimiser: ``sqrt(2 delta / x.Hx) x``, ``H x = grad S`` by conjugate
    gradients, where ``H`` is the Hessian of the exact divergence plus `damping` times the identity. It is shortened until the
    divergence is at most delta and the gain at least `accept_ratio` of what ``grad S`` promised. Where no length will do, the
    policy stays as it is, bit for bit. The critic is regressed in normalised units by the optimiser; an encoder that it shares
    with the actor is the policy's alone. Agents that are not alive weigh nothing in ``S`` and KL.

    Inside `sequential` it moves one agent at a time: HATRPO (Kuba et al. 2022). Alone it moves all agents at once, in one region.

    Args:
        spec: the team.
        kl_limit: delta, mean over steps and agents; 0.001 to 0.03.
        damping: added to the diagonal of H; 0.01 to 0.1.
        cg_iterations: products with H at most; 10.
        backtracks: lengths that are tried; 10.
        backtrack_factor: from one length to the next; 0.5 to 0.8.
        accept_ratio: share of the promised gain that a step must keep; 0.1 to 0.5.
        epochs: passes of the critic over the batch; 4 to 15.
        minibatch_size: joint steps per minibatch of the critic; `null`: the whole batch.
        value_coef: weight of the critic's loss; 0.5 to 1.
        max_grad_norm: norm that the critic's gradient is clipped to; `null`: unclipped.
        options: those of :class:`marlkit.optim._actor_critic.ActorCriticUpdate`.
    """

    contract = Contract(
        reads=(keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE, keys.VALUE_TARGET),
        traits=("per_agent", "on_policy"),
        needs={"actor": ("stochastic",), "data": ("on_policy",)},
        at_most={"minibatch_size": ("env.num_envs * data.steps",)},
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        kl_limit: PositiveFloat = 0.01,
        damping: NonNegativeFloat = 0.1,
        cg_iterations: Repeats = 10,
        backtracks: Repeats = 10,
        backtrack_factor: Fraction = 0.8,
        accept_ratio: Probability = 0.5,
        epochs: Repeats = 5,
        minibatch_size: PositiveInt | None = None,
        **options: Any,
    ) -> None:
        super().__init__(spec, epochs, minibatch_size, **options)
        self.kl_limit = kl_limit
        self.damping = damping
        self.cg_iterations = cg_iterations
        self.backtracks = backtracks
        self.backtrack_factor = backtrack_factor
        self.accept_ratio = accept_ratio

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """All agents in one step, then the critic, on a batch ``[B, T]``."""
        batch = self.prepare(batch, learning)
        return self._fit_policy(batch, learning, None) | self.fit_critic(batch, learning)

    def fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int]) -> Metrics:
        """The policies of ``agents`` alone, in one step, on a prepared batch ``[B, T]``."""
        return self._fit_policy(batch, learning, agents)

    def _fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int] | None) -> Metrics:
        ranks = learning.ranks
        region = _Region(learning.actor, units(batch, learning.actor.sequence_length), agents, ranks)
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            gain, divergence, entropy = region.evaluate()
        loss = -gain
        slopes = torch.autograd.grad(loss, region.parameters, retain_graph=True, allow_unused=True)
        ranks.mean_([slope for slope in slopes if slope is not None])
        for parameter, slope in zip(region.parameters, slopes, strict=True):
            # Left where an optimiser's step leaves it: it tells what learns, even where no step is accepted.
            parameter.grad = slope
        gradient = -flatten([x.new_zeros(x.shape) if d is None else d for x, d in zip(region.parameters, slopes, strict=True)])
        own_product = hessian_product(divergence, region.parameters, damping=self.damping)

        def product(vector: Tensor) -> Tensor:
            return ranks.mean(own_product(vector))

        direction = conjugate_gradient(product, gradient, iterations=self.cg_iterations)
        step = step_to_edge(direction, product, limit=self.kl_limit)
        found = self._search(region, step, gradient.dot(step).item())
        learning.moved(["actor"])
        return {
            "actor/loss": loss.detach(),
            "actor/entropy": entropy.detach(),
            "actor/grad_norm": gradient.norm(),
            "actor/kl": gradient.new_tensor(found.divergence),
            "actor/gain": gradient.new_tensor(found.gain),
            "actor/step_fraction": gradient.new_tensor(found.fraction),
        }

    @torch.no_grad()
    def _search(self, region: _Region, step: Tensor, expected: float) -> Found:
        """Leave the parameters at the first acceptable fraction of ``step``, or exactly as they are."""
        before = [parameter.clone() for parameter in region.parameters]
        steps = unflatten(step, before)
        start, _, _ = region.evaluate()

        def trial(fraction: float) -> tuple[float, float]:
            for parameter, origin, own in zip(region.parameters, before, steps, strict=True):
                parameter.copy_(origin + fraction * own)
            gain, divergence, _ = region.evaluate()
            over, up = region.ranks.mean(torch.stack([divergence, gain - start])).tolist()
            return over, up

        found = search_back(
            trial,
            expected,
            limit=self.kl_limit,
            accept_ratio=self.accept_ratio,
            trials=self.backtracks,
            factor=self.backtrack_factor,
        )
        if found.fraction == 0:
            for parameter, origin in zip(region.parameters, before, strict=True):
                parameter.copy_(origin)
        return found


class _Region:
    """Gain and divergence of the policies of some agents on one batch, as functions of their parameters."""

    def __init__(self, actor: Actor, rows: TensorDictBase, agents: Sequence[int] | None, ranks: Ranks) -> None:
        shared = "separate_parameters" not in actor.traits
        own = actor.parameters() if agents is None or shared else actor.agent_parameters(agents)
        self.parameters = [parameter for parameter in own if parameter.requires_grad]
        self.actor, self.rows, self.agents, self.ranks = actor, rows, agents, ranks
        self.taken = taken_by(agents, rows)
        self.share = ranks.share(self.taken.alive, self.taken.advantage.dtype)
        with torch.no_grad():
            self.old = actor.distribution(rows, agents)

    def evaluate(self) -> tuple[Tensor, Tensor, Tensor]:
        """``mean(rho A)``, ``mean(KL(old || new))`` and the mean entropy: what this rank adds to the mean over ranks."""
        policy, taken = self.actor.distribution(self.rows, self.agents), self.taken
        log_prob = policy.log_prob(taken.action)
        loss = losses.ppo_clip_loss(log_prob, taken.log_prob, taken.advantage, taken.alive, clip_epsilon=math.inf)
        divergence, entropy = masked_mean(self.old.kl(policy), taken.alive), masked_mean(policy.entropy(), taken.alive)
        return -loss * self.share, divergence * self.share, entropy * self.share
