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


def run_recipe(folder: Path, *, trust: bool = False) -> Recipe:
    """The completed recipe of a run.

    Args:
        folder: of the run.
        trust: as for :func:`marlkit.recipe.load_recipe`.

    Raises:
        RunError: the folder is not a run.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise RunError(f"{folder}: is not a run; it holds no {RECIPE}. Runs stand under runs/<recipe>/<time>-seed<k>/.")
    return load_recipe(path, folders=_component_folders(folder), trust=trust)


def refuse_links(folder: Path) -> None:
    """Check that what is written into a run stays in it.

    Raises:
        RunError: something in the folder is a link to a place outside of it.
    """
    inside = folder.resolve()
    found = (Path(parent, name) for parent, folders, files in os.walk(inside) for name in (*folders, *files))
    for path in sorted(found):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            where = f"{path}: is a link to {path.resolve()}, outside of the run, and would be written to."
            raise RunError(f"{where} Replace it by what it points to, or repeat with --trust (in Python: trust=True).")


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
            saved = _decisive(checkpoint["marlkit"]["recipe"])
    now = _decisive(recipe.to_yaml())
    here, there = OmegaConf.to_yaml(now), OmegaConf.to_yaml(_with_newer_options(saved, now, recipe))
    if here != there:
        lines = zip(here.splitlines(), there.splitlines(), strict=False)
        ours, theirs = next(((a, b) for a, b in lines if a != b), ("", ""))
        raise CheckpointError(
            f"{path}: was made by another recipe than the {RECIPE} of the run. First difference: `{ours.strip()}` in the run, "
            f"`{theirs.strip()}` in the checkpoint. Restore the recipe, or train it again."
        )
    return checkpoint


def _with_newer_options(saved: DictConfig, now: DictConfig, recipe: Recipe) -> DictConfig:
    """A ``saved`` recipe with the options that its components did not have then, in the order that they have ``now``.

    Such an option counts as set to its default, with which a component does what it did without it.
    """
    completed = OmegaConf.to_container(saved)
    for path, entry in recipe.entries.items():
        before, after = _at(completed, path), OmegaConf.select(now, path)
        if not isinstance(before, dict) or after is None:
            continue
        held = dict(before)
        before.clear()
        for name, value in OmegaConf.to_container(after).items():
            newer = name not in held and name in entry.options and value == entry.options[name].default
            if name in held or newer:
                before[name] = held.pop(name, value)
        before.update(held)
    result = OmegaConf.create(completed)
    assert isinstance(result, DictConfig)
    return result


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _decisive(text: str) -> DictConfig:
    """A recipe without the options that may change between stop and resume: all of `trainer` except `precision`."""
    config = OmegaConf.create(text)
    if not isinstance(config, DictConfig) or not isinstance(config.get("trainer"), DictConfig):
        raise ValueError("it has no trainer")
    # Older recipes do not have this option.
    config.trainer = {"precision": config.trainer.get("precision", "float32")}
    return config
