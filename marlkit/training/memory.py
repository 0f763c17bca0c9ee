"""Whether what a recipe will hold fits into memory, before anything is lost."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tensordict import TensorDictBase

from marlkit.component import Data
from marlkit.recipe import Recipe
from marlkit.training.assembly import refusal

GIB = 2**30


def refuse_unfit_memory(recipe: Recipe, data: Data, played: TensorDictBase) -> None:
    """Check that the steps that a training holds fit into the memory that is free.

    It is a lower bound: networks, gradients and the simulation come on top.

    Args:
        recipe: of the training.
        data: the recipe's, of full size.
        played: a few steps ``[B, T]``.

    Raises:
        RecipeError: they do not.
    """
    options, envs = recipe.config.trainer, recipe.config.env.num_envs
    on_gpu = options.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    available = _available_on_gpu(options.device) if on_gpu else available_bytes()
    if available is None:
        return
    # The processes of a CPU share its memory.
    needed = data.held_bytes(envs, played) * (1 if on_gpu else options.devices)
    if needed > available:
        words = (
            f"{envs} environments and the data would hold {needed / GIB:.1f} GiB of steps; {available / GIB:.1f} GiB are free."
        )
        large = " or ".join(f"data.{name}" for name in ("steps", "capacity") if name in recipe.entries["data"].options)
        raise refusal(recipe, "env.num_envs", words, f"Lower env.num_envs{f' or {large}' if large else ''}.")


def available_bytes() -> int | None:
    """Memory of this machine that can be used without swapping; ``None`` where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _available_on_gpu(index: int) -> int | None:
    return torch.cuda.mem_get_info(index)[0] if index < torch.cuda.device_count() else None
