"""Uses of a trained run: evaluating, drawing and loading its policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from marlkit.component import Actor, Environment
from marlkit.errors import CheckpointError, OptionError, RecipeError, RunError
from marlkit.options import problem_with
from marlkit.recipe.completing import Seed
from marlkit.recipe.located_yaml import Place
from marlkit.recipe.merging import read_overrides
from marlkit.recipe.reading import Recipe
from marlkit.recipe.trust import require_trust
from marlkit.run.checkpoint_io import of_file
from marlkit.run.contents import ANIMATION, run_recipe
from marlkit.run.files import refuse_unwritable
from marlkit.run.folder import checkpoint_path, own_checkpoint, refuse_links
from marlkit.run.policy import Policy
from marlkit.run.video import refuse_unfit_speed, write_gif
from marlkit.saved import named
from marlkit.spec import TeamSpec
from marlkit.training.assembly import build, build_environment, choose_device, refusal
from marlkit.training.evaluation import Episodes, play_episodes
from marlkit.training.memory import refuse_many_episodes
from marlkit.training.restoring import refuse_other_team, refuse_unfit_parameters, saved_team

FRAMES_PER_SECOND = 15.0
EVALUATION_SEED = 1_000_000
"""Added to a recipe's seed for evaluations, so that they differ from the episodes of training."""


