"""From a checked recipe to the components that it names. Here, and only here, a recipe's classes are imported."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from marlkit import rng
from marlkit.component import Actor, Environment, Runtime, Trainer
from marlkit.errors import MarlkitError, OptionError, RecipeError, RuleError, did_you_mean
from marlkit.options import CompileMode
from marlkit.recipe import Recipe
from marlkit.recipe.catalogue import Entry, load_class
from marlkit.recipe.fit import check_fit
from marlkit.recipe.trust import require_trust
from marlkit.spec import ENVIRONMENT_TRAITS, TeamSpec
from marlkit.testing.environments import refuse_unfit_spec
from marlkit.training.culprit import LESS_MEMORY, is_out_of_memory
from marlkit.training.learner import Learner
from marlkit.training.precision import unfit_precision
from marlkit.training.returns import return_names

RUNS = "marlkit.run.use"
"""Where runs are opened; by name, as it lies above."""
LEARNING_SECTIONS = ("actor", "opponents", "critic", "targets", "data", "estimator", "update", "optimizer")


def build(recipe: Recipe, section: str, context: Any, **changes: Any) -> Any:
    """The component of a section, its parts included.

    Args:
        recipe: a checked recipe.
        section: which one.
        context: the first argument of its constructor: the team spec, or the runtime for an environment.
        changes: options to replace.

    Raises:
        TrustError: the recipe names code outside of marlkit that the user has not trusted.
        RecipeError: the component refused an option or its constructor failed; names file and line.
        ComponentError: its module cannot be imported.
    """
    require_trust(recipe, section)
    return _component(recipe, recipe.entries[section], section, context, recipe.arguments(section) | changes)


def _component(recipe: Recipe, entry: Entry, path: str, context: Any, options: Mapping[str, Any]) -> Any:
    arguments: dict[str, Any] = {}
    for name, value in options.items():
        part = f"{path}.{name}"
        nested = part in recipe.entries
        arguments[name] = _component(recipe, recipe.entries[part], part, context, recipe.arguments(part)) if nested else value
    try:
        built = load_class(entry, recipe.folders)(context, **arguments)
    except OptionError as error:
        raise refusal(recipe, f"{path}.{error.option}", error.message) from error
    except MarlkitError:
        raise
    except Exception as error:  # whatever a constructor does
        message = f"`{entry.class_name}` cannot be built: {type(error).__name__}: {error}"
        raise refusal(recipe, f"{path}.type", message, LESS_MEMORY if is_out_of_memory(error) else "") from error
    if isinstance(context, TeamSpec) and not isinstance(getattr(built, "spec", None), TeamSpec):
        message = f"`{entry.class_name}` does not keep the team spec that it is built for."
        raise refusal(recipe, f"{path}.type", message, "Set `self.spec = spec` in its constructor.")
    return built


def build_environment(
    recipe: Recipe, device: torch.device, seed: int, compile: CompileMode = "none", **changes: Any
) -> Environment:
    """The recipe's environment on ``device``, its random choices decided by ``seed``, its steps run as ``compile`` says."""
    entry = recipe.entries["env"]
    if "num_envs" not in entry.options:
        remedy = "Give its constructor this option: the number of environments, which an evaluation sets anew."
        raise refusal(recipe, "env.type", f"`{entry.class_name}` takes no `num_envs`.", remedy)
    env = build(recipe, "env", Runtime(device, seed, compile, partial(_trained_actor, recipe)), **changes)
    try:
        refuse_unfit_spec(env)
    except RuleError as error:
        raise refusal(recipe, "env.type", str(error)) from error
    assert isinstance(env, Environment)
    _refuse_undeclared(recipe, env)
    return env


def _trained_actor(recipe: Recipe, folder: str) -> Actor:
    """The actor of the run ``folder`` that a recipe's environment names; what that run names is trusted as the recipe is.

    Raises:
        TrustError: the run's recipe names code outside of marlkit that the user has not trusted.
        RunError: the folder is not a run, or holds no checkpoint.
    """
    load = importlib.import_module(RUNS).load_policy
    actor: Actor = load(folder, trust=recipe.trust).actor
    return actor


def _refuse_undeclared(recipe: Recipe, env: Environment) -> None:
    """Check that an environment is as its contract says and, with the traits that it turns out to have, fits the recipe.

    Raises:
        RecipeError: it lacks a trait that its contract declares, or another component does not fit it.
    """
    declared = frozenset(env.contract.resolve("traits", env.options, env.spec.traits))
    missing = sorted(declared & ENVIRONMENT_TRAITS - env.spec.traits)
    if missing:
        has = ", ".join(sorted(env.spec.traits))
        message = f"`{type(env).__name__}` declares the trait `{missing[0]}`, which its team spec lacks (it has {has})."
        raise refusal(recipe, "env.type", message, "Mend its contract or its TeamSpec.")
    problems = check_fit(replace(recipe, built=env.traits))
    if problems:
        raise RecipeError(problems)


