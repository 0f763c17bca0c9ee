"""The folder of a run: how it is created, and how its checkpoints are opened; :mod:`marlkit.run.contents` names its files."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from marlkit.contract import as_yaml
from marlkit.errors import CheckpointError, RunError, writing
from marlkit.recipe.located_yaml import Place, read_text
from marlkit.recipe.reading import Recipe
from marlkit.run.checkpoint_io import load_checkpoint, of_file
from marlkit.run.checkpoints import BEST, LAST
from marlkit.run.contents import CHECKPOINTS, COMPONENT_FOLDERS, RECIPE, VERSIONS, flat, newer_options
from marlkit.run.files import partial_path, write_whole
from marlkit.run.versions import versions
from marlkit.saved import COUNT, MAPPING, named, refuse_misfit
from marlkit.training.assembly import choose_device
from marlkit.training.restoring import HEADER

REQUIRED = ("state_dict", "marlkit")


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


def refuse_unwritable_checkpoints(folder: Path) -> None:
    """Check that the checkpoints of a training can be written, before it begins.

    Raises:
        RunError: something else has their place.
        WriteError: their folder cannot be written to.
    """
    path = folder / CHECKPOINTS
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        what = f"a link to {path.readlink()}, which is not there" if path.is_symlink() and not path.exists() else "not a folder"
        raise RunError(f"{path}: is {what}, and no checkpoint could be written. Put the folder of the checkpoints back.")
    for name in (LAST, BEST):
        if (path / name).is_dir():
            raise RunError(f"{path / name}: is a folder, not a checkpoint file. Move it away.")
    if path.is_dir():
        with writing(path):
            partial_path(path / LAST).touch()
            partial_path(path / LAST).unlink()


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
        others = [other for other, name in names.items() if (folder / CHECKPOINTS / name).is_file()]
        remedy = f" {names[others[0]]} is there: `--checkpoint {others[0]}` uses it." if others else ""
        raise RunError(f"{path}: there is no such checkpoint yet.{remedy}")
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
    there = {name: value for name, value in newer_options(recipe, there).items() if name in here} | there
    different = [name for name in here | there if here.get(name) != there.get(name)]
    if different:
        ours, theirs = (
            f"{different[0]}: {as_yaml(side[different[0]])}" if different[0] in side else "" for side in (here, there)
        )
        raise CheckpointError(
            f"{path}: was made by another recipe than the {RECIPE} of the run. First difference: `{ours}` in the run, "
            f"`{theirs}` in the checkpoint. Restore the recipe, or train it again."
        )
    return checkpoint


def _decisive(text: str) -> dict[str, Any]:
    """A recipe's values by dotted path, less what may change between stop and resume: all of `trainer` except `precision`."""
    config = read_text(text, Place("recipe"))[0].plain()
    if not isinstance(config, dict) or not isinstance(config.get("trainer"), dict):
        raise ValueError("it has no trainer")
    config["trainer"] = {"precision": config["trainer"].get("precision", "float32")}
    return dict(flat(config))
