"""Run folders as a training leaves them, with given returns and without training; they hold no checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from marlkit.recipe import load_recipe

EPISODES = 2


def write_run(
    root: Path,
    recipe: str = "mappo",
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    returns: Mapping[int, float],
    iterations: int | None = None,
    frames: int = 1000,
    commit: str = "c0ffee",
) -> Path:
    """A run of ``recipe`` whose evaluations after the iterations of ``returns`` had these means.

    Args:
        root: of the runs.
        recipe: name.
        overrides: as on the command line.
        seed: of the run.
        returns: mean return by number of iterations done.
        iterations: of the recipe; as many as are done unless given.
        frames: of an iteration.
        commit: as noted.
    """
    done = max(returns)
    given = [*overrides, f"seed={seed}", f"trainer.iterations={iterations or done}", f"trainer.evaluation_episodes={EPISODES}"]
    loaded = load_recipe(recipe, given)
    folder = root / recipe / f"{'-'.join(overrides)}{len(list(root.glob('*/*')))}-seed{seed}".replace("/", "_")
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(loaded.to_yaml())
    (folder / "versions.json").write_text(json.dumps({"commit": commit}))
    metrics = ["iteration,frames,evaluation/return,evaluation/length,episode/return"]
    episodes = ["iteration,frames,evaluation/return/0,evaluation/return/1"]
    for number in range(1, done + 1):
        value = returns.get(number)
        told = "," if value is None else f"{value!r},100.0"
        metrics.append(f"{number - 1},{number * frames},{told},{number * 0.1!r}")
        if value is not None:
            episodes.append(f"{number - 1},{number * frames},{value - 1!r},{value + 1!r}")
    (folder / "metrics.csv").write_text("\n".join([*metrics, ""]))
    (folder / "episodes.csv").write_text("\n".join([*episodes, ""]))
    return folder
