"""Returns and advantages of rollouts, without gradient: GAE, lambda-return, n-step return.

One rollout batch holds ``B`` environments of ``T`` steps. ``next_value[:, t]`` is the value ``U_t`` of the state that step ``t``
arrived at *before* any reset, so that a truncated step bootstraps from the state in which it ended and never from the state that
the environment was reset to. There are two factors: a ``terminated`` step does not bootstrap (factor ``1 - terminated``), and
no value flows backwards over the end of an episode (chain factor ``1 - done``). ``U_t`` of a terminated step is never used.

Sources: Schulman et al. 2016, "High-dimensional continuous control using generalised advantage estimation" (GAE); Sutton and
Barto 2018, chapters 7 and 12 (n-step and lambda-return); Pardo et al. 2018, "Time limits in reinforcement learning" (bootstrap at
truncation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlkit.errors import OptionError

_TIME = 1


@torch.no_grad()
def generalised_advantage(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, *, gamma: float, lmbda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimate and the value target that belongs to it.

    ``delta_t = r_t + gamma * (1 - terminated_t) * U_t - V_t``,
    ``A_t = delta_t + gamma * lmbda * (1 - done_t) * A_{t+1}`` with ``A_T = 0``, and the target ``A_t + V_t``.

    Args:
        reward: ``[B, T, N, 1]``, or the team's ``[B, T, 1]``.
        value: ``V_t``, ``[B, T, N, 1]``.
        next_value: ``U_t``, ``[B, T, N, 1]``: the value at the pre-reset next state.
        terminated: bool ``[B, T, 1]`` or per agent.
        done: bool like ``terminated``: terminated or truncated.
        gamma: discount in [0, 1].
        lmbda: trace decay in [0, 1]; 0 is the one-step advantage, 1 the discounted sum of rewards minus the value.

    Returns:
        ``(advantage, target)``, each of the shape of ``value``.

    Raises:
        ValueError: a shape does not fit that of ``value``, or a flag is not bool.
    """
    reward, next_value = _like("reward", reward, value), _like("next_value", next_value, value)
    terminated, done = _flag("terminated", terminated, value), _flag("done", done, value)
    delta = reward + gamma * next_value.masked_fill(terminated, 0.0) - value
    advantage = _reverse_scan(delta, (gamma * lmbda) * (~done).to(delta.dtype))
    return advantage, advantage + value


@torch.no_grad()
def bootstrap_drift(value: Tensor, next_value: Tensor, done: Tensor, *, gamma: float, lmbda: float) -> Tensor:
    """The term that GAE's recursion omits where the bootstrap value is not the value of the next step.

    ``gamma * lmbda * (1 - done_t) * (V_{t+1} - U_t)``, zero at the last step. :func:`generalised_advantage` of rewards to which
    this was added is ``G_t - V_t`` with the TD(lambda) return ``G_t`` for any ``U``; exactly zero where ``U_t = V_{t+1}``.

    Args:
        value: ``V_t``, ``[B, T, N, 1]``.
        next_value: ``U_t``, ``[B, T, N, 1]``.
        done: bool ``[B, T, 1]`` or per agent: terminated or truncated.
        gamma: discount in [0, 1].
        lmbda: trace decay in [0, 1].

    Returns:
        The shape of ``value``.
    """
    drift = (gamma * lmbda) * (value.roll(-1, _TIME) - next_value)
    return drift.masked_fill(_cut(_flag("done", done, value)), 0.0)


@torch.no_grad()
def lambda_return(reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, *, gamma: float, lmbda: float) -> Tensor:
    """TD(lambda) return.

    ``G_t = r_t + gamma * (1 - terminated_t) * ((1 - L_t) * U_t + L_t * G_{t+1})`` with ``L_t = lmbda * (1 - done_t)``, zero
    at the last step of the batch. Equals the target of :func:`generalised_advantage` where ``U_t = V_{t+1}`` inside episodes.

    Args:
        reward: ``[B, T, N, 1]``, or the team's ``[B, T, 1]``.
        next_value: ``U_t``, ``[B, T, N, 1]``: the value at the pre-reset next state.
        terminated: bool ``[B, T, 1]`` or per agent.
        done: bool like ``terminated``: terminated or truncated.
        gamma: discount in [0, 1].
        lmbda: weight of the longer returns in [0, 1]; 0 is the one-step return, 1 runs to the end of the episode or batch.

    Returns:
        The shape of ``next_value``.

    Raises:
        ValueError: a shape does not fit that of ``next_value``, or a flag is not bool.
    """
    reward = _like("reward", reward, next_value)
    terminated, done = _flag("terminated", terminated, next_value), _flag("done", done, next_value)
    next_value = next_value.masked_fill(terminated, 0.0)
    chain = (gamma * lmbda) * (~_cut(done)).to(next_value.dtype)
    return _reverse_scan(reward + gamma * next_value - chain * next_value, chain)