def evaluate(
    folder: str | Path,
    *,
    episodes: int | None = None,
    seed: int | None = None,
    checkpoint: str = "best",
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> dict[str, float]:
    """Play a trained team with its most likely actions.

    Args:
        folder: a run.
        episodes: number of episodes; ``None``: as in evaluations during training.
        seed: of the episodes; ``None``: as in evaluations during training.
        checkpoint: ``"best"`` or ``"last"``.
        overrides: changes of the environment, such as ``"env.scenario_options.n_agents=16"``. It may have other agents than those
            that were trained, if the policy's parameters do not depend on their number.
        trust: whether the run may do what its recipe names beyond marlkit's own code (:mod:`marlkit.recipe.trust`).

    Raises:
        OptionError: there are too few or too many ``episodes``, or ``seed`` is none.
        RecipeError: the overrides are of something else than `env`, or the trained policy does not fit the environment.
    """
    played, _ = play_checkpoint(Path(folder), checkpoint=checkpoint, count=episodes, seed=seed, overrides=overrides, trust=trust)
    return played.summary()


def play(
    folder: str | Path,
    *,
    path: str | Path | None = None,
    seed: int | None = None,
    checkpoint: str = "best",
    fps: float = FRAMES_PER_SECOND,
    trust: bool = False,
) -> Path:
    """Draw one episode of a trained team as an animation, without a display; ``trust`` as in :func:`evaluate`.

    Raises:
        RunError: the environment cannot be drawn.
        OptionError: ``fps`` is no speed that an animation can have.
        WriteError: ``path`` cannot be written; found before anything is played.
    """
    folder = Path(folder)
    run_recipe(folder, trust=trust)
    if not trust and path is None:
        refuse_links(folder)
    path = folder / ANIMATION if path is None else Path(path)
    refuse_unfit_speed(fps)
    refuse_unwritable(path)
    frames = frames_of_episode(folder, seed=seed, checkpoint=checkpoint, trust=trust)
    if not frames:
        raise RunError(f"{folder}: this environment cannot be drawn.")
    write_gif(frames, path, fps)
    return path


def load_policy(folder: str | Path, checkpoint: str = "best", *, n_agents: int | None = None, trust: bool = False) -> Policy:
    """The trained policy of a run, in float32; neither the environment nor the critic is built.

    Args:
        folder: a run.
        checkpoint: ``"best"`` or ``"last"``.
        n_agents: how many agents it is to act for, if the policy's parameters do not depend on their number; ``None``: as many as
            were trained.
        trust: as in :func:`evaluate`.

    Raises:
        TrustError: the recipe names code outside of marlkit that the user has not trusted.
        RunError: the folder is not a run, or holds no such checkpoint.
        RecipeError: the policy depends on the number of agents, or these are not alike.
    """
    folder = Path(folder)
    recipe = run_recipe(folder, trust=trust)
    path = checkpoint_path(folder, checkpoint)
    saved = own_checkpoint(path, recipe)
    with of_file(path):
        team = saved_team(saved["marlkit"]["spec"])
        if n_agents in (None, team.n_agents):
            return Policy(_trained_actor(recipe, team, saved), team)
    try:
        spec = team.resized(n_agents)
    except ValueError as error:
        raise refusal(recipe, "env", f"the policy cannot act for {n_agents} agents: {error}.") from error
    return Policy(_actor_of_others(recipe, team, spec, saved), spec)


def frames_of_episode(folder: Path, *, seed: int | None = None, checkpoint: str = "best", trust: bool = False) -> list[Any]:
    """Pictures of one episode; empty where the environment draws none."""
    frames: list[Any] = []

    def watch(env: Environment) -> None:
        picture = env.draw(0)
        if picture is not None:
            frames.append(picture)

    play_checkpoint(folder, checkpoint=checkpoint, count=1, seed=seed, trust=trust, watch=watch)
    return frames


def evaluation_environment(recipe: Recipe, device: torch.device, episodes: int | None = None) -> Environment:
    """The environments of an evaluation: ``episodes`` of them, or as many as the recipe sets, with seeds of their own."""
    count = recipe.config.trainer.evaluation_episodes if episodes is None else episodes
    return build_environment(recipe, device, recipe.seed + EVALUATION_SEED, num_envs=count)


def _trained_actor(recipe: Recipe, spec: TeamSpec, saved: dict[str, Any]) -> Actor:
    actor = build(recipe, "actor", spec)
    assert isinstance(actor, Actor)
    parameters = saved["state_dict"].items()
    own = {name.removeprefix("actor."): value for name, value in parameters if str(name).startswith("actor.")}
    with named("the checkpoint's parameters do not fit the recipe's actor"):
        refuse_unfit_parameters(own, actor, "state_dict.actor")
        actor.load_state_dict(own)
    return actor.eval()


def _actor_of_others(recipe: Recipe, trained: TeamSpec, spec: TeamSpec, saved: dict[str, Any]) -> Actor:
    """The actor of a team ``spec`` with the parameters of another, ``trained`` one.

    Raises:
        RecipeError: it depends on what they differ in.
    """
    told = [f"observations of length {team.observation} and {_actions(team)}" for team in (spec, trained)]
    if told[0] != told[1]:
        message = f"its agents have {told[0]}, those that were trained {told[1]}."
        raise refusal(recipe, "env", message, "A policy acts on observations and actions of the sizes that it was trained on.")
    try:
        return _trained_actor(recipe, spec, saved)
    except (CheckpointError, RecipeError) as error:
        options = recipe.entries["actor"].options
        known = [f"actor.{name}={value}" for name, value in (("share", "all"), ("agent_id", "false")) if name in options]
        numbers = f"it was trained for {trained.n_agents} agents, here are {spec.n_agents}"
        message = f"the policy's parameters depend on the number of agents: {numbers} ({str(error).splitlines()[-1].strip()})."
        remedy = f"Train it with {' '.join(known)}." if known else "Train one whose agents share all parameters."
        raise refusal(recipe, "actor", message, remedy) from error


def _actions(team: TeamSpec) -> str:
    return f"{team.action_features} actions" if team.discrete else f"{team.action_features} dimensions of actions"


def _refuse_other_overrides(overrides: Sequence[str]) -> None:
    """Check that overrides change the environment alone.

    Raises:
        RecipeError: one of them changes something else, or is none.
    """
    problems = read_overrides(overrides)[1]
    if problems:
        raise RecipeError(problems)
    for text in overrides:
        path = text.partition("=")[0]
        if path == "env.num_envs":
            problems.append(Place(text).problem(path, "is the number of episodes here.", "Say it with --episodes."))
        elif path.partition(".")[0] != "env":
            message = "cannot be changed in a trained run; an evaluation takes changes of `env` alone."
            problems.append(Place(text).problem(path, message, "Train the recipe with it."))
    if problems:
        raise RecipeError(problems)


def play_checkpoint(
    folder: Path,
    *,
    checkpoint: str,
    count: int | None,
    seed: int | None,
    trust: bool,
    overrides: Sequence[str] = (),
    watch: Callable[[Environment], None] | None = None,
) -> tuple[Episodes, dict[str, Any]]:
    """Episodes of a trained team, and what its checkpoint says of itself (``iteration``, ``frames``).

    ``count`` and ``seed`` default to those of evaluations during training; ``overrides`` are of the environment.
    """
    _refuse_other_overrides(overrides)
    trained = run_recipe(folder, trust=trust)
    recipe = run_recipe(folder, overrides, trust=trust) if overrides else trained
    require_trust(recipe, "env", "actor")
    path = checkpoint_path(folder, checkpoint)
    saved = own_checkpoint(path, trained)
    device = choose_device(recipe)
    if seed is not None and (problem := problem_with(seed, Seed)):
        raise OptionError("seed", problem)
    with of_file(path):
        team = saved_team(saved["marlkit"]["spec"])
    refuse_many_episodes(recipe.config.trainer.evaluation_episodes if count is None else count, team)
    env = evaluation_environment(recipe, device, count)
    if overrides:
        actor = _actor_of_others(recipe, team, env.spec, saved).to(device)
    else:
        with of_file(path):
            refuse_other_team(saved["marlkit"]["spec"], env.spec)
            actor = _trained_actor(recipe, env.spec, saved).to(device)
    seed = recipe.seed + EVALUATION_SEED if seed is None else seed
    episodes = play_episodes(env, actor, seed=seed, steps=recipe.config.trainer.evaluation_steps, watch=watch)
    env.close()
    return episodes, saved["marlkit"]
