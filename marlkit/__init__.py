"""marlkit: multi-agent reinforcement learning from interchangeable components.

``load_recipe(name_or_path, overrides)`` reads and checks a recipe, ``train(recipe)`` trains it and returns the run folder,
``load_policy(folder)`` gives the trained team's policy, and ``compare(folders)`` compares runs. Importing marlkit imports no
torch; the functions that need it do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from marlkit.errors import MarlkitError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Callback

    from marlkit.comparison import Comparison
    from marlkit.recipe import Recipe, load_recipe
    from marlkit.run.policy import Policy

__version__ = "0.1.0"
__all__ = ["MarlkitError", "Recipe", "compare", "load_policy", "load_recipe", "resume", "train"]


def __getattr__(name: str) -> Any:
    # Imported when used, so that the command can be interrupted without a traceback from the start.
    if name in ("Recipe", "load_recipe"):
        from marlkit import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module `marlkit` has no attribute `{name}`")


def train(
    recipe: Recipe | str | Path,
    root: str | Path = "runs",
    *,
    progress: bool = True,
    profile: bool = False,
    callbacks: Sequence[Callback] = (),
    trust: bool = False,
) -> Path:
    """Train a recipe (or the one of that name or path); see :func:`marlkit.run.train`.

    With ``trust``, it may name code outside of marlkit (``docs/security.md``).
    """
    from marlkit import run
    from marlkit.recipe import Recipe, load_recipe

    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe = dataclasses.replace(recipe, trust=trust or recipe.trust)
    return run.train(recipe, root, progress=progress, profile=profile, callbacks=callbacks)


def resume(
    folder: str | Path,
    *,
    progress: bool = True,
    profile: bool = False,
    callbacks: Sequence[Callback] = (),
    trust: bool = False,
) -> Path:
    """Continue a run that was stopped; see :func:`marlkit.run.resume`."""
    from marlkit import run

    return run.resume(folder, progress=progress, profile=profile, callbacks=callbacks, trust=trust)


def load_policy(folder: str | Path, checkpoint: str = "best", *, n_agents: int | None = None, trust: bool = False) -> Policy:
    """The trained policy of a run; see :func:`marlkit.run.load_policy`."""
    from marlkit import run

    return run.load_policy(folder, checkpoint, n_agents=n_agents, trust=trust)


def compare(
    folders: Sequence[str | Path],
    *,
    metric: str = "evaluation/return",
    by: Literal["override", "recipe"] = "override",
    frames: int | None = None,
    absolute: bool = True,
    trust: bool = False,
) -> Comparison:
    """Compare runs; its ``write(folder)`` makes page, tables and figures. See :func:`marlkit.comparison.compare`."""
    from marlkit import comparison

    return comparison.compare(folders, metric=metric, by=by, frames=frames, absolute=absolute, trust=trust)
