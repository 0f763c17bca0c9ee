"""The folder of a run: the names of its files, and how it is created and opened.

``runs/<recipe>/<time>-seed<k>/`` holds ``recipe.yaml`` (completed), ``versions.json``, ``metrics.csv``, ``tensorboard/``,
``checkpoints/last.ckpt`` and ``best.ckpt``, and at the end ``curve.png`` and ``team.gif``.
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from marlkit.errors import CheckpointError, RunError, writing
from marlkit.recipe.reading import Recipe, load_recipe
from marlkit.run.checkpoint_io import load_checkpoint, of_file
from marlkit.run.checkpoints import BEST, LAST
from marlkit.run.files import write_whole
from marlkit.run.versions import read_versions, versions
from marlkit.saved import COUNT, MAPPING, named, refuse_misfit
from marlkit.training.assembly import choose_device
from marlkit.training.restoring import HEADER

RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
VERSIONS = "versions.json"
COMPONENT_FOLDERS = "component_folders"
CHECKPOINTS = "checkpoints"
REQUIRED = ("state_dict", "marlkit")
CURVE = "curve.png"
ANIMATION = "team.gif"


def new_run_folder(recipe: Recipe, root: Path) -> Path:
    """Create a run folder with the recipe and the versions of the software."""
    folder = _new_folder(root / recipe.name, recipe.seed)
    write_whole(folder / RECIPE, recipe.to_yaml().encode())
    made_with = versions(threads=recipe.config.trainer.threads, device=choose_device(recipe))
    noted = made_with | {COMPONENT_FOLDERS: [str(path) for path in recipe.folders]}
    write_whole(folder / VERSIONS, (json.dumps(noted, indent=2) + "\n").encode())
    return folder


def _new_folder(parent: Path, seed: int) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = parent / f"{stamp}-seed{seed}{'' if attempt == 1 else f'-{attempt}'}"
        with writing(folder):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            (folder / CHECKPOINTS).mkdir()
        return folder
    raise RunError(f"{parent}: a thousand runs started within this second")


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
    """The folders in which the run found components named by dotted paths; none where its ``versions.json`` is unreadable."""
    noted = read_versions(folder / VERSIONS).get(COMPONENT_FOLDERS, [])
    paths = [path for path in noted if isinstance(path, str)] if isinstance(noted, list) else []
    return [Path(path) for path in paths if os.path.isdir(path)]


def checkpoint_path(folder: Path, checkpoint: str) -> Path:
    """The path of the checkpoint ``"best"`` or ``"last"`` of a run.

    Raises:
        RunError: there is no checkpoint of this name, or not yet.
    """
    names = {"best": BEST, "last": LAST}
    if checkpoint not in names:
        raise RunError(f"there is no checkpoint `{checkpoint}`; choose best or last")
    path = folder / CHECKPOINTS / names[checkpoint]
    if not path.exists():
        raise RunError(f"{path}: there is no such checkpoint yet.")
    return path


def own_checkpoint(path: Path, recipe: Recipe) -> dict[str, Any]:
    """A checkpoint of this very recipe.

    Raises:
        CheckpointError: it is damaged, holds more than plain data, or was made by another recipe.
    """
    checkpoint = load_checkpoint(path, required=REQUIRED)
    with of_file(path):
        refuse_misfit(checkpoint, {"state_dict": MAPPING, "marlkit": HEADER}, "", exact=False)
        ranks = checkpoint["marlkit"].get("ranks", {"size": 1})
        refuse_misfit(ranks, {"size": COUNT}, "marlkit.ranks", exact=False)
        with named("`marlkit.recipe` is no recipe"):
            there = _decisive(checkpoint["marlkit"]["recipe"])
    here = _decisive(recipe.to_yaml())
    if here != there:
        lines = zip(OmegaConf.to_yaml(here).splitlines(), OmegaConf.to_yaml(there).splitlines(), strict=False)
        ours, theirs = next(((a, b) for a, b in lines if a != b), ("", ""))
        raise CheckpointError(
            f"{path}: was made by another recipe than the {RECIPE} of the run. First difference: `{ours.strip()}` in the run, "
            f"`{theirs.strip()}` in the checkpoint. Restore the recipe, or train it again."
        )
    return checkpoint


def _decisive(text: str) -> DictConfig:
    """A recipe without the options that may change between stop and resume: all of `trainer` except `precision`."""
    config = OmegaConf.create(text)
    if not isinstance(config, DictConfig) or not isinstance(config.get("trainer"), DictConfig):
        raise ValueError("it has no trainer")
    # Older recipes do not have this option.
    config.trainer = {"precision": config.trainer.get("precision", "float32")}
    return config
