"""Distributions of a team's actions: one independent distribution per agent, never a product over agents.

Every quantity keeps the agent axis: log-probabilities, entropies and divergences are ``[*, N, 1]``, summed over an agent's own
action dimensions only. The parameters travel in a TensorDict under ``LOGITS`` or ``LOC`` and ``SCALE``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.distributions import Distribution, constraints

from marlkit import keys
from marlkit.functional.gumbel import gumbel_from_uniform, straight_through
from marlkit.functional.one_hot import one_hot
from marlkit.keys import Key

UNAVAILABLE = -1e10
"""Logit of an unavailable action: finite, because minus infinity makes entropies and divergences NaN."""


class TeamDistribution(ABC):
    """Interface of a distribution of a team's actions: ``[*, N]`` int64, or ``[*, N, D]`` float in the environment's units."""

    @abstractmethod
    def sample(self) -> Tensor:
        """A random action, ``[*, N]`` int64 or ``[*, N, D]``, without gradient."""

    @abstractmethod
    def rsample(self) -> Tensor:
        """A random action with the gradient of the parameters, as features ``[*, N, F]``; discrete ones one-hot."""

    @abstractmethod
    def mode(self) -> Tensor:
        """The most likely action, ``[*, N]`` or ``[*, N, D]``."""

    @abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability (density) of ``action`` ``[*, N]`` or ``[*, N, D]``, ``[*, N, 1]``."""

    def log_prob_by_dimension(self, action: Tensor) -> Tensor:
        """:meth:`log_prob` by action dimension, ``[*, N, D]``; ``[*, N, 1]`` where an action has one."""
        return self.log_prob(action)

    @abstractmethod
    def entropy(self) -> Tensor:
        """Entropy, ``[*, N, 1]``."""

    @abstractmethod
    def kl(self, other: TeamDistribution) -> Tensor:
        """Exact divergence ``KL(self || other)`` from a distribution of the same family, ``[*, N, 1]``."""

    @abstractmethod
    def parameters(self) -> dict[Key, Tensor]:
        """The parameters by key, each ``[*, N, F]``."""

    @abstractmethod
    def with_parameters(self, parameters: Mapping[Key, Tensor]) -> TeamDistribution:
        """The distribution of the same family over the same actions that has these :meth:`parameters`, each ``[*, N, F]``."""


