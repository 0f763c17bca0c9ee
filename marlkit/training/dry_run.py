"""A recipe tried out on two environments for a few steps, before a training that may take hours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marlkit import keys, rng
from marlkit.component import Component, Data, Environment, who_is
from marlkit.errors import MarlkitError, OptionError
from marlkit.learning import Adjust, Learning, Metrics, run_directly
from marlkit.recipe import Recipe
from marlkit.recipe.trust import require_trust
from marlkit.testing.environments import WatchedEnvironment, random_action
from marlkit.testing.every_kind import loose_tensors
from marlkit.training.assembly import build, build_environment, build_learner, choose_monitor, refusal
from marlkit.training.culprit import culprit, failure
from marlkit.training.inspection import inspect_played
from marlkit.training.learner import Learner
from marlkit.training.memory import refuse_large_networks, refuse_unfit_memory

STEPS = 3
"""Steps of the rollout."""

FURTHER_STEPS = 16
"""Steps within which the end of an episode is looked for."""

MOST_GRADIENTS = 100
"""Gradients that an update is asked for."""


def dry_run(recipe: Recipe) -> None:
    """Build the recipe small, collect, annotate, estimate and update once, and hold every written tensor to the key table.

    Leaves the random generators as they were.

    Raises:
        MarlkitError: a component failed or wrote something else than it declares; names the component.
    """
    require_trust(recipe)
    with rng.isolated(recipe.seed):
        env = build_environment(recipe, torch.device("cpu"), recipe.seed, num_envs=2)
        choose_monitor(recipe, env.spec)
        refuse_large_networks(recipe, env.spec)
        learner = build_learner(recipe, env)
        full, learner.data = learner.data, _short_data(recipe, learner)
        watched = cast(Environment, WatchedEnvironment(env, who_is(learner.actor)))
        with _named("data", learner, recipe):
            played = learner.data.collect(watched, learner.actor, run_directly)
            batch = next(learner.data.batches(played, learner.actor))
        for section in ("env", "actor"):
            _check_shapes(played, section, learner)
        inspect_played(played, env, learner.actor, 0)
        with _named("actor", learner, recipe):
            _check_deterministic(played, learner)
        refuse_unfit_memory(recipe, full, played)
        _learn(batch, played, learner, recipe)
        with _named("env", learner, recipe):
            _play_to_an_end(watched)
        env.close()


def _learn(batch: TensorDictBase, played: TensorDictBase, learner: Learner, recipe: Recipe) -> None:
    with _named("estimator", learner, recipe):
        learner.estimator.observe(played)
    for section, step in (("critic", learner.annotate), ("estimator", learner.estimator)):
        before = _read_by(section, batch, learner)
        with _named(section, learner, recipe):
            step(batch)
        _check_shapes(batch, section, learner)
        _check_unchanged(before, batch, section, learner)
    steps = _FewSteps(_who("update", learner))
    learning = Learning(learner.actor, learner.critic, learner.opponents, steps, progress=0.0)
    trained = _trained(learner)
    if learner.diagnostics is not None:
        with _named("critic", learner, recipe):
            learner.diagnostics.before(batch, learning, learner.estimator, learner.update, 0)
    with _named("update", learner, recipe), suppress(_EnoughError):
        _check_metrics(learner.update.update(batch, learning), _who("update", learner))
    if learner.diagnostics is not None:
        with _named("actor", learner, recipe):
            learner.diagnostics.after(batch, learner.actor)
    if learner.annotator.opponents_are_read:
        with _named("opponents", learner, recipe), suppress(_EnoughError):
            learner.opponents.observe(played)
            learner.opponents.fit(batch, replace(learning, minimise=_FewSteps(_who("opponents", learner))))
    _check_training(learner, trained, stepped=steps.left < MOST_GRADIENTS)


def _play_to_an_end(env: Environment) -> None:
    """Random steps until an episode has ended and the next has begun, where that need not take long."""
    if env.spec.horizon is not None and env.spec.horizon > FURTHER_STEPS:
        return
    current, generator = env.reset(), torch.Generator().manual_seed(0)
    for _ in range(FURTHER_STEPS):
        arrived, current = env.step(random_action(env.spec, current, generator))
        if arrived[keys.DONE[1]].any():
            env.step(random_action(env.spec, current, generator))
            return


def _short_data(recipe: Recipe, learner: Learner) -> Data:
    """The recipe's data, of as few steps as its actor is trained on."""
    length = learner.actor.sequence_length
    try:
        learner.data.refuse_unfit(recipe.config.env.num_envs, recipe.config.trainer.iterations, length)
    except OptionError as error:
        section = "data" if error.option in recipe.entries["data"].options else "actor"
        raise refusal(recipe, f"{section}.{error.option}", error.message) from error
    short = build(recipe, "data", learner.env.spec, **learner.data.brief(length or STEPS))
    assert isinstance(short, Data)
    for name in ("history", "shown", "inspect"):
        setattr(short, name, getattr(learner.data, name))
    return short


