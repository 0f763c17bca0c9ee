"""From a YAML file and overrides to a complete, checked recipe; imports no torch."""

from __future__ import annotations

from marlkit.recipe.reading import SHIPPED, Recipe, load_recipe, shipped

__all__ = ["SHIPPED", "Recipe", "load_recipe", "shipped"]
