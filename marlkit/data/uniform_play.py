"""Rollouts of uniformly random actions: data that covers the joint actions evenly, whatever the policy is."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor
from marlkit.contract import Contract
from marlkit.data.rollout import RolloutData
from marlkit.options import PositiveInt
from marlkit.spec import Continuous, TeamSpec


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
        writes=(keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID),
        traits=("on_policy",),
    )

    def __init__(self, spec: TeamSpec, *, steps: PositiveInt = 100) -> None:
        super().__init__(spec, steps=steps)
        self._bounds: tuple[Tensor, Tensor] | None = None
        if isinstance(spec.action, Continuous):
            reach = torch.ones(spec.n_agents, spec.action.size)
            low, high = spec.action.low, spec.action.high
            self._bounds = (-reach if low is None else torch.tensor(low), reach if high is None else torch.tensor(high))

    def choose(self, seen: TensorDictBase, actor: Actor) -> TensorDictBase:
        """The actor's step ``[B]`` with an action and a log-probability of the behaviour."""
        chosen = super().choose(seen, actor)
        available = actor.available(seen)
        action, log_prob = _among(available) if self._bounds is None else _between(*self._bounds, available)
        return chosen.set(keys.ACTION, action).set(keys.LOG_PROB, log_prob)


def _between(low: Tensor, high: Tensor, dims: Tensor) -> tuple[Tensor, Tensor]:
    """Actions and log-probabilities between bounds ``[N, D]`` for the dimensions ``[*, N, D]`` that an agent has."""
    low, high = low.to(dims.device), high.to(dims.device)
    action = torch.where(dims, low + (high - low) * torch.rand(dims.shape, device=dims.device), 0.0)
    return action, -torch.where(dims, high - low, 1.0).log().sum(-1, keepdim=True)


def _among(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Actions and log-probabilities among those available, ``[*, N, A]``."""
    action = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0).argmax(-1)
    return action, -mask.sum(-1, keepdim=True).float().log()