def build_learner(recipe: Recipe, env: Environment, **extras: Any) -> Learner:
    """The learner of a recipe around ``env``, its parameters decided by the recipe's seed.

    Args:
        recipe: a checked recipe.
        env: built from the same recipe.
        extras: further arguments of :class:`marlkit.training.learner.Learner`.
    """
    rng.seed_all(recipe.seed)
    components = {section: build(recipe, section, env.spec) for section in LEARNING_SECTIONS}
    options = recipe.config.trainer
    known = {name: options[name] for name in ("iterations", "precision", "diagnostics")}
    try:
        return Learner(env=env, recipe=recipe.to_yaml(), seed=recipe.seed, **known, **components, **extras)
    except OptionError as error:  # of the targets, which see the networks only here, or of what is measured of all
        section = "trainer" if error.option in known else "targets"
        raise refusal(recipe, f"{section}.{error.option}", error.message) from error


def choose_monitor(recipe: Recipe, spec: TeamSpec) -> str | None:
    """The metric that decides which evaluation is the best; ``None`` where agents are opposed and the recipe names none.

    Raises:
        RecipeError: no evaluation of this team has the metric that the recipe names.
    """
    wanted: str | None = recipe.config.trainer.monitor
    names = return_names("evaluation", spec)
    if wanted is None:
        return None if spec.opposing else names[0]
    if wanted not in names:
        message = f"no evaluation of these agents has the metric `{wanted}`.{did_you_mean(wanted, names)}"
        raise refusal(recipe, "trainer.monitor", message, f"There are: {', '.join(names)}.")
    return wanted


def build_trainer_options(recipe: Recipe, spec: TeamSpec) -> Trainer:
    """The options of the recipe's `trainer` section."""
    trainer = build(recipe, "trainer", spec)
    assert isinstance(trainer, Trainer)
    return trainer


def choose_device(recipe: Recipe) -> torch.device:
    """The device that the recipe names.

    Raises:
        RecipeError: it is not there, or cannot multiply in the precision that the recipe names.
    """
    wanted, index = recipe.config.trainer.accelerator, recipe.config.trainer.device
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda" if cuda else "cpu"
    last = index + recipe.config.trainer.devices - 1
    if wanted == "cuda" and last >= cuda:
        _refuse_device(recipe, f"GPU {last} is not there: this machine has {cuda} CUDA devices that torch can use.")
    if wanted == "mps" and recipe.config.trainer.devices * recipe.config.trainer.nodes > 1:
        _refuse_device(recipe, "several devices cannot train together on MPS.")
    if wanted == "mps" and not torch.backends.mps.is_available():
        _refuse_device(recipe, "this machine has no MPS device that torch can use.")
    if wanted == "cpu":
        _refuse_many_ranks(recipe)
    device = torch.device(wanted, index) if wanted == "cuda" else torch.device(wanted)
    problem = unfit_precision(recipe.config.trainer.precision, device)
    if problem:
        raise refusal(recipe, "trainer.precision", problem, "Set trainer.precision=float32, or another trainer.accelerator.")
    return device


def _refuse_many_ranks(recipe: Recipe) -> None:
    ranks, cores = recipe.config.trainer.devices, os.cpu_count() or 1
    # Two can be tried anywhere.
    if ranks > max(cores, 2):
        message = f"{ranks} processes are more than the {cores} cores of this machine."
        raise refusal(recipe, "trainer.devices", message, f"Set trainer.devices={cores} or less, and more trainer.nodes.")


class CompileModes(NamedTuple):
    """How steps run: of the environment, and of gradient descent."""

    environment: CompileMode
    learning: CompileMode


def choose_compile(recipe: Recipe, device: torch.device) -> CompileModes:
    """How steps run on ``device``, ``auto`` decided by what was measured faster there (`docs/design.md`).

    Raises:
        RecipeError: the recipe names a CUDA graph on another device.
    """
    wanted = recipe.config.trainer.compile
    if wanted == "graph" and device.type != "cuda":
        message = f"a CUDA graph cannot run on the device `{device.type}`."
        raise refusal(recipe, "trainer.compile", message, "Set trainer.compile=record, or auto to let the device decide.")
    if wanted == "auto":
        return CompileModes("none", "record" if device.type == "cpu" else "none")
    return CompileModes(wanted, wanted)


def _refuse_device(recipe: Recipe, message: str) -> None:
    remedy = "Set trainer.accelerator=cpu, or install a torch build for the device."
    raise refusal(recipe, "trainer.accelerator", message, remedy)


def refusal(recipe: Recipe, where: str, message: str, remedy: str = "") -> RecipeError:
    """The error that says what is wrong with the value at ``where``, with the file and line that set it."""
    return RecipeError([recipe.place(where).problem(where, recipe.without_values(message), remedy)])


def sizes(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the named dimensions of a recipe, and the number of parameters of each section."""
    device = torch.device("cpu")
    env = build_environment(recipe, device, recipe.seed, num_envs=2)
    learner = build_learner(recipe, env)
    sections = ("actor", "opponents", "critic", "update")
    counts = {name: sum(p.numel() for p in getattr(learner, name).parameters()) for name in sections}
    return env.spec.sizes(), {name: count for name, count in counts.items() if count}
