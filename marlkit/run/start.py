"""The start of a training: Lightning's Trainer, the loggers, and checks before any file is written."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger

from marlkit.errors import CheckpointError, OptionError
from marlkit.recipe.reading import Recipe
from marlkit.run.checkpoint_io import AtomicCheckpointIO
from marlkit.run.contents import METRICS, RECIPE
from marlkit.run.ddp import NoSignals, RanksStrategy
from marlkit.run.folder import REQUIRED
from marlkit.run.metrics_logger import Continuation, MetricsFile
from marlkit.run.progress import IterationProgress
from marlkit.run.step_times import StepTimes
from marlkit.run.tensorboard import EventLogger
from marlkit.training.assembly import refusal

LOGGERS = {
    "wandb": ("WandbLogger", "wandb", "wandb"),
    "mlflow": ("MLFlowLogger", "mlflow", "mlflow"),
    "comet": ("CometLogger", "comet_ml", "comet-ml"),
    "neptune": ("NeptuneLogger", "neptune", "neptune"),
}
"""Lightning's class, the module that it needs, and the package that holds the module."""


def new_trainer(
    recipe: Recipe, folder: Path, device: torch.device, *, progress: bool, profile: bool, callbacks: Sequence[lightning.Callback]
) -> lightning.Trainer:
    """A Lightning Trainer, with its rank among the processes that train together; it writes no file yet."""
    options = recipe.config.trainer
    several = options.devices * options.nodes > 1
    _refuse_unfit_launch(recipe)
    _refuse_unfit_callbacks(callbacks)
    # Lightning 2.6 calls a function that torch has since deprecated; the user cannot act on the warning.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hints do not apply here
    plugins: list[Any] = [AtomicCheckpointIO(REQUIRED)]
    if several and SLURMEnvironment.detect():
        # Lightning would resubmit the job with the same command, which starts another run.
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
    trainer._signal_connector = NoSignals(trainer)
    if profile and trainer.is_global_zero:
        trainer.callbacks.append(StepTimes())  # type: ignore[attr-defined]
    return trainer


def _refuse_unfit_callbacks(callbacks: object) -> None:
    given = callbacks if isinstance(callbacks, (list, tuple)) else [None]
    if not all(isinstance(each, lightning.Callback) for each in given):
        named = type(callbacks).__name__ if given == [None] else ", ".join(type(each).__name__ for each in given)
        raise OptionError("callbacks", f"must be a list of callbacks that extend `lightning.Callback`, got {named}")


def prepare_files(trainer: lightning.Trainer) -> None:
    """Continue the metrics, which reach the disk before each checkpoint that follows them; load checkpoints to the own device."""
    checkpoint_io = trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, AtomicCheckpointIO)
    checkpoint_io.device = trainer.strategy.root_device
    files = [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
    for file in files:
        _tell(file.begin(), file.path, trainer)

    def sync() -> None:
        for file in files:
            file.sync()

    checkpoint_io.before_saving = sync


def _tell(found: Continuation, path: Path, trainer: lightning.Trainer) -> None:
    """Say what of the metrics before a resume is lost, and which rows are written anew."""
    if found.missing:
        lost = f"{path}: the rows of iterations {found.missing} are missing, and cannot be made again."
        warnings.warn(f"{lost} If you have a copy of the file, stop, put it back and resume.", stacklevel=2)
    if found.repeated:
        repeated = f"{path}: iterations {found.repeated} were repeated or out of order."
        warnings.warn(f"{repeated} They are in order now, with the last row of each.", stacklevel=2)
    if found.dropped and isinstance(bar := trainer.progress_bar_callback, IterationProgress):
        bar.print(
            f"Iterations {found.dropped} came after the checkpoint and are played again; their rows of {path.name} are dropped."
        )


def _refuse_unfit_launch(recipe: Recipe) -> None:
    options = recipe.config.trainer
    wanted = options.devices * options.nodes
    if TorchElasticEnvironment.detect():
        started = TorchElasticEnvironment().world_size()
        if started != wanted:
            message = f"torchrun has started {started} processes, but trainer.devices x trainer.nodes is {wanted}."
            raise refusal(recipe, "trainer.devices", message, "Set both as torchrun's --nproc-per-node and --nnodes.")
    elif options.devices > 1 and not SLURMEnvironment.detect() and "LOCAL_RANK" not in os.environ and not can_be_started_again():
        message = f"{options.devices} ranks need a program that can be started once more for each of them, which this one cannot."
        remedy = "Use the command `marlkit train`, a script in a file (`python train.py`), or set trainer.devices=1."
        raise refusal(recipe, "trainer.devices", message, remedy)


def can_be_started_again() -> bool:
    """Whether the program is a module or a file: no notebook or prompt, nothing read from ``-c`` or standard input."""
    main = sys.modules["__main__"]
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return False
    spec = getattr(main, "__spec__", None)
    return Path(sys.argv[0]).is_file() if spec is None else spec.name != "__main__"


def refuse_other_ranks(recipe: Recipe, saved: dict[str, Any], folder: Path) -> None:
    """Check that a run is resumed with as many ranks as it was trained with.

    Raises:
        CheckpointError: the recipe asks for another number.
    """
    options = recipe.config.trainer
    trained, wanted = saved["ranks"]["size"] if "ranks" in saved else 1, options.devices * options.nodes
    if trained != wanted:
        raise CheckpointError(
            f"{folder}: was trained by {trained} ranks (trainer.devices x trainer.nodes), its {RECIPE} now asks for {wanted}. "
            f"Every rank has environments and data of its own, so that only as many can continue. Restore the {RECIPE}, or train "
            "it again."
        )


def new_loggers(recipe: Recipe, folder: Path, first_iteration: int) -> list[Logger]:
    """The loggers of a run: a CSV file, TensorBoard, and the one that the recipe names."""
    loggers: list[Logger] = [
        MetricsFile(folder / METRICS, first_iteration),
        EventLogger(folder),
    ]
    chosen = recipe.config.trainer.logger
    if chosen is not None:
        loggers.append(_chosen_logger(recipe, chosen))
    return loggers


def refuse_missing_logger(recipe: Recipe) -> None:
    """Check that the package of the logger that the recipe names is installed.

    Raises:
        RecipeError: it is not installed.
    """
    chosen = recipe.config.trainer.logger
    if chosen is not None and importlib.util.find_spec(LOGGERS[chosen][1]) is None:
        raise refusal(recipe, "trainer.logger", f"{chosen} is not installed.", f"`pip install {LOGGERS[chosen][2]}`")


def _chosen_logger(recipe: Recipe, chosen: str) -> Logger:
    class_name = LOGGERS[chosen][0]
    logger_class = getattr(importlib.import_module("lightning.pytorch.loggers"), class_name)
    try:
        logger = logger_class(**recipe.arguments("trainer")["logger_options"] or {})
    except TypeError as error:
        raise refusal(recipe, "trainer.logger_options", f"{class_name} refused them: {error}") from error
    assert isinstance(logger, Logger)
    return logger
