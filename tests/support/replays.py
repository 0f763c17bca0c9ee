"""Comparison of recorded functions with the functions themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from marlkit.recorder.recording import Recording, preserved, record


def agree(function: Callable[..., Any], inputs: list[list[Tensor]], varying: list[Tensor]) -> Recording:
    """Record at the first inputs; at all of them, replay and function give the same bits, in results and in changed tensors."""
    recording = record(function, inputs[0], varying, undo=True)
    for each in inputs:
        with preserved(varying):
            expected = function(*each)
            after = [tensor.clone() for tensor in varying]
        with preserved(varying):
            found = recording.replay(*each)
            assert all(map(torch.equal, varying, after))
        same(found, expected)
    return recording


def same(found: Any, expected: Any) -> None:
    """Equality of nested structures; of tensors bit by bit, types and shapes included."""
    here, there = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert here[1] == there[1]
    for one, other in zip(here[0], there[0], strict=True):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


def numbers(*shape: int, n: int = 3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(shape, generator=generator)] for _ in range(n)]


class Operations(TorchDispatchMode):
    """Counts the operations, and the results that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.references: list[StorageWeakRef] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name.partition("::")[2])
        if isinstance(result, Tensor):
            self.references.append(StorageWeakRef(result.untyped_storage()))
        self.most = max(self.most, len({r.cdata for r in self.references if not r.expired()}))
        return result


def replayed(recording: Recording, *inputs: Tensor) -> Operations:
    with Operations() as seen:
        recording.replay(*inputs)
    return seen