class _EnoughError(Exception):
    """An update has shown what it does."""


class _FewSteps:
    """Computes gradients and takes no step; ends an update that asks for many.

    Args:
        who: asks for them.
    """

    def __init__(self, who: str) -> None:
        self.who = who
        self.left = MOST_GRADIENTS

    def __call__(self, loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        """See :class:`marlkit.learning.Minimise`."""
        if not self.left:
            raise _EnoughError
        self.left -= 1
        if not loss.detach().isfinite().all():
            raise MarlkitError(
                f"dry run: {self.who} hands a loss of {loss.detach().flatten()[0]:g} to `learning.minimise`. Usual causes: a "
                "division by zero, a logarithm or a root of 0, a mean of no rows."
            )
        loss.backward()
        if adjust is not None:
            adjust()
        return {}


def _who(section: str, learner: Learner) -> str:
    return who_is(getattr(learner, section))


@contextmanager
def _named(section: str, learner: Learner, recipe: Recipe) -> Iterator[None]:
    """Name the component in any error that it did not foresee, and the place of an option of its own that it refuses.

    It is the one in whose code the error was raised; ``section`` where none was.
    """
    try:
        yield
    except OptionError as error:
        if error.option not in recipe.entries[section].options:
            raise
        raise refusal(recipe, f"{section}.{error.option}", error.message) from error
    except MarlkitError:
        raise
    except Exception as error:
        who = who_is(culprit(error) or getattr(learner, section))
        raise MarlkitError(f"dry run: {failure(error, who)}") from error


def _trained(learner: Learner) -> dict[str, list[Tensor]]:
    """Copies of the parameters that an update must change."""
    return {name: [x.detach().clone() for x in getattr(learner, name).parameters()] for name in ("actor", "critic")}


def _check_training(learner: Learner, before: dict[str, list[Tensor]], *, stepped: bool) -> None:
    """Make sure that the update reaches actor and critic: with a gradient, or by changing them itself.

    Raises:
        MarlkitError: a component has parameters and none of them would ever be trained.
    """
    for section, copies in before.items():
        parameters = list(getattr(learner, section).parameters())
        changed = any(not torch.equal(now, then) for now, then in zip(parameters, copies, strict=True))
        _refuse_loose(getattr(learner, section))
        if not parameters or changed:
            continue
        if all(parameter.grad is None for parameter in parameters):
            raise MarlkitError(
                f"dry run: no gradient reaches {_who(section, learner)}, so it would never be trained: is its output detached, "
                "or computed without its parameters?"
            )
        if not stepped:
            raise MarlkitError(
                f"dry run: {_who('update', learner)} computes gradients of {_who(section, learner)} and takes no step: hand the "
                "loss to `learning.minimise`, which does both"
            )


def _refuse_loose(component: nn.Module) -> None:
    """Make sure that what a component would learn is among its parameters.

    Raises:
        MarlkitError: it holds tensors with gradient that no optimiser sees and no checkpoint holds.
    """
    for name, tensor, remedy in loose_tensors(component):
        if tensor.requires_grad and tensor.is_leaf:
            raise MarlkitError(
                f"dry run: {who_is(cast(Component, component))} keeps the tensor `{name}`, which has a gradient, as an attribute "
                f"so that it would be neither trained nor saved: {remedy}"
            )


def _check_metrics(metrics: object, who: str) -> None:
    """Hold what an update returns to what the learner logs.

    Raises:
        MarlkitError: it is no dictionary of tensors without dimensions.
    """
    if not isinstance(metrics, dict):
        raise MarlkitError(f"dry run: {who} returns {type(metrics).__name__} from `update`: return a dictionary of metrics")
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.ndim:
            is_a = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise MarlkitError(f"dry run: {who} returns {is_a} as metric `{name}`: return a detached tensor without dimensions")
        if value.requires_grad:
            raise MarlkitError(
                f"dry run: {who} returns metric `{name}` with its gradient, which holds memory: return it detached"
            )


def _check_deterministic(played: TensorDictBase, learner: Learner) -> None:
    """Make sure that the most likely actions are no draws, where the actor draws at all when it is asked for them.

    Raises:
        MarlkitError: asked twice, it acts otherwise.
    """
    actor, first = learner.actor, played[:, 0]
    seen = first.exclude("next", *(key for key in actor.writes if key in first.keys(True, True)))
    before = rng.state()
    with torch.no_grad():
        action = actor(seen.clone(), deterministic=True)[keys.ACTION]
        if not rng.drawn_since(before) or torch.equal(action, actor(seen.clone(), deterministic=True)[keys.ACTION]):
            return
    raise MarlkitError(
        f"dry run: {_who('actor', learner)} draws its actions although `deterministic` asks for the most likely ones, so that "
        "evaluations would differ: take the `mode()` of its distribution then"
    )


def _read_by(section: str, batch: TensorDictBase, learner: Learner) -> dict[keys.Key, Tensor]:
    """Copies of what a component reads and does not write."""
    component = getattr(learner, section)
    read = [key for key in component.reads if key in batch.keys(True, True) and key not in component.writes]
    return {key: batch[key].clone() for key in read}


def _check_unchanged(before: dict[keys.Key, Tensor], batch: TensorDictBase, section: str, learner: Learner) -> None:
    """Make sure that a component leaves what it only reads as it was.

    Raises:
        MarlkitError: it wrote to a tensor in place.
    """
    for key, tensor in before.items():
        if ((tensor != batch[key]) & (tensor == tensor)).any():  # NaN is equal to nothing
            raise MarlkitError(
                f"dry run: {_who(section, learner)} changed `{keys.name(key)}`, which it only reads: work on a copy; operations "
                "that end in `_` write in place"
            )


def _check_shapes(batch: TensorDictBase, section: str, learner: Learner) -> None:
    """Hold the tensors that a component writes to the key table.

    Raises:
        MarlkitError: one is missing, or of another shape or type than the table says.
    """
    spec, who = learner.env.spec, _who(section, learner)
    for written in getattr(learner, section).writes:
        # Off policy a value is that of the next state alone, unless a component reads the other.
        key = written if section != "critic" or learner.annotator.value_is_read else keys.following(written)
        tensor = batch.get(key, None)
        if tensor is None:
            raise MarlkitError(f"dry run: {who} declares that it writes `{keys.name(key)}`, but did not")
        info = keys.describe(key)
        dimensions = info.dimensions(discrete=spec.discrete)
        sizes = spec.sizes()
        wanted = [1 if d == "1" else sizes.get(d) for d in dimensions]
        shape = list(tensor.shape[batch.batch_dims :])
        fits = len(shape) == len(wanted) and all(w is None or w == s for w, s in zip(wanted, shape, strict=True))
        dtype = str(tensor.dtype).removeprefix("torch.")
        says = "float32" if key in (keys.ACTION, keys.JOINT_ACTION) and not spec.discrete else info.dtype
        if not fits or dtype != says:
            named = " ".join(dimensions)
            raise MarlkitError(
                f"dry run: {who} wrote `{keys.name(key)}` as {dtype} {shape} behind the batch; the key table says "
                f"{says} [{named}] = {wanted}"
            )
