"""Training a recipe in a new run folder, and resuming a run from its last checkpoint."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning
import torch

from marlkit.component import Actor, Environment
from marlkit.errors import LostRankError, MarlkitError, RunError
from marlkit.interrupts import Interrupts, listening
from marlkit.ranks import rank_seed
from marlkit.recipe.fit import advice
from marlkit.recipe.reading import Recipe
from marlkit.recipe.trust import require_trust
from marlkit.run.checkpoint_io import refuse_altered_checkpoint
from marlkit.run.checkpoints import LAST, Checkpoints
from marlkit.run.contents import ANIMATION, CHECKPOINTS, CURVE, EPISODES, METRICS, RECIPE, VERSIONS, run_recipe
from marlkit.run.curve import draw_curve
from marlkit.run.ddp import RanksLauncher
from marlkit.run.episodes_file import EpisodesFile
from marlkit.run.folder import new_run_folder, own_checkpoint, refuse_links, refuse_unwritable_checkpoints
from marlkit.run.lock import run_lock
from marlkit.run.process import keep_freed_memory, spared_from_collection
from marlkit.run.progress import IterationProgress
from marlkit.run.progress_state import refuse_unfit_progress
from marlkit.run.start import (
    new_loggers,
    new_trainer,
    prepare_files,
    refuse_missing_logger,
    refuse_other_ranks,
)
from marlkit.run.use import EVALUATION_SEED, FRAMES_PER_SECOND, evaluation_environment, frames_of_episode
from marlkit.run.versions import warn_of_other_process
from marlkit.run.video import write_gif
from marlkit.training.assembly import build_environment, build_learner, choose_compile, choose_device, choose_monitor
from marlkit.training.dry_run import dry_run
from marlkit.training.evaluation import play_episodes
from marlkit.training.learner import Learner
from marlkit.training.returns import return_names

COMPILE_WORDS = {"none": "operation by operation", "record": "as recorded operations", "graph": "as a CUDA graph"}
"""Descriptions of the choices of `trainer.compile` for the user."""


def train(
    recipe: Recipe,
    root: str | Path = "runs",
    *,
    progress: bool = True,
    profile: bool = False,
    callbacks: Sequence[lightning.Callback] = (),
) -> Path:
    """Train a recipe from the start.

    Args:
        recipe: what to train.
        root: the folder in which run folders are created.
        progress: whether to show a progress bar.
        profile: whether to show the time of each step, in the progress bar and as a table at the end.
        callbacks: additional callbacks for Lightning's Trainer; an iteration is one batch and one epoch, the module is a
            :class:`marlkit.training.learner.Learner`.

    Returns:
        The run folder.

    Raises:
        TrustError: the recipe names code outside of marlkit that the user has not trusted; see
            :func:`marlkit.recipe.load_recipe`.
        MarlkitError: the recipe cannot be trained; found before anything is written wherever possible.
        Interrupted: a signal has ended the training; a ``KeyboardInterrupt`` that knows the run folder.
    """
    require_trust(recipe)
    device = choose_device(recipe)
    choose_compile(recipe, device)
    refuse_missing_logger(recipe)
    trainer = new_trainer(recipe, Path(root), device, progress=progress, profile=profile, callbacks=callbacks)
    dry_run(recipe)
    # The other ranks write nothing and need no folder.
    folder = new_run_folder(recipe, Path(root)) if trainer.is_global_zero else Path(root)
    with _run_of(trainer, folder) as interrupts:
        return _fit(recipe, trainer, folder, interrupts, checkpoint=None)


def resume(
    folder: str | Path,
    *,
    progress: bool = True,
    profile: bool = False,
    callbacks: Sequence[lightning.Callback] = (),
    trust: bool = False,
) -> Path:
    """Continue a run that was stopped, exactly as if it had not been; the options are those of :func:`train`.

    A run that was stopped before its first checkpoint begins anew.

    ``trust`` as in :func:`marlkit.run.evaluate`; it also lets the run write through links that leave its folder.

    Checkpoints hold what the ``state_dict`` of each callback returns.

    Raises:
        TrustError: the recipe names code outside of marlkit that the user has not trusted.
        RunError: the folder is not a run, or its last checkpoint was lost.
        CheckpointError: the checkpoint is damaged or belongs to another recipe.
    """
    folder = Path(folder)
    recipe = run_recipe(folder, trust=trust)
    require_trust(recipe)
    if not trust:
        refuse_links(folder)
    trainer = new_trainer(recipe, folder, choose_device(recipe), progress=progress, profile=profile, callbacks=callbacks)
    with _run_of(trainer, folder) as interrupts:
        if trainer.is_global_zero:
            refuse_unwritable_checkpoints(folder)
        path = folder / CHECKPOINTS / LAST
        if not path.exists():
            _refuse_lost_checkpoint(folder)
            if trainer.is_global_zero:
                warnings.warn(f"{folder}: was stopped before its first checkpoint, and begins anew.", stacklevel=2)
            return _fit(recipe, trainer, folder, interrupts, checkpoint=None)
        checkpoint = own_checkpoint(path, recipe)
        saved = checkpoint["marlkit"]
        refuse_other_ranks(recipe, saved, folder)
        refuse_altered_checkpoint(checkpoint, path)
        refuse_unfit_progress(checkpoint, trainer, path)
        interrupts.saved = saved["iteration"]
        if saved["iteration"] < recipe.config.trainer.iterations:
            return _fit(recipe, trainer, folder, interrupts, checkpoint=path, first_iteration=saved["iteration"])
        if trainer.is_global_zero:
            _finish(recipe, folder)
        return folder


def _refuse_lost_checkpoint(folder: Path) -> None:
    """Check that a run without ``last.ckpt`` never had a checkpoint.

    Raises:
        RunError: it has another one, or has been trained to its end.
    """
    if not any((folder / CHECKPOINTS).glob("*.ckpt")) and (folder / CURVE).exists():
        raise RunError(
            f"{folder}: has {CURVE}, as a run that was trained to its end, but no checkpoints any more. To train it again in a "
            f"folder of its own: `marlkit train {folder / RECIPE}`."
        )
    left = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
    if left:
        raise RunError(
            f"{folder}: has no {CHECKPOINTS}/{LAST}, but {left[0].name}. To go on from that one, copy it to {LAST}; what came "
            f"after it is played again. To begin anew: `marlkit train {folder / RECIPE}`."
        )


@contextmanager
def _run_of(trainer: lightning.Trainer, folder: Path) -> Iterator[Interrupts]:
    """Hold the run folder against other processes and name it to the user; the first rank does so for all."""
    with run_lock(folder) if trainer.is_global_zero else nullcontext(), listening() as interrupts:
        interrupts.run = folder if trainer.is_global_zero else None
        interrupts.rank = trainer.global_rank
        yield interrupts


def _fit(
    recipe: Recipe,
    trainer: lightning.Trainer,
    folder: Path,
    interrupts: Interrupts,
    *,
    checkpoint: Path | None,
    first_iteration: int = 0,
) -> Path:
    """Train, and draw curve and animation at the end; returns the run folder, on every rank."""
    options = recipe.config.trainer
    device = trainer.strategy.root_device
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        keep_freed_memory()
    modes = choose_compile(recipe, device)
    if trainer.world_size > 1:
        modes = modes._replace(learning="none")  # exchanges between ranks cannot be replayed
    if isinstance(bar := trainer.progress_bar_callback, IterationProgress) and trainer.is_global_zero:
        playing, learning = (COMPILE_WORDS[mode] for mode in modes)
        words = f"Steps of the environment run {playing}, those of the components {learning}"
        bar.print(f"{words} (trainer.compile={options.compile} on {device.type}).")
    env = build_environment(recipe, device, rank_seed(recipe.seed, trainer.global_rank), modes.environment)
    # Only the first rank evaluates, logs and writes.
    watched = evaluation_environment(recipe, device) if trainer.is_global_zero else None
    episodes = EpisodesFile(folder / EPISODES, first_iteration)
    learner = build_learner(
        recipe,
        env,
        evaluate=_evaluation(recipe, watched, episodes),
        evaluation_interval=options.evaluation_interval,
        compile=modes.learning,
    )
    trainer.loggers = [*new_loggers(recipe, folder, first_iteration), episodes] if trainer.is_global_zero else []
    monitor = choose_monitor(recipe, env.spec)
    if trainer.is_global_zero:
        for problem in advice(recipe):
            warnings.warn(str(problem), stacklevel=3)
        if monitor is None:
            _warn_of_no_monitor(env)
    prepare_files(trainer)
    if checkpoint is not None and trainer.is_global_zero:
        warn_of_other_process(folder / VERSIONS, device)
    checkpoints = Checkpoints(folder / CHECKPOINTS, seconds=options.checkpoint_seconds, monitor=monitor, interrupts=interrupts)
    # Last, so that the state of the other callbacks is saved after they ran, and because one of them may end the training.
    trainer.callbacks.append(checkpoints)  # type: ignore[attr-defined]
    with spared_from_collection():
        _fit_until_interrupted(trainer, learner, checkpoint, interrupts)
    env.close()
    _end_if_interrupted(checkpoints, interrupts, learner.ranks.index)
    if watched is not None:
        watched.close()
        _finish(recipe, folder)
    return checkpoints.folder.parent


def _warn_of_no_monitor(env: Environment) -> None:
    groups, metric = ", ".join(env.spec.members), return_names("evaluation", env.spec)[0]
    warnings.warn(
        f"the agents are opposed to each other ({groups}), so that no return says which evaluation is the best: best.ckpt is the "
        f"latest one. To choose by a group's return set trainer.monitor={metric}",
        stacklevel=2,
    )


def _evaluation(recipe: Recipe, env: Environment | None, file: EpisodesFile) -> Callable[[Actor], dict[str, float]] | None:
    """A function that evaluates an actor on ``env`` and keeps the episodes; ``None`` without an environment."""
    if env is None:
        return None
    seed, steps = recipe.seed + EVALUATION_SEED, recipe.config.trainer.evaluation_steps

    def evaluate(actor: Actor) -> dict[str, float]:
        episodes = play_episodes(env, actor, seed=seed, steps=steps)
        file.take(episodes)
        return episodes.summary()

    return evaluate


def _fit_until_interrupted(trainer: lightning.Trainer, learner: Learner, checkpoint: Path | None, interrupts: Interrupts) -> None:
    """Fit; an interrupt raises ``KeyboardInterrupt``, where Lightning would end the process and leave Ctrl-C disabled."""
    handler = signal.getsignal(signal.SIGINT)
    launcher = trainer.strategy.launcher
    if isinstance(launcher, RanksLauncher):
        interrupts.before_exit = lambda: launcher.kill(signal.SIGKILL)
    try:
        trainer.fit(learner, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise interrupts.loss() from None
    except LostRankError as error:
        if interrupts.saved is None:
            raise
        raise LostRankError(str(error).replace("<run>", str(interrupts.run))) from error
    finally:
        interrupts.end()


def _end_if_interrupted(checkpoints: Checkpoints, interrupts: Interrupts, rank: int) -> None:
    """Raise what a signal leads to; on the other ranks, end the process in silence."""
    if checkpoints.ended_by:
        if rank > 0:
            sys.exit()
        raise interrupts.error(checkpoints.ended_by)
    interrupts.refuse_to_go_on()


def _finish(recipe: Recipe, folder: Path) -> None:
    """Draw curve and animation; the training is complete without them, so that a failure is only told."""
    with _told(folder / CURVE, f"`marlkit resume {folder}` draws it again."):
        draw_curve(folder / METRICS, folder / CURVE, f"{recipe.name}, seed {recipe.seed}")
    if recipe.config.trainer.video:
        with _told(folder / ANIMATION, f"`marlkit play {folder}` draws it again."):
            frames = frames_of_episode(folder, trust=True)
            if frames:
                write_gif(frames, folder / ANIMATION, FRAMES_PER_SECOND)


@contextmanager
def _told(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (MarlkitError, OSError) as error:
        warnings.warn(f"{path} was not drawn: {error} The training is complete and saved; {remedy}", stacklevel=2)