class CategoricalTeam(TeamDistribution):
    """Softmax over discrete actions, or its mixture with a uniform choice, ``p = (1 - e) softmax(logits) + e / n``.

    Args:
        logits: ``[*, N, A]``.
        mask: ``[*, N, A]`` bool, true where an action is available; ``None`` if ``logits`` are masked already.
        uniform_share: ``e``, a scalar in [0, 1], shared by the ``n`` available actions; ``None`` for the plain softmax.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None, uniform_share: Tensor | None = None) -> None:
        masked = logits if mask is None else logits.masked_fill(~mask, UNAVAILABLE)
        self.log_probs = masked.log_softmax(-1)
        if uniform_share is not None:
            self.log_probs = _mixed(self.log_probs, masked < UNAVAILABLE / 2, uniform_share)

    def sample(self) -> Tensor:
        """``[*, N]`` by Gumbel-max in its exponential form: the largest ``p / E``, ``E ~ Exp(1)``; never one with ``p = 0``."""
        probabilities = self.log_probs.detach().exp()
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)

    def rsample(self, temperature: float = 1.0) -> Tensor:
        """Straight-through Gumbel-softmax ``[*, N, A]``: one-hot, with the gradient of ``softmax((log p + g) / temperature)``."""
        noise = gumbel_from_uniform(torch.rand_like(self.log_probs))
        return straight_through(self.log_probs, noise, temperature)

    def mode(self) -> Tensor:
        """The most likely action of each agent, ``[*, N]``."""
        return self.log_probs.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """``log p[action]`` of ``action`` ``[*, N]``, ``[*, N, 1]``."""
        return self.log_probs.gather(-1, action.unsqueeze(-1))

    def entropy(self) -> Tensor:
        """``-sum_a p_a log p_a``, ``[*, N, 1]``."""
        return -(self.log_probs.exp() * self.log_probs).sum(-1, keepdim=True)

    def kl(self, other: TeamDistribution) -> Tensor:
        """``sum_a p_a (log p_a - log q_a)``, ``[*, N, 1]``."""
        assert isinstance(other, CategoricalTeam)
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1, keepdim=True)

    def parameters(self) -> dict[Key, Tensor]:
        """``LOGITS`` ``[*, N, A]``: the log-probabilities, which are logits of the same distribution."""
        return {keys.LOGITS: self.log_probs}

    def with_parameters(self, parameters: Mapping[Key, Tensor]) -> TeamDistribution:
        """The softmax of other ``LOGITS`` ``[*, N, A]``, masked already."""
        return CategoricalTeam(parameters[keys.LOGITS])


class EpsilonGreedyTeam(CategoricalTeam):
    """The available action of the highest value, or with probability ``e`` a uniform choice: ``p = (1 - e) [a = a*] + e / n``.

    Of equal values the first is taken. Probabilities have no gradient, because they do not change with small changes of values.

    Args:
        values: ``[*, N, A]``.
        mask: ``[*, N, A]`` bool, true for the ``n`` actions that are available.
        uniform_share: ``e``, a scalar in [0, 1].
    """

    def __init__(self, values: Tensor, mask: Tensor, uniform_share: Tensor) -> None:
        self.greedy = values.detach().masked_fill(~mask, -torch.inf).argmax(-1)
        best = one_hot(self.greedy, values.shape[-1], values.dtype)
        share = mask / mask.sum(-1, keepdim=True).clamp(min=1)
        probabilities = (1 - uniform_share) * best + uniform_share * share
        self.log_probs = probabilities.log().clamp(min=UNAVAILABLE)

    def mode(self) -> Tensor:
        """The action of the highest value, ``[*, N]``, even where all are equally likely."""
        return self.greedy


def _mixed(log_probs: Tensor, unavailable: Tensor, uniform_share: Tensor) -> Tensor:
    """``log((1 - e) p + e / n)`` of the available actions, computed in logarithms."""
    count = (~unavailable).sum(-1, keepdim=True)
    uniform = uniform_share.log() - count.to(log_probs.dtype).log()
    mixed = torch.logaddexp(log_probs + torch.log1p(-uniform_share), uniform.expand_as(log_probs))
    return mixed.masked_fill(unavailable, UNAVAILABLE)


class NormalTeam(TeamDistribution):
    """Independent normal distributions per action dimension.

    Args:
        loc: means, ``[*, N, D]``.
        scale: standard deviations, ``[*, N, D]``.
        dims: ``[*, N, D]`` bool, true for the dimensions that the agent has; padding adds nothing to any sum.
    """

    def __init__(self, loc: Tensor, scale: Tensor, dims: Tensor | None = None) -> None:
        self.loc, self.scale, self.dims = loc, scale, dims

    def sample(self) -> Tensor:
        """``loc + scale * noise``, ``[*, N, D]``, without gradient."""
        return self.rsample().detach()

    def rsample(self) -> Tensor:
        """``loc + scale * noise``, ``[*, N, D]``, with the gradient of both."""
        return self.loc + self.scale * torch.randn_like(self.loc)

    def mode(self) -> Tensor:
        """``loc``, ``[*, N, D]``."""
        return self.loc

    def _sum(self, per_dimension: Tensor) -> Tensor:
        masked = per_dimension if self.dims is None else per_dimension.masked_fill(~self.dims, 0.0)
        return masked.sum(-1, keepdim=True)

    def log_prob(self, action: Tensor) -> Tensor:
        """``sum_d -((a - loc) / scale)^2 / 2 - log scale - log(2 pi) / 2``: ``[*, N, D]`` to ``[*, N, 1]``."""
        return self._sum(self.log_prob_by_dimension(action))

    def log_prob_by_dimension(self, action: Tensor) -> Tensor:
        """The terms of that sum, ``[*, N, D]``, those of padding too."""
        standard = (action - self.loc) / self.scale
        return -0.5 * standard.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)

    def entropy(self) -> Tensor:
        """``sum_d log scale + (1 + log(2 pi)) / 2``, ``[*, N, 1]``."""
        return self._sum((self.scale.log() + 0.5 * (1 + math.log(2 * math.pi))).expand_as(self.loc))

    def kl(self, other: TeamDistribution) -> Tensor:
        """``sum_d log(s' / s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2``, ``[*, N, 1]``."""
        assert isinstance(other, NormalTeam)
        ratio = (self.scale / other.scale).square()
        distance = ((self.loc - other.loc) / other.scale).square()
        return self._sum(0.5 * (ratio + distance - 1 - ratio.log()))

    def parameters(self) -> dict[Key, Tensor]:
        """``LOC`` and ``SCALE``, each ``[*, N, D]``."""
        return {keys.LOC: self.loc, keys.SCALE: self.scale.expand_as(self.loc)}

    def with_parameters(self, parameters: Mapping[Key, Tensor]) -> TeamDistribution:
        """Other ``LOC`` and ``SCALE`` ``[*, N, D]`` over the dimensions that these agents have."""
        return NormalTeam(parameters[keys.LOC], parameters[keys.SCALE], self.dims)


def stored_distribution(batch: TensorDictBase, *, discrete: bool) -> TeamDistribution:
    """The distribution ``[*, N]`` whose parameters are stored in the batch ``[*]``: the policy that collected it."""
    if discrete:
        return CategoricalTeam(batch[keys.LOGITS])
    return NormalTeam(batch[keys.LOC], batch[keys.SCALE], batch[keys.ACTION_DIMS])


def behaviour_distribution(policy: TeamDistribution, batch: TensorDictBase) -> TeamDistribution:
    """The distribution ``[*, N]`` that the actions of a batch ``[*]`` were played from, of the family of ``policy``."""
    return policy.with_parameters({key: batch[keys.BEHAVIOUR[key]] for key in policy.parameters()})


class AgentDistribution(Distribution):
    """A team's distribution as one of torch, for libraries that take these: TorchRL's losses and modules.

    Everywhere in marlkit, log-probabilities and entropies are ``[*, N, 1]``, and here too: they match what is stored under
    ``LOG_PROB``, and advantages.

    Args:
        team: the distribution.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, team: TeamDistribution) -> None:
        self.team = team
        leading = next(iter(team.parameters().values())).shape[:-1]
        super().__init__(batch_shape=leading, validate_args=False)

    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """A random action, ``[*, N]`` or ``[*, N, D]``, without gradient."""
        self._refuse_several(sample_shape)
        return self.team.sample()

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """A random action with gradient, ``[*, N, F]``; discrete ones one-hot."""
        self._refuse_several(sample_shape)
        return self.team.rsample()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability (density) of actions, ``[*, N, 1]``."""
        return self.team.log_prob(value)

    def entropy(self) -> Tensor:
        """``[*, N, 1]``."""
        return self.team.entropy()

    @property
    def mode(self) -> Tensor:
        """The most likely action, ``[*, N]`` or ``[*, N, D]``."""
        return self.team.mode()

    @property
    def deterministic_sample(self) -> Tensor:
        """As :attr:`mode`, under the name that TorchRL reads."""
        return self.team.mode()

    @staticmethod
    def _refuse_several(sample_shape: torch.Size | Sequence[int]) -> None:
        if tuple(sample_shape):
            raise ValueError(f"draws one action per agent at a time: sample_shape must be empty, got {tuple(sample_shape)}")
