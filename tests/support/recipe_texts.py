"""Recipes for the tests of the recipe layer, and their problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from marlkit.errors import Problem, RecipeError
from marlkit.recipe import Recipe, load_recipe

DATA = Path(__file__).parent

TEAM = """\
env: {type: example_team.TinyEnvironment, num_envs: 8}
actor: stochastic
critic: centralised
data: {type: rollout, steps: 10}
estimator: {type: gae, gamma: 0.9}
update:
  type: ppo_clip
  clip_epsilon: 0.3
  minibatch_size: 40
optimizer: {type: adam, lr: 3e-4}
"""
"""A valid recipe; the tests change one line of it."""


def read(folder: Path, text: str = TEAM, overrides: Sequence[str] = (), *, fit: bool = True) -> Recipe:
    """Write a recipe into `folder` and load it; the example components are found."""
    file = folder / "team.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides, folders=[DATA], fit=fit, trust=True)


def problems(folder: Path, text: str = TEAM, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
    """The problems of a recipe."""
    with pytest.raises(RecipeError) as caught:
        read(folder, text, overrides)
    return caught.value.problems


def problem(folder: Path, text: str = TEAM, overrides: Sequence[str] = ()) -> Problem:
    """The only problem of a recipe."""
    found = problems(folder, text, overrides)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]
