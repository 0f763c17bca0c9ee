"""An actor's batch without an environment, and optimiser steps that store their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Actor, Critic
from marlkit.learning import Learning, Metrics
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.spec import Continuous, Discrete, TeamSpec

B, T, N = 4, 6, 3
DISCRETE = TeamSpec(N, 5, Discrete(4), team_reward=True, action_sizes=(4, 4, 2))
CONTINUOUS = TeamSpec(N, 5, Continuous(2), team_reward=True, action_sizes=(2, 2, 1))


def batch_of(actor: Actor, seed: int = 0, shape: tuple[int, ...] = (B, T)) -> TensorDict:
    """A batch that the actor might have collected, annotated and estimated at random; some agents are not alive."""
    torch.manual_seed(seed)
    spec = actor.spec
    batch = TensorDict({}, batch_size=list(shape))
    batch.set(keys.OBSERVATION, torch.randn(*shape, N, spec.observation))
    batch.set(keys.STATE, torch.randn(*shape, spec.state_size))
    has = torch.arange(spec.action_features) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)
    batch.set(keys.ACTION_MASK if spec.discrete else keys.ACTION_DIMS, has.expand(*shape, -1, -1).clone())
    batch.set(keys.ALIVE, torch.rand(*shape, N, 1) < 0.7)
    for key in (keys.ADVANTAGE, keys.VALUE_TARGET, keys.STATE_VALUE):
        batch.set(key, torch.randn(*shape, N, 1))
    with torch.no_grad():
        actor(batch)
    return batch


def log_probs(actor: StochasticActor, batch: TensorDictBase) -> Tensor:
    """``log pi_i(a_i | o_i)`` ``[*, N]``, computed from the actor's network instead of its distribution."""
    outputs = actor.network(batch[keys.OBSERVATION])
    action = batch[keys.ACTION]
    if actor.spec.discrete:
        available = outputs - 1e10 * (~batch[keys.ACTION_MASK])
        exponentials = (available - available.max(-1, keepdim=True).values).exp()
        return (exponentials.gather(-1, action.unsqueeze(-1))[..., 0] / exponentials.sum(-1)).log()
    deviation = torch.stack([actor.log_deviation[group] for group in actor.groups]).exp()
    density = (-0.5 * ((action - outputs) / deviation) ** 2).exp() / (deviation * math.sqrt(2 * math.pi))
    return (density.log() * batch[keys.ACTION_DIMS]).sum(-1)


class Descent:
    """A ``minimise`` that takes plain gradient steps and stores losses and gradients."""

    def __init__(self, module: nn.Module, lr: float = 0.0) -> None:
        self.parameters = list(module.parameters())
        self.lr = lr
        self.losses: list[float] = []
        self.gradients: list[list[Tensor | None]] = []

    def __call__(self, loss: Tensor, max_grad_norm: float | None) -> Metrics:
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.losses.append(loss.item())
        self.gradients.append(list(found))
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, found, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=self.lr)
        return {}


def learning(actor: Actor, critic: Critic, minimise: Callable[..., Metrics], progress: float = 0.0) -> Learning:
    return Learning(actor, critic, TruePolicyOpponents(actor.spec), minimise, progress)


def snapshot(*modules: nn.Module) -> dict[str, Tensor]:
    return {f"{i}.{k}": v.clone() for i, module in enumerate(modules) for k, v in module.state_dict().items()}


def changed(before: dict[str, Tensor], *modules: nn.Module) -> set[str]:
    """Names of the parameters and buffers that are no longer the same bit for bit."""
    return {name for name, value in snapshot(*modules).items() if not torch.equal(value, before[name])}
