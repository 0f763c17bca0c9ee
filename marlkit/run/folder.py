"""The folder of a run: the names of its files, and how it is created and opened.

``runs/<recipe>/<time>-seed<k>/`` holds ``recipe.yaml`` (completed), ``versions.json``, ``metrics.csv``, ``tensorboard/``,
``checkpoints/last.ckpt`` and ``best.ckpt``, and at the end ``curve.png`` and ``team.gif``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from marlkit.contract import as_yaml
from marlkit.errors import CheckpointError, RunError, writing
from marlkit.recipe.located_yaml import Place, read_text
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
    folders = _component_folders(folder)
    recipe = load_recipe(path, folders=folders, trust=trust)
    former = _former_options(recipe, path)
    return load_recipe(path, former, folders=folders, trust=trust) if former else recipe


def _former_options(recipe: Recipe, path: Path) -> list[str]:
    """Overrides with which the components of a run do what they did before they had the options that its ``path`` lacks."""
    found = read_text(path.read_text(encoding="utf-8"), Place(path.name))[0].plain()
    newer = _newer_options(recipe, dict(_flat(found)))
    former = {f"{path}.{name}" for path, entry in recipe.entries.items() for name in entry.contract.formerly}
    return [f"{name}={as_yaml(value)}" for name, value in newer.items() if name in former]


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
            there = _decisive(checkpoint["marlkit"]["recipe"])
    here = _decisive(recipe.to_yaml())
    there = {name: value for name, value in _newer_options(recipe, there).items() if name in here} | there
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


def _newer_options(recipe: Recipe, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that the components of a ``saved`` recipe did not have then.

    With its default a component does what it did before it had the option, unless its contract says with what else (`formerly`).
    """
    known = {name.rpartition(".")[0] for name in saved}
    return {
        f"{path}.{name}": entry.contract.formerly.get(name, option.default)
        for path, entry in recipe.entries.items()
        if path in known
        for name, option in entry.options.items()
        if f"{path}.{name}" not in known and not option.required
    }


def _decisive(text: str) -> dict[str, Any]:
    """A recipe's values by dotted path, less what may change between stop and resume: all of `trainer` except `precision`."""
    config = read_text(text, Place("recipe"))[0].plain()
    if not isinstance(config, dict) or not isinstance(config.get("trainer"), dict):
        raise ValueError("it has no trainer")
    config["trainer"] = {"precision": config["trainer"].get("precision", "float32")}
    return dict(_flat(config))


def _flat(config: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
