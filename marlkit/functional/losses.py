"""Losses of policy-based learning and their diagnostics, as scalars of a weighted batch.

Everything is per agent and reduced by :func:`marlkit.functional.reduce.masked_mean`: ``mmean(x) = sum(w * x) / max(sum(w), 1)``.
The ratio of an agent is ``rho = exp(log_prob - old_log_prob)``, never a product over agents. Old log-probabilities, advantages,
old predictions and targets are constants, whether or not the caller detached them. Where the weight is zero, no value of
the inputs, not even an infinite one or NaN, reaches a loss or a gradient.

Shapes: all tensors share one shape, ``[*, N, 1]``; all but the first may also have ones in it and are broadcast.

Sources: Schulman et al. 2017, "Proximal policy optimization algorithms" (clipped objective); Yu et al. 2022, "The surprising
effectiveness of PPO in cooperative multi-agent games" (clipped Huber value loss); Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from marlkit.functional.reduce import broadcast, masked_mean


def policy_gradient_loss(log_prob: Tensor, advantage: Tensor, weight: Tensor) -> Tensor:
    """Loss ``-mmean(log_prob * A)``, whose negative gradient is the policy gradient.

    Args:
        log_prob: log-probability of the action taken, with gradient, ``[*, N, 1]``.
        advantage: ``A``, broadcastable to ``log_prob``.
        weight: which entries count, bool or float, broadcastable to ``log_prob``.

    Raises:
        ValueError: a shape does not fit that of ``log_prob``.
    """
    advantage = broadcast("advantage", advantage.detach(), "log_prob", log_prob)
    weight = broadcast("weight", weight, "log_prob", log_prob)
    return -masked_mean(_counted(log_prob, weight) * _counted(advantage, weight), weight)


def ppo_clip_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, weight: Tensor, *, clip_epsilon: float) -> Tensor:
    """Clipped surrogate loss ``-mmean(min(rho * A, clip(rho, 1 - epsilon, 1 + epsilon) * A))``.

    Args:
        log_prob: log-probability of the action under the current policy, with gradient, ``[*, N, 1]``.
        old_log_prob: the same under the policy that acted, broadcastable to ``log_prob``.
        advantage: ``A``, broadcastable to ``log_prob``; for sequential updates the compound factor times the advantage.
        weight: which entries count, bool or float, broadcastable to ``log_prob``.
        clip_epsilon: how far the ratio may move from 1 with a gain; ``inf`` leaves the plain surrogate ``-mmean(rho * A)``.

    Raises:
        ValueError: a shape does not fit that of ``log_prob``.
    """
    weight = broadcast("weight", weight, "log_prob", log_prob)
    return -masked_mean(_clipped_surrogate(log_prob, old_log_prob, advantage, weight, clip_epsilon), weight)


def ppo_clip_loss_by_dimension(
    log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, weight: Tensor, dims: Tensor, *, clip_epsilon: float
) -> Tensor:
    """Loss ``-mmean(sum_d min(rho_d * A, clip(rho_d, 1 - epsilon, 1 + epsilon) * A))`` with a ratio per action dimension d.

    Args:
        log_probs: log-probabilities of the dimensions of the action under the current policy, with gradient, ``[*, N, D]``.
        old_log_probs: the same under the policy that acted, broadcastable to ``log_probs``.
        advantage: ``A``, ``[*, N, 1]``.
        weight: which agents count, bool or float, ``[*, N, 1]``.
        dims: which dimensions an agent has, bool, ``[*, N, D]``; the others add nothing.
        clip_epsilon: how far a ratio may move from 1 with a gain.

    Raises:
        ValueError: a shape does not fit that of ``log_probs``.
    """
    counted = broadcast("dims", dims, "log_probs", log_probs) & (broadcast("weight", weight, "log_probs", log_probs) != 0)
    surrogate = _clipped_surrogate(log_probs, old_log_probs, advantage, counted, clip_epsilon)
    return -masked_mean(surrogate.sum(-1, keepdim=True), weight)


def _clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, weight: Tensor, clip_epsilon: float) -> Tensor:
    """``min(rho * A, clip(rho, 1 - epsilon, 1 + epsilon) * A)`` ``[*]``, zero where the weight is zero."""
    ratio = _log_ratio(log_prob, old_log_prob, weight).exp()
    advantage = _counted(broadcast("advantage", advantage.detach(), "log_prob", log_prob), weight)
    clipped = ratio.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
    return torch.minimum(ratio * advantage, clipped * advantage)


def value_loss(
    prediction: Tensor,
    old_prediction: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    *,
    clip: float | None,
    huber_delta: float | None,
) -> Tensor:
    """Value regression loss ``mmean(max(h(V - G), h(V_clip - G)))``.

    ``V_clip = V_old + clamp(V - V_old, -clip, clip)``; without ``clip`` it is ``mmean(h(V - G))``.
    With Huber, ``h(e) = e^2 / 2`` for ``|e| <= delta`` and ``delta * (|e| - delta / 2)`` beyond; without, ``h(e) = e^2 / 2``, the
    limit of a large ``delta``, so that changing between them does not rescale the loss.

    Args:
        prediction: ``V`` with gradient, ``[*, N, 1]``, in the critic's normalised units like all the others.
        old_prediction: ``V_old``, the prediction at the start of the update; may be ``None`` without ``clip``.
        target: ``G``, broadcastable to ``prediction``.
        weight: which entries count, bool or float, broadcastable to ``prediction``; ``None``: all.
        clip: how far a prediction may move from the old one with a gain, or ``None``.
        huber_delta: where the loss turns from square to linear, or ``None`` for the square everywhere.

    Raises:
        ValueError: a shape does not fit that of ``prediction``, or ``clip`` is given without ``old_prediction``.
    """
    if weight is not None:
        weight = broadcast("weight", weight, "prediction", prediction)
    target = _counted(broadcast("target", target.detach(), "prediction", prediction), weight)
    prediction = _counted(prediction, weight)
    loss = _distance(prediction, target, huber_delta)
    if clip is not None:
        if old_prediction is None:
            raise ValueError("old_prediction is needed to clip the value loss; pass it or set clip to None")
        old = _counted(broadcast("old_prediction", old_prediction.detach(), "prediction", prediction), weight)
        loss = torch.maximum(loss, _distance(old + (prediction - old).clamp(-clip, clip), target, huber_delta))
    return masked_mean(loss, weight)


@torch.no_grad()
def approximate_kl(log_prob: Tensor, old_log_prob: Tensor, weight: Tensor) -> Tensor:
    """Estimate ``mmean((rho - 1) - log(rho))`` of KL(old || new) from actions of the old policy; never negative, no gradient.

    Args:
        log_prob: log-probability of the action under the current policy, ``[*, N, 1]``.
        old_log_prob: the same under the policy that acted, broadcastable to ``log_prob``.
        weight: which entries count, bool or float, broadcastable to ``log_prob``.

    Raises:
        ValueError: a shape does not fit that of ``log_prob``.
    """
    log_ratio = _log_ratio(log_prob, old_log_prob, weight)
    return masked_mean(torch.expm1(log_ratio) - log_ratio, weight)


@torch.no_grad()
def clip_fraction(log_prob: Tensor, old_log_prob: Tensor, weight: Tensor, *, clip_epsilon: float) -> Tensor:
    """Share ``mmean(|rho - 1| > epsilon)`` of ratios outside the clip range, no gradient.

    Args:
        log_prob: log-probability of the action under the current policy, ``[*, N, 1]``.
        old_log_prob: the same under the policy that acted, broadcastable to ``log_prob``.
        weight: which entries count, bool or float, broadcastable to ``log_prob``.
        clip_epsilon: ``epsilon``.

    Raises:
        ValueError: a shape does not fit that of ``log_prob``.
    """
    change = torch.expm1(_log_ratio(log_prob, old_log_prob, weight)).abs()
    return masked_mean((change > clip_epsilon).to(log_prob.dtype), weight)


@torch.no_grad()
def explained_variance(prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Share of the variance of the targets that the predictions explain, ``1 - Var(G - V) / Var(G)``, no gradient.

    1 is perfect, 0 no better than a constant, below 0 worse. Targets that are constant up to rounding have no variance to
    explain: the result is then 0. Both variances are the weighted population's.

    Args:
        prediction: ``V``, ``[*, N, 1]``.
        target: ``G``, broadcastable to ``prediction``.
        weight: which entries count, bool or float, broadcastable to ``prediction``; ``None``: all.

    Raises:
        ValueError: a shape does not fit that of ``prediction``.
    """
    target = broadcast("target", target, "prediction", prediction)
    total, residual = _variance(target, weight), _variance(target - prediction, weight)
    rounding = (32.0 * torch.finfo(target.dtype).eps) ** 2 * masked_mean(target.square(), weight)
    return torch.where(total > rounding, 1.0 - residual / total, torch.zeros_like(total))


def _counted(x: Tensor, weight: Tensor | None) -> Tensor:
    """Zero where the weight is zero, so that products and their derivatives stay finite there."""
    return x if weight is None else x.masked_fill(weight == 0, 0.0)


def _log_ratio(log_prob: Tensor, old_log_prob: Tensor, weight: Tensor) -> Tensor:
    """``log_prob - old_log_prob`` where the weight is not zero, otherwise zero: a ratio of one."""
    old_log_prob = broadcast("old_log_prob", old_log_prob.detach(), "log_prob", log_prob)
    return _counted(log_prob - old_log_prob, broadcast("weight", weight, "log_prob", log_prob))


def _distance(prediction: Tensor, target: Tensor, huber_delta: float | None) -> Tensor:
    if huber_delta is None:
        return 0.5 * (prediction - target).square()
    return functional.huber_loss(prediction, target, reduction="none", delta=huber_delta)


def _variance(x: Tensor, weight: Tensor | None) -> Tensor:
    return masked_mean((x - masked_mean(x, weight)).square(), weight)
