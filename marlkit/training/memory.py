"""Whether what a recipe will hold fits into memory, before anything is lost."""

from __future__ import annotations

import operator
import os
from pathlib import Path

import torch
from tensordict import TensorDictBase

from marlkit.component import Data
from marlkit.errors import OptionError
from marlkit.options import Hidden
from marlkit.recipe import Recipe
from marlkit.spec import TeamSpec
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
    evaluated = options.evaluation_episodes * sum(tensor[0, 0].nbytes for tensor in played.values(True, True))
    if evaluated > available:
        needs = f"{options.evaluation_episodes} episodes at once need {evaluated / GIB:.1f} GiB for a step"
        words = f"{needs}; {available / GIB:.1f} GiB are free."
        raise refusal(recipe, "trainer.evaluation_episodes", words, "Evaluate fewer.")
    if needed > available:
        words = (
            f"{envs} environments and the data would hold {needed / GIB:.1f} GiB of steps; {available / GIB:.1f} GiB are free."
        )
        large = " or ".join(f"data.{name}" for name in ("steps", "capacity") if name in recipe.entries["data"].options)
        raise refusal(recipe, "env.num_envs", words, f"Lower env.num_envs{f' or {large}' if large else ''}.")


def refuse_large_networks(recipe: Recipe, spec: TeamSpec) -> None:
    """Check, before any is built, that the layers that a recipe names fit into the memory that is free.

    It is a lower bound: parameters, gradients and an optimiser's two moments of what lies between two hidden layers.

    Raises:
        RecipeError: they do not.
    """
    available, needed, largest = available_bytes(), 0, ("", 0)
    for path, entry in recipe.entries.items():
        options = recipe.options(path)
        copies = spec.n_agents if options.get("share") == "none" else 1
        for name, option in entry.options.items():
            if option.annotation == Hidden and options[name]:
                size = 4 * 4 * copies * sum(map(operator.mul, options[name], options[name][1:]))
                needed += size
                largest = max(largest, (f"{path}.{name}", size), key=lambda found: found[1])
    if available is not None and needed > available:
        needs = f"the hidden layers need {needed / GIB:.1f} GiB for parameters, gradients and moments"
        words = f"{needs}; {available / GIB:.1f} GiB are free."
        raise refusal(recipe, largest[0], words, "Make them narrower, or fewer.")


def refuse_many_episodes(count: int, spec: TeamSpec) -> None:
    """Check that what so many episodes at once show fits into the memory that is free; a lower bound.

    Raises:
        OptionError: it does not, or there are none.
    """
    available, needed = available_bytes(), 4 * count * (spec.n_agents * spec.observation + spec.state_size)
    if count < 1:
        raise OptionError("episodes", f"must be at least 1, got {count}")
    if available is not None and needed > available:
        raise OptionError("episodes", f"{count} at once need {needed / GIB:.1f} GiB; {available / GIB:.1f} GiB are free")


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
