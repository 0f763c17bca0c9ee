"""A run: one training of one recipe, and its folder.

Importing it imports no torch; the functions that need it do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from marlkit.run.contents import run_recipe

if TYPE_CHECKING:
    from marlkit.run.session import resume, train
    from marlkit.run.use import evaluate, load_policy, play

__all__ = ["evaluate", "load_policy", "play", "resume", "run_recipe", "train"]


def __getattr__(name: str) -> Any:
    if name in ("resume", "train"):
        from marlkit.run import session

        return getattr(session, name)
    if name in ("evaluate", "load_policy", "play"):
        from marlkit.run import use

        return getattr(use, name)
    raise AttributeError(f"module `marlkit.run` has no attribute `{name}`")
