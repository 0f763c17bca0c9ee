"""Joint actor-critic gradients: actor and critic follow both objectives (F2A2, Li et al. 2023, Propositions 3 and 4).

Actor and critic minimise one objective, ``alpha1 J_actor + alpha2 J_critic``. In ordinary DDPG the actor follows the
gradient of ``J_actor`` alone and the critic that of ``J_critic`` alone. Here each also follows the gradient of the other
objective, weighted by ``kappa``; ``kappa = 0`` is the ordinary algorithm.

COMA (Proposition 3), on policy. In rewards, with the advantage ``A`` and ``delta = Q(a) - y``, the losses are::

    actor   -mean(log pi(a) sg(alpha1 A - kappa alpha2 delta^2))
    critic  alpha2 mean((Q(a) - sg y)^2) - kappa alpha1 mean(Q(a))

so that the actor avoids actions whose value is not known, and the critic is optimistic: at its own stationary point
``delta = kappa alpha1 / (2 alpha2)``, and where targets are bootstrapped every value is too high by that over ``1 - gamma``,
which no advantage sees. The published derivation needs the baseline without gradient in both losses.

DDPG (Proposition 4), off policy. In rewards, with ``delta = Q(a) - y``, ``rho`` the ratio of the agent's current policy to its
behaviour policy, and a resampled joint action ``~a``, ratios are cut where they are used: ``c = min(eps, rho(a))`` at the stored
action, ``c' = min(eps, 1 / rho(~a))`` at the resampled one. The losses are::

    actor   -mean(sg(alpha1 - 2 kappa alpha2 delta c') Q(~a))
    critic  alpha2 mean((Q(a) - sg y)^2)
            + kappa mean(sg(2 alpha2 delta c' - alpha1) Q(sg ~a)) - kappa alpha1 mean(sg(c) Q(a))

The paper writes costs, for which ``Q``, ``y`` and ``delta`` change sign. ``delta`` is the error of the stored transition also
where it weights a resampled action, whose reward is unknown. Where policies have not moved (``rho = 1``) and ``~a`` is drawn like
``a``, the terms in ``alpha1`` count twice, once for the stored and once for the resampled action; the paper has no factor 1/2. At
the critic's own stationary point under these terms ``alpha1 = 2 alpha2 delta``, so that the actor's coefficient vanishes; it is
negative beyond. An action without noise is the likeliest of a normal policy of unchanged deviation, so that ``c' <= 1``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from marlkit.functional.reduce import masked_mean


@torch.no_grad()
def truncated_ratio(log_prob: Tensor, old_log_prob: Tensor, limit: float) -> Tensor:
    """``min(limit, exp(log_prob - old_log_prob))``, without gradient and without overflow.

    Args:
        log_prob: log-probability of the action under the policy in the numerator, ``[*, N, 1]``.
        old_log_prob: the same under the policy in the denominator, ``[*, N, 1]``.
        limit: ``eps``, above 0.

    Returns:
        ``[*, N, 1]``.
    """
    return (log_prob - old_log_prob).clamp(max=math.log(limit)).exp()


@torch.no_grad()
def coupled_advantage(advantage: Tensor, error: Tensor, *, coupling: float, critic_weight: float | Tensor) -> Tensor:
    """``A - kappa alpha2 delta^2``, what weighs ``log pi(a)`` in the actor's loss where ``alpha1 = 1`` (Proposition 3).

    Args:
        advantage: ``A``, ``[*, N, 1]``.
        error: ``delta = Q_i(a) - y_i``, ``[*, N, 1]``.
        coupling: ``kappa``.
        critic_weight: ``alpha2``.

    Returns:
        ``[*, N, 1]``.
    """
    return advantage - coupling * critic_weight * error.square()


@torch.no_grad()
def actor_coefficient(
    error: Tensor,
    inverse_ratio: Tensor,
    *,
    coupling: float,
    actor_weight: float,
    critic_weight: float,
    floor: float | None = None,
) -> Tensor:
    """``max(floor, alpha1 - 2 kappa alpha2 delta c')``, without gradient.

    Args:
        error: ``delta``, ``[*, N, 1]``.
        inverse_ratio: ``c'`` of the resampled actions, ``[*, N, 1]``.
        coupling: ``kappa``.
        actor_weight: ``alpha1``.
        critic_weight: ``alpha2``.
        floor: smallest coefficient; ``None``, as in the paper: it may become negative, which turns ascent into descent.

    Returns:
        ``[*, N, 1]``.
    """
    coefficient = actor_weight - 2 * coupling * critic_weight * error * inverse_ratio
    return coefficient if floor is None else coefficient.clamp(min=floor)


def actor_loss(resampled_value: Tensor, coefficient: Tensor, weight: Tensor) -> Tensor:
    """``-mmean(sg(coefficient) Q(~a))``; the caller keeps the critic's parameters fixed.

    Args:
        resampled_value: ``Q_i`` of resampled actions, with the gradient of agent i's own, ``[*, N, 1]``.
        coefficient: ``[*, N, 1]``.
        weight: which entries count, ``[*, N, 1]``.
    """
    return -masked_mean(coefficient.detach() * resampled_value, weight)


def critic_coupling(
    value: Tensor,
    resampled_value: Tensor,
    error: Tensor,
    ratio: Tensor,
    inverse_ratio: Tensor,
    weight: Tensor,
    *,
    actor_weight: float,
    critic_weight: float,
) -> Tensor:
    """``mmean(sg(2 alpha2 delta c' - alpha1) Q(~a)) - alpha1 mmean(sg(c) Q(a))``, to be weighted by ``kappa``.

    Args:
        value: ``Q_i(a)`` of the stored actions, with gradient, ``[*, N, 1]``.
        resampled_value: ``Q_i(~a)`` of resampled actions that carry no gradient, ``[*, N, 1]``.
        error: ``delta = Q_i(a) - y_i``, ``[*, N, 1]``.
        ratio: ``c`` of the stored actions, ``[*, N, 1]``.
        inverse_ratio: ``c'`` of the resampled actions, ``[*, N, 1]``.
        weight: which entries count, ``[*, N, 1]``.
        actor_weight: ``alpha1``.
        critic_weight: ``alpha2``.
    """
    pull = (2 * critic_weight * error * inverse_ratio - actor_weight).detach()
    return masked_mean(pull * resampled_value, weight) - actor_weight * masked_mean(ratio.detach() * value, weight)
