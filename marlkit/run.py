"""A run: one training of one recipe, in a folder of its own.

``runs/<recipe>/<time>-seed<k>/`` holds ``recipe.yaml`` (completed), ``versions.json``, ``metrics.csv``, ``tensorboard/``,
``checkpoints/last.ckpt`` and ``best.ckpt``, and at the end ``curve.png`` and ``team.gif``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import signal
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig, OmegaConf

from marlkit.building import build, build_environment, build_learner, choose_compile, choose_device, refusal
from marlkit.checkpoints import BEST, LAST, Checkpoints
from marlkit.component import Actor, Environment
from marlkit.dry_run import dry_run
from marlkit.errors import CheckpointError, RunError
from marlkit.evaluation import Episodes, play_episodes
from marlkit.learner import Learner
from marlkit.memory import keep_freed_memory, spared_from_collection
from marlkit.outputs.checkpoint_io import AtomicCheckpointIO, load_checkpoint
from marlkit.outputs.curve import draw_curve
from marlkit.outputs.metrics_file import MetricsFile
from marlkit.outputs.progress import IterationProgress
from marlkit.outputs.step_times import StepTimes
from marlkit.outputs.versions import versions
from marlkit.outputs.video import write_gif
from marlkit.policy import Policy
from marlkit.ranks import rank_seed
from marlkit.recipe import Recipe, load_recipe
from marlkit.spec import TeamSpec
from marlkit.strategy import RanksStrategy

RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
ANIMATION = "team.gif"
FRAMES_PER_SECOND = 15.0
VERSIONS = "versions.json"
COMPONENT_FOLDERS = "component_folders"
CHECKPOINTS = "checkpoints"
REQUIRED = ("state_dict", "marlkit")
EVALUATION_SEED = 1_000_000
"""Added to a recipe's seed for evaluations, so that they never replay the episodes of training."""

LOGGERS = {
    "wandb": ("WandbLogger", "wandb", "wandb"),
    "mlflow": ("MLFlowLogger", "mlflow", "mlflow"),
    "comet": ("CometLogger", "comet_ml", "comet-ml"),
    "neptune": ("NeptuneLogger", "neptune", "neptune"),
}
"""Lightning's class, the module that it needs, and the package that holds the module."""

WAYS = {"none": "operation by operation", "record": "as recorded operations", "graph": "as a CUDA graph"}
"""What the choices of `trainer.compile` do, for the user."""


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
        root: where run folders go.
        progress: whether to show a progress bar.
        profile: whether to show where the time goes, in the progress bar and as a table at the end.
        callbacks: of your own, for Lightning's Trainer; an iteration is one batch and one epoch, the module a
            :class:`marlkit.learner.Learner`.

    Returns:
        The run folder.

    Raises:
        MarlkitError: the recipe cannot be trained; found before anything is written wherever possible.
    """
    choose_compile(recipe, choose_device(recipe))
    _refuse_missing_logger(recipe)
    trainer = _trainer(recipe, Path(root), progress=progress, profile=profile, callbacks=callbacks)
    dry_run(recipe)
    # The other ranks write nothing and need no folder.
    folder = _begun(recipe, Path(root)) if trainer.is_global_zero else Path(root)
    return _fit(recipe, trainer, folder, checkpoint=None)


def resume(
    folder: str | Path, *, progress: bool = True, profile: bool = False, callbacks: Sequence[lightning.Callback] = ()
) -> Path:
    """Go on with a run that was stopped, exactly as if it had not been; the options are those of :func:`train`.

    What your own callbacks remember is theirs to save: checkpoints hold what their ``state_dict`` gives.

    Raises:
        RunError: the folder is not a run, or has no checkpoint yet.
        CheckpointError: the checkpoint is damaged or belongs to another recipe.
    """
    folder = Path(folder)
    recipe = run_recipe(folder)
    path = folder / CHECKPOINTS / LAST
    if not path.exists():
        raise RunError(
            f"{folder}: has no checkpoint yet ({CHECKPOINTS}/{LAST}); train it again with `marlkit train {folder / RECIPE}`."
        )
    saved = _own_checkpoint(path, recipe)["marlkit"]
    _refuse_other_ranks(recipe, saved, folder)
    trainer = _trainer(recipe, folder, progress=progress, profile=profile, callbacks=callbacks)
    if saved["iteration"] < recipe.config.trainer.iterations:
        return _fit(recipe, trainer, folder, checkpoint=path, first_iteration=saved["iteration"])
    if trainer.is_global_zero:
        _finish(recipe, folder)
    return folder


def evaluate(
    folder: str | Path, *, episodes: int | None = None, seed: int | None = None, checkpoint: str = "best"
) -> dict[str, float]:
    """Play a trained team with its most likely actions.

    Args:
        folder: a run.
        episodes: how many; ``None``: as many as an evaluation during training.
        seed: of the episodes; ``None``: as in training.
        checkpoint: ``"best"`` or ``"last"``.
    """
    return _episodes(Path(folder), checkpoint=checkpoint, count=episodes, seed=seed).summary()


def play(
    folder: str | Path,
    *,
    path: str | Path | None = None,
    seed: int | None = None,
    checkpoint: str = "best",
    fps: float = FRAMES_PER_SECOND,
) -> Path:
    """Draw one episode of a trained team as an animation, without a display.

    Raises:
        RunError: the environment cannot be drawn.
    """
    folder = Path(folder)
    frames = _frames(folder, seed=seed, checkpoint=checkpoint)
    if not frames:
        raise RunError(f"{folder}: this environment has no picture to draw.")
    path = folder / ANIMATION if path is None else Path(path)
    write_gif(frames, path, fps)
    return path


def load_policy(folder: str | Path, checkpoint: str = "best") -> Policy:
    """The trained policy of a run; needs neither its environment nor its critic, and acts in float32.

    Raises:
        RunError: the folder is not a run, or holds no such checkpoint.
    """
    folder = Path(folder)
    recipe = run_recipe(folder)
    saved = _own_checkpoint(_checkpoint_path(folder, checkpoint), recipe)
    spec = TeamSpec.from_dict(saved["marlkit"]["spec"])
    return Policy(_trained_actor(recipe, spec, saved), spec)


def run_recipe(folder: Path) -> Recipe:
    """The completed recipe of a run.

    Raises:
        RunError: the folder is not a run.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise RunError(f"{folder}: is not a run; it holds no {RECIPE}. Runs stand under runs/<recipe>/<time>-seed<k>/.")
    return load_recipe(path, folders=_component_folders(folder))


