"""What the option `against` of an environment names; imports no torch."""

from __future__ import annotations

from pathlib import Path

RANDOM = "random"


def runs_code(against: str) -> bool:
    """Whether it is the dotted path of a function; a folder has a slash in its path, or nothing but its name."""
    return "." in against and all(part.isidentifier() for part in against.split("."))


def problem_with_player(against: str, train: str | None) -> str | None:
    """The message for what names no player for those outside of ``train``; ``None`` where only importing would tell more."""
    if against == RANDOM:
        return None
    if train is None:
        return "has no effect where all agents are trained: set `train` to the group that is"
    if runs_code(against):
        return None
    if (Path(against) / "recipe.yaml").is_file():
        return None
    ways = "`random`, the dotted path of a function of observations and team, or a run folder (`runs/mappo/<run>`)"
    return f"`{against}` is no player, nor a run folder here. It may be {ways}"
