"""Rows chosen by truth values, without their number: ``reward[hit] += 1`` as operations of fixed shapes.

``x[mask]`` has as many rows as `mask` has truths, so that its shape depends on values and it cannot be recorded. While
:class:`MaskedSelection` is active, it is all of ``x`` instead, marked as selected by that mask; element-wise operations on
marked tensors are marked as well; and ``x[mask] = y`` takes the rows of a marked ``y`` where the mask is true:

    y = x[mask] + 1          all rows of x + 1, marked
    x[mask] = y              x <- where(mask, y, x)

Every element that the function would have computed is computed by the same operation from the same numbers. Anything else that
is done with a marked tensor, asking for its shape included, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from marlkit.recorder.tape import NotRecordable, Watching, leaves, source_line

_ATEN = torch.ops.aten
_SHAPE = (Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__)  # type: ignore[attr-defined]


class _Mark(NamedTuple):
    """Which mask selected, and how many dimensions lie before it."""

    mask: Any
    lead: int


class MaskedSelection(Watching):
    """Selects all rows where a mask is to select some; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, tuple[_Mark, StorageWeakRef]] = {}
        self._origins: dict[tuple[Any, ...], Any] = {}
        self._kept: list[StorageWeakRef] = []  # so that an address means one memory all the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is _ATEN.index and (mask := _only_mask(args[1])) is not None:
            self._refuse_marked(args, func)
            return self._marked(args[0].clone(), self._mark_of(mask, args[1]))
        if packet is _ATEN.index_put_ and len(args) == 3 and (mask := _only_mask(args[1])) is not None:
            return self._put(func, args, mask)
        marks = [self.mark(tensor) for tensor in leaves((args, kwargs), Tensor)]
        if not any(marks):
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.dtype == torch.bool and torch.Tag.pointwise in func.tags:
                self._recognise(result, func, (args, kwargs))
            return result
        return self._elementwise(func, args, kwargs)

    def called(self, func: Any, args: Sequence[Any]) -> None:
        """Refuse questions for the shape of a marked tensor, which is not what it would be.

        Raises:
            NotRecordable: it is one.
        """
        if func in _SHAPE:
            self._refuse_marked(args[:1], "shape")

    def _put(self, func: Any, args: Any, mask: Tensor) -> Tensor:
        """``x[mask] = y``; ``y`` is marked, or the same for all rows."""
        x, indices, y = args
        lead = len(indices) - 1
        if self.mark(y) is None:
            rest = x.ndim - lead - mask.ndim
            if (y.ndim > rest and y.shape[y.ndim - rest - 1] != 1) or y.ndim > rest + 1 or lead:
                return func(*args)
            y = y.reshape(y.shape[y.ndim - rest :]) if y.ndim > rest else y
        elif self.mark(y) != self._mark_of(mask, indices) or y.shape != x.shape:
            raise NotRecordable(f"rows that one mask selects are written where another does, at {source_line()}")
        chosen = mask.reshape(*(1,) * lead, *mask.shape, *(1,) * (x.ndim - lead - mask.ndim))
        return x.copy_(torch.where(chosen, y, x))

    def _elementwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = {mark for tensor in leaves((args, kwargs), Tensor) if (mark := self.mark(tensor)) is not None}
        elementwise = torch.Tag.pointwise in func.tags or func._overloadpacket is _ATEN.copy_
        others = [tensor for tensor in leaves((args, kwargs), Tensor) if self.mark(tensor) is None]
        if not elementwise or len(found) > 1 or any(other.numel() != 1 for other in others):
            self._refuse_marked((args, kwargs), func)
        result = func(*args, **kwargs)
        for tensor in leaves(result, Tensor):
            self._marked(tensor, next(iter(found)))
        return result

    def _refuse_marked(self, thing: Any, func: Any) -> None:
        """Refuse an operation on rows that a mask selected.

        Raises:
            NotRecordable: there is a marked tensor in ``thing``.
        """
        if any(self.mark(tensor) is not None for tensor in leaves(thing, Tensor)):
            raise NotRecordable(f"`{func}` of rows that a mask selects depends on how many there are, at {source_line()}")

    def mark(self, tensor: Tensor) -> _Mark | None:
        """How a tensor ``[*]`` was selected; ``None`` where it was not."""
        found = self._marks.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def _mark_of(self, mask: Tensor, indices: Sequence[Tensor | None]) -> _Mark:
        state = _state(mask)
        return _Mark(self._origins.get(state, state), len(indices) - 1)

    def _recognise(self, mask: Tensor, func: Any, operands: Any) -> None:
        """Remember how a mask was computed: one that is computed again from the same is the same (``x[~hit] += y[~hit]``)."""
        origin = (func, *map(self._origin, pytree.tree_leaves(operands)))
        self._origins[_state(mask)] = origin
        self._kept += [StorageWeakRef(tensor.untyped_storage()) for tensor in (mask, *leaves(operands, Tensor))]

    def _origin(self, operand: Any) -> Any:
        if not isinstance(operand, Tensor):
            return operand
        state = _state(operand)
        return self._origins.get(state, state)

    def _marked(self, tensor: Tensor, mark: _Mark) -> Tensor:
        storage = tensor.untyped_storage()
        self._marks[storage._cdata] = mark, StorageWeakRef(storage)
        return tensor


def _only_mask(indices: Sequence[Tensor | None]) -> Tensor | None:
    """The mask by which alone is indexed, after dimensions that are taken whole."""
    *before, last = indices
    alone = all(index is None for index in before) and last is not None and last.dtype == torch.bool
    return last if alone else None


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory a tensor looks at, and how often it has been written to."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), *tensor.shape, *tensor.stride(), tensor._version
