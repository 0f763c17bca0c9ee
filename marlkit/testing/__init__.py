"""Testing one component alone: batches without an environment, and the tests that every component passes.

A user's own component is held to the same contract as marlkit's::

    from marlkit.testing import check_component, spec_examples

    @pytest.mark.parametrize("spec", spec_examples())
    def test_contract(spec):
        check_component(MyCritic(spec, hidden=[8]))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor, Component, Critic, Estimator, Opponents, least
from marlkit.keys import Key
from marlkit.nn.distributions import UNAVAILABLE
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing.environments import check_environment as check_environment

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


def fake_batch(spec: TeamSpec, batch_size: Sequence[int], keys: Iterable[Key], seed: int = 0) -> TensorDict:
    """Random but valid tensors under ``keys``: masks allow what the agents have, actions are available, scales are positive.

    Args:
        spec: the team.
        batch_size: leading dimensions, such as ``[4]`` or ``[B, T]``.
        keys: what to fill in, for instance ``component.reads``.
        seed: of the tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = TensorDict({}, batch_size=list(batch_size))
    for key in keys:
        batch.set(key, _fake(spec, tuple(batch_size), key, generator))
    return batch


def key_shape(spec: TeamSpec, key: Key, views: int = FREE_SIZES["V"]) -> tuple[int, ...]:
    """Shape of ``key`` behind the batch dimensions, free dimensions at their smallest; ``views`` is the size of V."""
    sizes = spec.sizes() | FREE_SIZES | {"1": 1, "V": views}
    return tuple(sizes[name] for name in keys.describe(key).dimensions(discrete=spec.discrete))


def _fake(spec: TeamSpec, batch_size: tuple[int, ...], key: Key, generator: torch.Generator) -> Tensor:
    shape = (*batch_size, *key_shape(spec, key))
    info, name = keys.describe(key), key if isinstance(key, str) else key[-1]
    own = torch.arange(spec.action_features) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)
    if name in ("action_mask", "action_dims"):
        return own.expand(shape).clone()
    if name == "alive":
        return torch.ones(shape, dtype=torch.bool)
    if name == "action":
        uniform = torch.rand(shape, generator=generator)
        return (uniform * torch.tensor(spec.own_action_sizes)).long() if spec.discrete else 2 * uniform - 1
    if name == "logits":
        return torch.randn(shape, generator=generator).masked_fill(~own, UNAVAILABLE)
    if info.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.2
    if info.dtype == "int64":
        return torch.randint(2**40, shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    return values.abs() + 0.1 if name == "scale" else values


def check_component(component: Component) -> None:
    """Hold a component to its contract.

    It is given exactly the keys that it declares to read, must write exactly the keys that it declares to write, of the shape and
    type of the key table, and finite; it must not change what it reads; a critic's value must not see the agent's own action.

    Raises:
        AssertionError: it breaks its contract; says how.
    """
    if not isinstance(component, (Actor, Critic, Estimator, Opponents)):
        return
    batch_size = (2, 6) if isinstance(component, Estimator) else (4,)
    batch = fake_batch(component.spec, batch_size, component.reads)
    if isinstance(component, Actor):
        for key, value in component.initial_state(4).items():
            batch.set(key, value)
    before = batch.clone()
    component(batch)
    _check_writes(component, batch, before)
    if isinstance(component, Opponents):
        imagined = before.clone()
        component(imagined, played=False)
        _check_writes(component, imagined, before)
    if isinstance(component, Critic):
        _check_predictions(component, before)
        _check_own_action(component, before)


def _check_writes(component: Component, batch: TensorDict, before: TensorDict) -> None:
    who = type(component).__name__
    had = _leaves(before)
    for key in had:
        assert torch.equal(batch[key], before[key]), f"{who} changed `{keys.name(key)}`, which it only reads"
    wrote = _leaves(batch) - had
    declared = set(component.writes)
    assert wrote == declared, f"{who} declares writes {sorted(map(keys.name, declared))}, wrote {sorted(map(keys.name, wrote))}"
    carried = {keys.following(key): key for key in component.carried}
    for key in declared:
        # All believe the same, or each for itself.
        common, own = ((*batch.batch_size, *key_shape(component.spec, key, views)) for views in (1, component.spec.n_agents))
        if key in carried:
            common = own = tuple(before[carried[key]].shape)
        shape = tuple(batch[key].shape)
        wanted = f"{common}" if common == own else f"{common} or {own}"
        assert shape in (common, own), f"{who} wrote `{keys.name(key)}` as {shape}, not {wanted}"
        actions = (keys.ACTION, keys.JOINT_ACTION)
        dtype = "float32" if key in actions and not component.spec.discrete else keys.describe(key).dtype
        assert str(batch[key].dtype) == f"torch.{dtype}", f"{who} wrote `{keys.name(key)}` as {batch[key].dtype}, not {dtype}"
        if batch[key].is_floating_point():
            assert torch.isfinite(batch[key]).all(), f"{who} wrote `{keys.name(key)}` with NaN or infinity"


def _check_predictions(critic: Critic, before: TensorDict) -> None:
    """Hold what updates regress to what the critic writes: the least of the K predictions, in real units."""
    who, batch, written = type(critic).__name__, before.clone(), critic(before.clone())
    assert critic.contract.predicts is not None, f"{who} declares no `predicts`"
    wanted = {"predictions": (critic.predictions, critic.contract.predicts)}
    if "action_values" in critic.traits:
        wanted["action_values"] = (critic.action_values, keys.ACTION_VALUES)
    for name, (function, key) in wanted.items():
        values = function(batch)
        shape = written[key].shape
        assert values.shape[1:] == shape, f"{who}.{name} has the shape {list(values.shape)}, not K x {list(shape)}"
        real = critic.normaliser.denormalise(least(values))
        assert torch.allclose(real, written[key], rtol=1e-5, atol=1e-6), (
            f"{who} writes a `{keys.name(key)}` that is not its {name}"
        )


def _check_own_action(critic: Critic, before: TensorDict) -> None:
    """Change agent 0's action and belief of itself; its own baseline must stay what it was."""
    own = {keys.ACTION: 0, keys.JOINT_ACTION: 1, keys.OPPONENT_LOGITS: 1, keys.OPPONENT_LOC: 1}
    changed = before.clone()
    for key, offset in own.items():
        if key in _leaves(before):
            agent = changed[key].select(1 + offset, 0)
            agent.copy_((agent + 1) % critic.spec.own_action_sizes[0] if agent.dtype == torch.int64 else agent.flip(-1))
    for key in {keys.STATE_VALUE, keys.ACTION_VALUES} & set(critic.writes):
        first, second = (critic(batch)[key][:, 0] for batch in (before.clone(), changed))
        # Not bit for bit: a critic may evaluate the agents in one product, whose rounding depends on its size.
        assert torch.allclose(first, second, rtol=1e-5, atol=1e-6), (
            f"{type(critic).__name__}: agent 0's {keys.name(key)} depends on its own action"
        )


def _leaves(batch: TensorDict) -> set[Key]:
    found: Collection[Key] = batch.keys(include_nested=True, leaves_only=True)
    return set(found)
