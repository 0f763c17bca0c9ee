"""The state of every random generator that training uses, as plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from marlkit.saved import COUNT, LIST, NUMBER, Kind, named, refuse_misfit


def state() -> dict[str, Any]:
    """States of torch (CPU and every CUDA device), NumPy and Python, loadable with ``weights_only=True``."""
    name, words, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(words).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def restore(saved: dict[str, Any]) -> None:
    """Set every generator to a saved :func:`state`; CUDA generators only if the number of devices is the same."""
    torch.set_rng_state(saved["torch"].cpu())
    if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in saved["cuda"]])
    name, words, *rest = saved["numpy"]
    np.random.set_state((name, _words(words), *rest))
    random.setstate(_python_state(saved["python"]))


def refuse_unfit(saved: Any, where: str) -> None:
    """Check that :func:`restore` can work with ``saved``; a generator reads memory at the position that it is given.

    Raises:
        CheckpointError: names the entry of ``where`` that does not fit.
    """
    own = state() | {"cuda": LIST}
    own["numpy"][2] = Kind("a position, 0 to 624", lambda value: type(value) is int and 0 <= value <= 624)
    own["numpy"][3], own["numpy"][4] = COUNT, NUMBER
    own["python"] = [own["python"][0], [COUNT] * len(own["python"][1]), Kind("a number or None", _is_number_or_none)]
    refuse_misfit(saved, own, where)
    for index, each in enumerate(saved["cuda"]):
        refuse_misfit(each, Kind("the state of a generator", _is_bytes), f"{where}.cuda[{index}]")
    with named(f"`{where}` is no state of the generators"):
        torch.Generator().set_state(saved["torch"])
        random.Random().setstate(_python_state(saved["python"]))
        name, words, *rest = saved["numpy"]
        if not ((words >= 0) & (words < 2**32)).all():
            raise ValueError("a word of NumPy's generator has more than 32 bits")
        np.random.RandomState().set_state((name, _words(words), *rest))


def _is_number_or_none(value: Any) -> bool:
    return value is None or type(value) is float


def _is_bytes(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.uint8 and value.dim() == 1


def _words(words: torch.Tensor) -> Any:
    return words.cpu().numpy().astype(np.uint32)


def _python_state(saved: Any) -> tuple[Any, ...]:
    version, internal, gauss_next = saved
    return version, tuple(internal), gauss_next


def drawn_since(saved: dict[str, Any]) -> set[str]:
    """The generators, of ``torch``, ``cuda``, ``numpy`` and ``python``, whose state differs from a saved :func:`state`."""
    now = state()
    return {source for source in now if not _same(now[source], saved[source])}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def seed_all(seed: int) -> None:
    """Seed every generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed every generator within the block and restore them after it."""
    saved = state()
    seed_all(seed)
    try:
        yield
    finally:
        restore(saved)