def _component_folders(folder: Path) -> list[Path]:
    """Where the run found components named by dotted paths; nowhere if its note of it is gone."""
    try:
        noted = json.loads((folder / VERSIONS).read_text(encoding="utf-8"))[COMPONENT_FOLDERS]
    except (OSError, ValueError, KeyError):
        return []
    return [Path(path) for path in noted if Path(path).is_dir()]


def sizes(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the named dimensions of a recipe, and the number of parameters of each section."""
    device = torch.device("cpu")
    env = build_environment(recipe, device, recipe.seed, num_envs=2)
    learner = build_learner(recipe, env)
    sections = ("actor", "opponents", "critic", "update")
    counts = {name: sum(p.numel() for p in getattr(learner, name).parameters()) for name in sections}
    return env.spec.sizes(), {name: count for name, count in counts.items() if count}


# --- what these are made of ---------------------------------------------------------------------------------------------------


def _begun(recipe: Recipe, root: Path) -> Path:
    """A new run folder with the recipe and the versions that it is trained with."""
    folder = _new_folder(root / recipe.name, recipe.seed)
    (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    made_with = versions() | {COMPONENT_FOLDERS: [str(path) for path in recipe.folders]}
    (folder / VERSIONS).write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")
    return folder


def _new_folder(parent: Path, seed: int) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = parent / f"{stamp}-seed{seed}{'' if attempt == 1 else f'-{attempt}'}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"{folder}: cannot be made ({error}).") from error
        (folder / CHECKPOINTS).mkdir()
        return folder
    raise RunError(f"{parent}: a thousand runs started within this second")


def _trainer(
    recipe: Recipe, folder: Path, *, progress: bool, profile: bool, callbacks: Sequence[lightning.Callback]
) -> lightning.Trainer:
    """A Lightning Trainer, which knows its rank among the processes that train together; it writes nothing yet."""
    device, options = choose_device(recipe), recipe.config.trainer
    several = options.devices * options.nodes > 1
    _refuse_unfit_launch(recipe)
    # Lightning 2.6 calls a function of torch that torch has since deprecated; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hints are about other ways of using it
    plugins: list[Any] = [AtomicCheckpointIO(REQUIRED)]
    if several and SLURMEnvironment.detect():
        # Lightning would submit the job again with the same command, which begins another run.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = lightning.Trainer(
        accelerator=device.type if device.type != "cuda" else "gpu",
        devices=[options.device + i for i in range(options.devices)] if device.type == "cuda" else options.devices,
        num_nodes=options.nodes,
        strategy=RanksStrategy() if several else "auto",
        max_epochs=options.iterations,
        logger=False,
        callbacks=[*([IterationProgress(profile=profile)] if progress else []), *callbacks],
        plugins=plugins,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    if profile and trainer.is_global_zero:
        trainer.callbacks.append(StepTimes())  # type: ignore[attr-defined]
    return trainer


def _refuse_unfit_launch(recipe: Recipe) -> None:
    options = recipe.config.trainer
    wanted = options.devices * options.nodes
    if TorchElasticEnvironment.detect():
        started = TorchElasticEnvironment().world_size()
        if started != wanted:
            message = f"torchrun has started {started} processes, but trainer.devices x trainer.nodes is {wanted}."
            raise refusal(recipe, "trainer.devices", message, "Set both as torchrun's --nproc-per-node and --nnodes.")


def _refuse_other_ranks(recipe: Recipe, saved: dict[str, Any], folder: Path) -> None:
    options = recipe.config.trainer
    trained, wanted = saved["ranks"]["size"] if "ranks" in saved else 1, options.devices * options.nodes
    if trained != wanted:
        raise CheckpointError(
            f"{folder}: was trained by {trained} ranks (trainer.devices x trainer.nodes), its {RECIPE} now asks for {wanted}. "
            f"Every rank has environments and data of its own, so that only as many can go on. Restore the {RECIPE}, or train it "
            "anew."
        )


def _fit(recipe: Recipe, trainer: lightning.Trainer, folder: Path, *, checkpoint: Path | None, first_iteration: int = 0) -> Path:
    """Train, and draw what is left at the end; returns the run folder, on every rank."""
    options = recipe.config.trainer
    device = choose_device(recipe) if trainer.world_size == 1 else trainer.strategy.root_device
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        keep_freed_memory()
    ways = choose_compile(recipe, device)
    if trainer.world_size > 1:
        ways = ways._replace(learning="none")  # what ranks tell one another cannot be replayed
    if isinstance(bar := trainer.progress_bar_callback, IterationProgress) and trainer.is_global_zero:
        words = f"Steps of the environment run {WAYS[ways.environment]}, those of the components {WAYS[ways.learning]}"
        bar.print(f"{words} (trainer.compile={options.compile} on {device.type}).")
    env = build_environment(recipe, device, rank_seed(recipe.seed, trainer.global_rank), ways.environment)
    # Only the first rank evaluates, logs and writes.
    watched = _evaluation_environment(recipe, device) if trainer.is_global_zero else None
    learner = build_learner(
        recipe,
        env,
        evaluate=_evaluation(recipe, watched),
        evaluation_interval=options.evaluation_interval,
        compile=ways.learning,
    )
    trainer.loggers = _loggers(recipe, folder, first_iteration) if trainer.is_global_zero else []
    checkpoints = Checkpoints(folder / CHECKPOINTS, seconds=options.checkpoint_seconds)
    # After all others: what they remember is saved as they left it, and one of them may have ended the training.
    trainer.callbacks.append(checkpoints)  # type: ignore[attr-defined]
    with spared_from_collection():
        _fit_until_interrupted(trainer, learner, checkpoint)
    env.close()
    folder = Path(learner.ranks.from_first(str(folder)))
    if watched is not None:
        watched.close()
        _finish(recipe, folder)
    return folder


def _evaluation(recipe: Recipe, env: Environment | None) -> Callable[[Actor], dict[str, float]] | None:
    """What plays the episodes of an evaluation on ``env``."""
    if env is None:
        return None
    seed, steps = recipe.seed + EVALUATION_SEED, recipe.config.trainer.evaluation_steps
    return lambda actor: play_episodes(env, actor, seed=seed, steps=steps).summary()


def _fit_until_interrupted(trainer: lightning.Trainer, learner: Learner, checkpoint: Path | None) -> None:
    """Fit; an interrupt stays an interrupt, where Lightning would end the process and leave Ctrl-C switched off.

    Where this process has started other ranks, none of them outlives a failure of it.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(learner, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
    except BaseException:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)
        raise


def _finish(recipe: Recipe, folder: Path) -> None:
    draw_curve(folder / METRICS, folder / "curve.png", f"{recipe.name}, seed {recipe.seed}")
    frames = _frames(folder) if recipe.config.trainer.video else []
    if frames:
        write_gif(frames, folder / ANIMATION, FRAMES_PER_SECOND)


def _frames(folder: Path, *, seed: int | None = None, checkpoint: str = "best") -> list[Any]:
    """Pictures of one episode; none where the environment draws none."""
    frames: list[Any] = []

    def watch(env: Environment) -> None:
        picture = env.draw(0)
        if picture is not None:
            frames.append(picture)

    _episodes(folder, checkpoint=checkpoint, count=1, seed=seed, watch=watch)
    return frames


def _evaluation_environment(recipe: Recipe, device: torch.device, episodes: int | None = None) -> Environment:
    count = recipe.config.trainer.evaluation_episodes if episodes is None else episodes
    return build_environment(recipe, device, recipe.seed + EVALUATION_SEED, num_envs=count)


def _loggers(recipe: Recipe, folder: Path, first_iteration: int) -> list[Logger]:
    loggers: list[Logger] = [
        MetricsFile(folder / METRICS, first_iteration),
        TensorBoardLogger(folder, name="tensorboard", version=""),
    ]
    chosen = recipe.config.trainer.logger
    if chosen is not None:
        loggers.append(_chosen_logger(recipe, chosen))
    return loggers


def _refuse_missing_logger(recipe: Recipe) -> None:
    chosen = recipe.config.trainer.logger
    if chosen is not None and importlib.util.find_spec(LOGGERS[chosen][1]) is None:
        raise refusal(recipe, "trainer.logger", f"{chosen} is not installed.", f"`pip install {LOGGERS[chosen][2]}`")


def _chosen_logger(recipe: Recipe, chosen: str) -> Logger:
    class_name = LOGGERS[chosen][0]
    logger_class = getattr(importlib.import_module("lightning.pytorch.loggers"), class_name)
    try:
        logger = logger_class(**recipe.options("trainer")["logger_options"] or {})
    except TypeError as error:
        raise refusal(recipe, "trainer.logger_options", f"{class_name} refused them: {error}") from error
    assert isinstance(logger, Logger)
    return logger


def _checkpoint_path(folder: Path, checkpoint: str) -> Path:
    names = {"best": BEST, "last": LAST}
    if checkpoint not in names:
        raise RunError(f"there is no checkpoint `{checkpoint}`; choose best or last")
    path = folder / CHECKPOINTS / names[checkpoint]
    if not path.exists():
        raise RunError(f"{path}: there is no such checkpoint yet.")
    return path


def _own_checkpoint(path: Path, recipe: Recipe) -> dict[str, Any]:
    """A checkpoint of this very recipe.

    Raises:
        CheckpointError: it is damaged, holds more than data, or was made by another recipe.
    """
    saved = load_checkpoint(path, required=REQUIRED)
    here, there = (_decisive(text) for text in (recipe.to_yaml(), saved["marlkit"]["recipe"]))
    if here != there:
        lines = zip(OmegaConf.to_yaml(here).splitlines(), OmegaConf.to_yaml(there).splitlines(), strict=False)
        ours, theirs = next(((a, b) for a, b in lines if a != b), ("", ""))
        raise CheckpointError(
            f"{path}: was made by another recipe than the {RECIPE} of the run. First difference: `{ours.strip()}` in the run, "
            f"`{theirs.strip()}` in the checkpoint. Restore the recipe, or train it anew."
        )
    return saved


def _decisive(text: str) -> DictConfig:
    """A recipe less what may change between stop and resume: how long and where it trains, all of `trainer` but `precision`."""
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    # A recipe from before there was a choice does not name it.
    config.trainer = {"precision": config.trainer.get("precision", "float32")}
    return config


def _trained_actor(recipe: Recipe, spec: TeamSpec, saved: dict[str, Any]) -> Actor:
    actor = build(recipe, "actor", spec)
    assert isinstance(actor, Actor)
    own = {name.removeprefix("actor."): value for name, value in saved["state_dict"].items() if name.startswith("actor.")}
    try:
        actor.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(
            f"{recipe.source.parent}: the checkpoint's parameters do not fit the recipe's actor: {error}"
        ) from error
    return actor.eval()


def _episodes(
    folder: Path,
    *,
    checkpoint: str,
    count: int | None,
    seed: int | None,
    watch: Callable[[Environment], None] | None = None,
) -> Episodes:
    """Episodes of a trained team; ``None`` counts and seeds as evaluations during training do."""
    recipe = run_recipe(folder)
    saved = _own_checkpoint(_checkpoint_path(folder, checkpoint), recipe)
    device = choose_device(recipe)
    env = _evaluation_environment(recipe, device, count)
    actor = _trained_actor(recipe, env.spec, saved).to(device)
    seed = recipe.seed + EVALUATION_SEED if seed is None else seed
    return play_episodes(env, actor, seed=seed, steps=recipe.config.trainer.evaluation_steps, watch=watch)
