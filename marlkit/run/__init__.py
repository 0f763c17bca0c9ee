"""A run: one training of one recipe, and its folder."""

from __future__ import annotations

from marlkit.run.folder import run_recipe
from marlkit.run.session import resume, train
from marlkit.run.use import evaluate, load_policy, play

__all__ = ["evaluate", "load_policy", "play", "resume", "run_recipe", "train"]