@torch.no_grad()
def n_step_return(reward: Tensor, next_value: Tensor, terminated: Tensor, done: Tensor, *, gamma: float, n: int) -> Tensor:
    """Sum of ``n`` discounted rewards and a bootstrap, shorter where the episode or the batch ends.

    ``X_{1,t} = r_t + gamma * (1 - terminated_t) * U_t`` and
    ``X_{m+1,t} = r_t + gamma * (1 - terminated_t) * (U_t if done_t or t = T-1 else X_{m,t+1})``; the return is ``X_n``.

    Args:
        reward: ``[B, T, N, 1]``, or the team's ``[B, T, 1]``.
        next_value: ``U_t``, ``[B, T, N, 1]``: the value at the pre-reset next state.
        terminated: bool ``[B, T, 1]`` or per agent.
        done: bool like ``terminated``: terminated or truncated.
        gamma: discount in [0, 1].
        n: number of rewards, at least 1; ``n >= T`` runs to the end of the episode or batch.

    Returns:
        The shape of ``next_value``.

    Raises:
        ValueError: a shape does not fit that of ``next_value``, or a flag is not bool.
        OptionError: ``n`` is smaller than 1.
    """
    if n < 1:
        raise OptionError("n", f"must be at least 1, got {n}")
    if n >= next_value.shape[_TIME]:
        return lambda_return(reward, next_value, terminated, done, gamma=gamma, lmbda=1.0)
    reward = _like("reward", reward, next_value)
    terminated, done = _flag("terminated", terminated, next_value), _flag("done", done, next_value)
    next_value, cut = next_value.masked_fill(terminated, 0.0), _cut(done)
    result = reward + gamma * next_value
    for _ in range(n - 1):
        result = reward + gamma * torch.where(cut, next_value, result.roll(-1, _TIME))
    return result


def _reverse_scan(x: Tensor, factor: Tensor) -> Tensor:
    """``y_t = x_t + factor_t * y_{t+1}`` along time, ``y_T = 0``. Overwrites ``x``, which the caller must own.

    The loop runs over contiguous time-major rows: over strided slices of ``[B, T, ...]`` it is several times slower.
    """
    rows = x.movedim(_TIME, 0).contiguous()
    steps, factors = rows.unbind(), factor.movedim(_TIME, 0).contiguous().unbind()
    for step in range(len(steps) - 2, -1, -1):
        steps[step].addcmul_(factors[step], steps[step + 1])
    return rows.movedim(0, _TIME).contiguous()


def _cut(done: Tensor) -> Tensor:
    """Steps that no step of the same episode follows in the batch: done, or the last of the batch."""
    last = torch.arange(done.shape[_TIME], device=done.device) == done.shape[_TIME] - 1
    return done | last.view(-1, *[1] * (done.ndim - _TIME - 1))


def _like(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """A team tensor ``[B, T, 1]`` as ``[B, T, 1, 1]`` where ``value`` is ``[B, T, N, 1]``; others as they are."""
    same = tensor.ndim == value.ndim and all(a in (1, b) for a, b in zip(tensor.shape, value.shape, strict=True))
    if same and tensor.shape[: _TIME + 1] == value.shape[: _TIME + 1]:
        return tensor
    if tensor.ndim == value.ndim - 1 and tensor.shape == (*value.shape[: _TIME + 1], 1):
        return tensor.unsqueeze(_TIME + 1)
    raise ValueError(
        f"{name} of shape {list(tensor.shape)} does not fit values of shape {list(value.shape)}; "
        f"expected that shape or the team's {[*value.shape[: _TIME + 1], 1]}"
    )


def _flag(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    """:func:`_like` for a flag."""
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, got {tensor.dtype}")
    return _like(name, tensor, value)
