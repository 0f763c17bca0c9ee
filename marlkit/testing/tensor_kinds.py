"""Rules for the components that read and write keys: actors, opponent models, critics and estimators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict

from marlkit import keys, rng
from marlkit.component import Actor, Estimator, ModuleComponent, Opponents
from marlkit.keys import Key
from marlkit.testing.batches import batch_for, key_shape, leaves
from marlkit.testing.rules import changed, require, rule, tensors_of

TENSOR_KINDS = ("actor", "opponents", "critic", "estimator")


def usual_batch(component: ModuleComponent, seed: int = 0, views: int = 1) -> TensorDict:
    """What a component reads, ``[B, T]`` for estimators and ``[*]`` for the others, of a few steps."""
    return batch_for(component, (2, 6) if isinstance(component, Estimator) else (4,), seed, views)


def _ways(component: ModuleComponent) -> list[Callable[[TensorDict], Any]]:
    """The ways in which a component is called."""
    if isinstance(component, Opponents):
        return [component, partial(component, played=False)]
    return [component, partial(component, deterministic=True)] if isinstance(component, Actor) else [component]


@rule(*TENSOR_KINDS)
def reads_what_it_declares(component: ModuleComponent) -> None:
    """A component reads no key but those of its contract."""
    for call in _ways(component):
        try:
            call(usual_batch(component))
        except KeyError as error:
            text = " ".join(str(error).split())
            require(False, f"reads a key that its contract does not declare: {text}", "Add it to `reads`, or do without.")


@rule(*TENSOR_KINDS)
def writes_what_it_declares(component: ModuleComponent) -> None:
    """A component writes exactly the keys of its contract, of the shape and type of the key table, and finite."""
    for call in _ways(component):
        batch = usual_batch(component)
        before = batch.clone()
        gave = call(batch)
        require(gave is not None, "returns nothing from `forward`", "Return the batch.")
        written, declared = leaves(batch) - leaves(before), set(component.writes)
        problem = f"declares writes {sorted(map(keys.name, declared))}, wrote {sorted(map(keys.name, written))}"
        require(written == declared, problem, "Let contract and code agree.")
        for key in declared:
            _require_documented(component, key, batch, before)


def _require_documented(component: ModuleComponent, key: Key, batch: TensorDict, before: TensorDict) -> None:
    name, tensor = keys.name(key), batch[key]
    # All believe the same, or each for itself.
    common, own = ((*batch.batch_size, *key_shape(component.spec, key, views)) for views in (1, component.spec.n_agents))
    carried = {keys.following(key): key for key in component.carried}
    if key in carried:
        common = own = tuple(before[carried[key]].shape)
    free = {"E", "H", "M"} & set(keys.describe(key).dimensions(discrete=component.spec.discrete))
    fits = tuple(tensor.shape) in (common, own) or (free and tensor.shape[:-1] == common[:-1])
    wanted = f"{common}" if common == own else f"{common} or {own}"
    require(bool(fits), f"wrote `{name}` as {tuple(tensor.shape)}, not {wanted}", "See the shape in the key table.")
    actions = (keys.ACTION, keys.JOINT_ACTION)
    dtype = "float32" if key in actions and not component.spec.discrete else keys.describe(key).dtype
    require(str(tensor.dtype) == f"torch.{dtype}", f"wrote `{name}` as {tensor.dtype}, not {dtype}", "See the key table.")
    if tensor.is_floating_point():
        require(tensor.isfinite().all(), f"wrote `{name}` with NaN or infinity", "Look for a division or logarithm of zero.")


@rule(*TENSOR_KINDS)
def changes_nothing_that_it_reads(component: ModuleComponent) -> None:
    """What a component only reads stays what it was, bit for bit."""
    for call in _ways(component):
        batch = usual_batch(component)
        before = batch.clone()
        call(batch)
        for key in leaves(before):
            problem = f"changed `{keys.name(key)}`, which it only reads"
            require(torch.equal(batch[key], before[key]), problem, "Work on a copy: operations that end in `_` write in place.")


@rule(*TENSOR_KINDS)
def evaluates_without_learning(component: ModuleComponent) -> None:
    """Evaluating a component changes neither its parameters nor its buffers: a critic's statistics change in its update only."""
    before = tensors_of(component)
    for call in _ways(component):
        call(usual_batch(component))
    names = changed(component, before)
    require(not names, f"changes `{', '.join(names)}` when it is evaluated", "Change state where the update asks for it.")


@rule(*TENSOR_KINDS)
def gives_the_same_twice(component: ModuleComponent) -> None:
    """The same batch and the same seed give the same result."""
    for call in _ways(component):
        found = []
        for _ in range(2):
            with rng.isolated(1):
                found.append(call(usual_batch(component)))
        for key in component.writes:
            problem = f"writes another `{keys.name(key)}` when it is called again"
            require(torch.equal(found[0][key], found[1][key]), problem, "Keep no count of calls, and no generator of its own.")


@rule("critic", "estimator")
def draws_nothing(component: ModuleComponent) -> None:
    """Critics and estimators draw no random numbers; samples are a function of the seeds that the opponent model writes."""
    before = rng.state()
    component(usual_batch(component))
    drawn = rng.drawn_since(before)
    require(not drawn, f"draws random numbers of {', '.join(sorted(drawn))}", "Read `opponents.sample_seed` for samples.")


@rule("actor", "opponents", "critic", "estimator", "targets", "update", runs=False)
def can_be_copied(component: Any) -> None:
    """A deep copy has tensors of its own: target networks are copies."""
    own = {tensor.data_ptr() for tensor in (*component.parameters(), *component.buffers()) if tensor.numel()}
    twin = copy.deepcopy(component)
    common = [name for name, t in (*twin.named_parameters(), *twin.named_buffers()) if t.numel() and t.data_ptr() in own]
    require(not common, f"shares `{', '.join(common)}` with its copy", "Keep tensors as parameters and buffers of the module.")


@rule("actor", "critic")
def is_restored_by_its_state(component: Any) -> None:
    """State that changes while training is in `state_dict`: what loads it goes on as the one that saved it."""
    fresh = copy.deepcopy(component)
    if isinstance(component, Actor):
        component.schedule(0.5)
    else:
        component.normaliser.update(torch.randn(64) * 3 + 5)
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fresh.load_state_dict(component.state_dict())
    found = []
    for member in (component, fresh):
        with rng.isolated(1), torch.no_grad():
            found.append(member(usual_batch(component)))
    for key in component.writes:
        problem = f"writes another `{keys.name(key)}` after its state was loaded into a new one"
        remedy = "Keep what changes in parameters and persistent buffers, or save it in `get_extra_state`."
        require(torch.equal(found[0][key], found[1][key]), problem, remedy)
