"""What the folder of a run holds, and its recipe. Imports no torch.

``runs/<recipe>/<time>-seed<k>/`` holds ``recipe.yaml`` (completed), ``versions.json``, ``metrics.csv``, ``episodes.csv``,
``tensorboard/``, ``checkpoints/last.ckpt`` and ``best.ckpt``, and at the end ``curve.png`` and ``team.gif``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlkit.contract import as_yaml
from marlkit.errors import RunError
from marlkit.recipe.located_yaml import Place, read_text
from marlkit.recipe.reading import Recipe, load_recipe
from marlkit.run.versions import read_versions

RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
EPISODES = "episodes.csv"
VERSIONS = "versions.json"
COMPONENT_FOLDERS = "component_folders"
CHECKPOINTS = "checkpoints"
CURVE = "curve.png"
ANIMATION = "team.gif"


def run_recipe(folder: Path, overrides: Sequence[str] = (), *, trust: bool = False) -> Recipe:
    """The completed recipe of a run.

    Args:
        folder: of the run.
        overrides: changes to it, such as ``"env.max_steps=200"``.
        trust: as for :func:`marlkit.recipe.load_recipe`.

    Raises:
        RunError: the folder is not a run.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise RunError(f"{folder}: is not a run; it holds no {RECIPE}. Runs stand under runs/<recipe>/<time>-seed<k>/.")
    folders = _component_folders(folder)
    recipe = load_recipe(path, folders=folders, trust=trust)
    changes = [*_former_options(recipe, path), *overrides]
    return load_recipe(path, changes, folders=folders, trust=trust) if changes else recipe


def _former_options(recipe: Recipe, path: Path) -> list[str]:
    """Overrides with which the components of a run do what they did before they had the options that its ``path`` lacks."""
    found = read_text(path.read_text(encoding="utf-8"), Place(path.name))[0].plain()
    newer = newer_options(recipe, dict(flat(found)))
    former = {f"{path}.{name}" for path, entry in recipe.entries.items() for name in entry.contract.formerly}
    return [f"{name}={as_yaml(value)}" for name, value in newer.items() if name in former]


def newer_options(recipe: Recipe, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that the components of a ``saved`` recipe did not have then.

    With its default a component does what it did before it had the option, unless its contract says with what else (`formerly`).
    """
    sections = {name.rpartition(".")[0] for name in saved}
    known = {*saved, *sections}  # a mapping is known by what it holds
    return {
        f"{path}.{name}": entry.contract.formerly.get(name, option.default)
        for path, entry in recipe.entries.items()
        if path in sections
        for name, option in entry.options.items()
        if f"{path}.{name}" not in known and not option.required
    }


def _component_folders(folder: Path) -> list[Path]:
    """The folders in which the run found components named by dotted paths; none where its ``versions.json`` is unreadable."""
    noted = read_versions(folder / VERSIONS).get(COMPONENT_FOLDERS, [])
    paths = [path for path in noted if isinstance(path, str)] if isinstance(noted, list) else []
    return [Path(path) for path in paths if os.path.isdir(path)]


def flat(config: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted path."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
