"""Rollouts of uniformly random actions: data that covers the joint actions evenly, whatever the policy is."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor
from marlkit.contract import Contract, When
from marlkit.data.rollout import RolloutData
from marlkit.keys import Key
from marlkit.nn.actions import ActionRange
from marlkit.nn.distributions import UNAVAILABLE
from marlkit.spec import Continuous


class UniformPlayData(RolloutData):
    """``steps`` joint steps of every environment, in which all agents act uniformly at random.

    Available actions are equally likely where they are discrete, all values between the bounds where they are continuous (-1 and
    1 where there are none). The action's log-probability is that of this behaviour, so that the ratio of an update is that of the
    policy to it. Everything else that the actor writes, such as logits, is the actor's: what samples the others' policies finds
    these. In games of one step this is the uniform data of Jafferjee et al. 2022 (section 5.1), drawn anew in each iteration.

    Only each agent's own ratio corrects for the behaviour, as in every update of marlkit: values are those of what the others
    did, not of what they would do now, unless the critic marginalises.

    Args:
        spec: the team.
        steps: length T of a rollout; the batch of an iteration has ``num_envs * steps`` joint steps.
    """

    contract = Contract(
        writes=(
            *(keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID),
            When("discrete", (keys.BEHAVIOUR_LOGITS,)),
        ),
        traits=("on_policy",),
    )

    def choose(self, seen: TensorDictBase, actor: Actor) -> TensorDictBase:
        """The actor's step ``[B]`` with an action and a log-probability of the behaviour."""
        chosen = super().choose(seen, actor)
        available = actor.available(seen)
        action, log_prob = _among(available) if self.spec.discrete else self._within_bounds(available)
        return chosen.set(keys.ACTION, action).set(keys.LOG_PROB, log_prob)

    def behaviour(self, played: TensorDictBase, key: Key, actor: Actor) -> Tensor:
        """The logits ``[B, T, N, A]`` of a uniform choice; no normal distribution is uniform."""
        available = actor.available(played)
        return torch.zeros(available.shape, device=available.device).masked_fill(~available, UNAVAILABLE)

    def _within_bounds(self, dims: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-probabilities for the dimensions ``[*, N, D]`` that an agent has."""
        space = self.spec.action
        assert isinstance(space, Continuous)
        # Made within the step: a recording takes in no tensors that a component does not hold.
        span = ActionRange(space, self.spec.n_agents).to(dims.device)
        action = span.middle + span.half_range * (2 * torch.rand(dims.shape, device=dims.device) - 1)
        width = torch.where(dims, 2 * span.half_range, 1.0)
        return torch.where(dims, action, 0.0), -width.log().sum(-1, keepdim=True)


def _among(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Actions and log-probabilities among those available, ``[*, N, A]``."""
    action = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0).argmax(-1)
    return action, -mask.sum(-1, keepdim=True).float().log()
