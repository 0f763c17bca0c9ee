"""The state of every random generator that training uses, as plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


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
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    name, words, position, has_gauss, gauss = saved["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = saved["python"]
    random.setstate((version, tuple(internal), gauss_next))


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
