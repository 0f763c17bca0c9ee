"""Small teams, and batches of random but valid tensors without an environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor, ModuleComponent
from marlkit.keys import Key
from marlkit.nn.distributions import UNAVAILABLE
from marlkit.spec import Continuous, Discrete, TeamSpec

FREE_SIZES = {"V": 1, "H": 4, "E": 64, "M": 2}
"""Sizes of the dimensions that a component decides itself, where nothing says otherwise."""


def spec_examples() -> list[TeamSpec]:
    """Small teams that differ in all that a spec can say: action kind, number of agents, equal and unequal sizes, reward."""
    unequal = TeamSpec(3, 5, Discrete(4), observation_sizes=(5, 3, 2), action_sizes=(4, 2, 3))
    bounds = (((-1.0, -2.0), (0.0, -1.0), (-1.0, 0.0)), ((1.0, 2.0), (1.0, 1.0), (1.0, 0.0)))
    return [
        TeamSpec(3, 5, Discrete(4), state=7, team_reward=True),
        TeamSpec(2, 4, Continuous(2), horizon=10),
        TeamSpec(1, 3, Discrete(2)),
        unequal,
        TeamSpec(3, 4, Continuous(2, *bounds), action_sizes=(2, 2, 1), team_reward=True),
    ]


def fake_batch(spec: TeamSpec, batch_size: Sequence[int], keys: Iterable[Key], seed: int = 0, views: int = 1) -> TensorDict:
    """Random but valid tensors under ``keys``.

    Masks allow what the agents have, actions are available and within their bounds, scales are positive, an episode is done where
    it is terminated or truncated, and all agents are alive.

    Args:
        spec: the team.
        batch_size: leading dimensions, such as ``[4]`` or ``[B, T]``.
        keys: what to fill in, for instance ``component.reads``.
        seed: of the tensors.
        views: size of V.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = TensorDict({}, batch_size=list(batch_size))
    for key in keys:
        batch.set(key, _fake(spec, tuple(batch_size), key, generator, views))
    return _with_consistent_ends(batch)


def key_shape(spec: TeamSpec, key: Key, views: int = FREE_SIZES["V"]) -> tuple[int, ...]:
    """Shape of ``key`` behind the batch dimensions, free dimensions at their smallest; ``views`` is the size of V."""
    sizes = spec.sizes() | FREE_SIZES | {"1": 1, "V": views}
    return tuple(sizes[name] for name in keys.describe(key).dimensions(discrete=spec.discrete))


def own_actions(spec: TeamSpec) -> Tensor:
    """The actions or action dimensions that each agent has: ``[N, A]`` or ``[N, D]`` bool."""
    return torch.arange(spec.action_features) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)


def leaves(batch: TensorDictBase) -> set[Key]:
    """The keys of the tensors in a batch ``[*]``."""
    return set(batch.keys(include_nested=True, leaves_only=True))


def batch_for(component: ModuleComponent, batch_size: Sequence[int], seed: int = 0, views: int = 1) -> TensorDict:
    """What a component reads, ``[*]``; an actor's carried keys as it starts them, moved at random."""
    batch = fake_batch(component.spec, batch_size, component.reads, seed, views)
    if isinstance(component, Actor):
        generator = torch.Generator().manual_seed(seed)
        for key, value in component.initial_state(max(1, batch.batch_size.numel())).items():
            moved = value + torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            batch.set(key, moved.reshape(*batch_size, *value.shape[1:]))
    return batch


def _fake(spec: TeamSpec, batch_size: tuple[int, ...], key: Key, generator: torch.Generator, views: int) -> Tensor:
    shape = (*batch_size, *key_shape(spec, key, views))
    info, name = keys.describe(key), key if isinstance(key, str) else key[-1]
    own = own_actions(spec)
    if name in ("action_mask", "action_dims"):
        return own.expand(shape).clone()
    if name == "alive":
        return torch.ones(shape, dtype=torch.bool)
    if name == "action":
        return _fake_action(spec, torch.rand(shape, generator=generator))
    if name == "logits":
        return torch.randn(shape, generator=generator).masked_fill(~own, UNAVAILABLE)
    if info.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.2
    if info.dtype == "int64":
        return torch.randint(2**40, shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    return values.abs() + 0.1 if name == "scale" else values


def _fake_action(spec: TeamSpec, uniform: Tensor) -> Tensor:
    """Actions from numbers in [0, 1): ``[*, N]``, or ``[*, N, D]`` within the bounds, or -1 and 1 where there are none."""
    if isinstance(spec.action, Discrete):
        return (uniform * torch.tensor(spec.own_action_sizes)).long()
    low, high = (torch.tensor(side) if side else end for side, end in ((spec.action.low, -1.0), (spec.action.high, 1.0)))
    return low + (high - low) * uniform


def _with_consistent_ends(batch: TensorDict) -> TensorDict:
    present = leaves(batch)
    ends = [key for key in (keys.TERMINATED, keys.TRUNCATED) if key in present]
    if keys.DONE in present and ends:
        ended = torch.stack([batch[key] for key in ends]).any(0)
        batch.set(keys.DONE, ended if len(ends) == 2 else ended | batch[keys.DONE])
    return batch
