"""What a function of tensors does, as a list of ATen operations.

A :class:`Tape` is a `TorchDispatchMode`: every operation that reaches a kernel while it is active is written down, those of a
backward pass and of an optimiser step included. Tensors are known by their memory and not by their Python object, because
autograd wraps the same memory in several objects: a *register* is a geometry (offset, sizes, strides, type) of a *storage*.
Storages that are first met as an argument existed before; those first met as a result were made by the function.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from marlkit.errors import MarlkitError

Leaf = TypeVar("Leaf")
_TORCH = str(Path(torch.__file__).parent)
_RECORDERS = ("marlkit.recorder.tape", "marlkit.recorder.masked_rows", "marlkit.envs._vmas.branch_free")
_RANDOM = torch.Tag.nondeterministic_seeded
_SHAPES = torch.Tag.dynamic_output_shape
_IGNORED = frozenset({"profiler"})
"""Namespaces of operations that compute nothing."""

_OF_SHAPE = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like"}
    | {"new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}
)
"""Operations on a tensor that do not look at what it holds."""

_UNDECLARED_WRITES = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
"""Operations that write to their running statistics although their schema does not say so."""

_TO_PYTHON = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "__array__", Tensor.__dlpack__: "__dlpack__"}
"""Methods that read values without an operation that a dispatch mode would see."""

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class NotRecordable(MarlkitError):
    """A function does something that a list of operations cannot repeat; says what, and where in the source."""


class Register(NamedTuple):
    """In place of a tensor among the arguments of an entry."""

    number: int


@dataclass
class Geometry:
    """A register: which part of which storage, and as what type."""

    storage: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Storage:
    """A storage.

    Attributes:
        anchor: a register that views of it can be taken from: the first one met.
        given: a tensor on it, where it existed before the function ran.
        kept: a tensor on it, where it was made from constants and may be one itself.
        reference: keeps its address from being used again while the tape is written.
    """

    anchor: int
    device: torch.device
    given: Tensor | None
    kept: Tensor | None
    reference: StorageWeakRef


@dataclass
class Operation:
    """An operation of the tape.

    Attributes:
        function: the operation.
        call: what to call in its place: the same by a shorter way.
        args, kwargs: its arguments, with registers in place of tensors.
        outputs: its results, likewise.
        reads: storages whose content decides what it does.
        writes: storages that existed before it and are changed by it.
        creates: storages that it makes.
        views: registers on existing memory that only this operation can make (of another type).
        random: it draws from a generator.
        tainted: what it computes may differ from replay to replay.
        decides: what of its outcome reaches Python, or shapes what follows; empty where nothing does.
        site: where in the source.
    """

    function: Any
    call: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    outputs: Any
    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    creates: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    random: bool = False
    tainted: bool = False
    decides: str = ""
    site: str = ""

    @property
    def checks(self) -> bool:
        """It returns and changes nothing: it may only raise an error."""
        return not self.decides and self.outputs in (None, [], ()) and not self.writes


class Watching(TorchDispatchMode):
    """Sees every operation while it is active, and the calls of torch's Python functions, some of which need no operation."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = _Calls(self)

    def __enter__(self) -> Self:
        super().__enter__()
        self._calls.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)
        super().__exit__(*error)

    @abstractmethod
    def called(self, func: Any, args: Sequence[Any]) -> None:
        """A function is about to be called."""


class _Calls(TorchFunctionMode):
    def __init__(self, watching: Watching) -> None:
        super().__init__()
        self.watching = watching

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watching.called(func, args)
        return func(*args, **(kwargs or {}))


class Tape(Watching):
    """Records the operations on tensors of any shape ``[*]`` while it is active.

    Args:
        inputs: tensors handed to every replay.
        varying: tensors whose content may differ at the next replay.
        undo: whether memory that existed before is saved when it is first written to, for :meth:`rewind`.

    Attributes:
        entries: the operations in their order.
        registers, storages: what they work on.
        varying: storages whose content may differ at the next replay.
        inputs: registers of the inputs.
        literals: storages of tensors made from Python values.
    """

    def __init__(self, inputs: Sequence[Tensor], varying: Sequence[Tensor], undo: bool) -> None:
        super().__init__()
        self.entries: list[Operation] = []
        self.registers: list[Geometry] = []
        self.storages: list[Storage] = []
        self._register_of: dict[tuple[Any, ...], int] = {}
        self._storage_of: dict[int, int] = {}
        self.literals: set[int] = set()
        self._undo = undo
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._drawn: list[tuple[torch.Generator, Tensor]] = []
        self.inputs = [self.register(tensor, given=True) for tensor in inputs]
        handed = {self.registers[register].storage for register in self.inputs}
        if len(handed) < len(inputs) or any(tensor.untyped_storage()._cdata in self._storage_of for tensor in varying):
            raise NotRecordable("inputs share memory with each other or with what varies: give copies")
        self.varying = {self.registers[self.register(tensor, given=True)].storage for tensor in [*inputs, *varying]}
        self.tainted = set(self.varying)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in _IGNORED:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "detach_":
            return func(*args, **kwargs)  # a matter of autograd alone
        if torch.Tag.inplace_view in func.tags or (name in _UNDECLARED_WRITES and args[5]):
            raise NotRecordable(f"`{func}` changes a tensor in a way that cannot be repeated, at {source_line()}")
        if name == "lift_fresh":
            return self._constant(func, args[0])
        known = [self.registers[self.register(t, given=True)].storage for t in leaves((args, kwargs), Tensor)]
        entry = Operation(func, shortcut(func, args, kwargs), self._marked(args), self._marked(kwargs), None)
        entry.reads = [] if name in _OF_SHAPE else [*dict.fromkeys(known)]
        entry.writes = self._written(func, args, kwargs)
        self._save(entry.writes, kwargs)
        result = func(*args, **kwargs)
        self._finish(entry, result, has_tensors=bool(known))
        return result

    def called(self, func: Any, args: Sequence[Any]) -> None:
        """Notice what reads values behind the back of the dispatcher.

        Raises:
            NotRecordable: the function sets `.data`.
        """
        if func in _TO_PYTHON:
            reads = [self.registers[self.register(tensor, given=True)].storage for tensor in leaves(args[:1], Tensor)]
            entry = Operation(_TO_PYTHON[func], func, [], {}, None, reads=reads)
            entry.decides, entry.site = "hands values to Python", source_line()
            self.entries.append(entry)
        if func == _SET_DATA:
            raise NotRecordable(f"setting `.data` of a tensor cannot be repeated, at {source_line()}")

    def _finish(self, entry: Operation, result: Any, has_tensors: bool) -> None:
        """Note what came out and what depends on it."""
        before = len(self.storages)
        produced = list(leaves(result, Tensor))
        new = [self.register(tensor, given=False) for tensor in produced if not self._knows(tensor)]
        entry.outputs = self._marked(result)
        entry.creates = list(range(before, len(self.storages)))
        entry.views = [r for r in new if not self.derivable(r)]
        entry.random = _RANDOM in entry.function.tags
        returns = entry.function._schema.returns
        if has_tensors and returns and not produced:
            entry.decides = "hands a value to Python"
        elif _SHAPES in entry.function.tags and self._selects(entry):
            entry.decides = "has a result whose shape depends on values"
        if entry.decides:
            entry.site = source_line()
        if not (entry.writes or entry.creates or entry.views or entry.random or entry.decides or entry.checks):
            return  # a view, which is made from its geometry where it is needed
        self.entries.append(entry)
        if spreads(entry, self.tainted):
            self.tainted.update(entry.writes, entry.creates)
            for storage in entry.writes:
                self.storages[storage].kept = None
            return
        for tensor in produced:
            memory = self.storages[self.registers[self.register(tensor, given=False)].storage]
            if memory.given is None and memory.kept is None:
                memory.kept = tensor.detach()

    def _constant(self, func: Any, tensor: Tensor) -> Tensor:
        """A tensor made from Python values: every replay gets a copy of its own of what it is now."""
        if self._knows(tensor):
            return tensor
        original = tensor.clone()
        self.literals.add(original.untyped_storage()._cdata)
        entry = Operation(func, torch.clone, [Register(self.register(original, given=True))], {}, None)
        entry.reads = [self.registers[entry.args[0].number].storage]
        self._finish(entry, tensor, has_tensors=True)
        return tensor

    # --- memory --------------------------------------------------------------------------------------------------------------

    def register(self, tensor: Tensor, *, given: bool) -> int:
        """The register of a tensor; memory met for the first time existed before if ``given``."""
        key = _key(tensor)
        if key in self._register_of:
            return self._register_of[key]
        index = self._register_of[key] = len(self.registers)
        storage = self._storage_of.get(key[0])
        if storage is None:
            storage = self._storage_of[key[0]] = len(self.storages)
            held = tensor.detach() if given else None
            self.storages.append(Storage(index, tensor.device, held, None, StorageWeakRef(tensor.untyped_storage())))
        offset, sizes = int(tensor.storage_offset()), tuple(tensor.shape)
        self.registers.append(Geometry(storage, offset, sizes, tensor.stride(), tensor.dtype))
        return index

    def derivable(self, register: int) -> bool:
        """Whether a register is its storage's anchor or can be had from it by `as_strided`."""
        geometry = self.registers[register]
        return geometry.dtype == self.registers[self.storages[geometry.storage].anchor].dtype

    def _knows(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._register_of

    def _marked(self, thing: Any) -> Any:
        """The same with registers in place of tensors."""
        if isinstance(thing, Tensor):
            return Register(self.register(thing, given=True))
        if isinstance(thing, (list, tuple)):
            return [self._marked(part) for part in thing]
        if isinstance(thing, dict):
            return {key: self._marked(part) for key, part in thing.items()}
        return thing

    def _written(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
        written: dict[int, None] = {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in leaves(value, Tensor):
                written[self.registers[self.register(tensor, given=True)].storage] = None
        return list(written)

    def _selects(self, entry: Operation) -> bool:
        """Whether the shape depends on values indeed: that of an `index` does if it selects by truth values."""
        if entry.function._overloadpacket is not torch.ops.aten.index:
            return True
        kinds = {self.registers[part.number].dtype for part in entry.args[1] if isinstance(part, Register)}
        return bool(kinds & {torch.bool, torch.uint8})

    # --- undoing -------------------------------------------------------------------------------------------------------------

    def _save(self, storages: Sequence[int], kwargs: dict[str, Any]) -> None:
        if not self._undo:
            return
        self._drawn += [(value, value.get_state()) for value in kwargs.values() if isinstance(value, torch.Generator)]
        for storage in storages:
            given = self.storages[storage].given
            if given is not None and storage not in self._saved:
                whole = whole_memory(given)
                self._saved[storage] = whole, whole.clone()

    def rewind(self) -> None:
        """Put back the content of all memory that existed before, and the generators that operations name."""
        for whole, saved in self._saved.values():
            whole.copy_(saved)
        for generator, state in reversed(self._drawn):
            generator.set_state(state)
        self._saved.clear()
        self._drawn.clear()


def spreads(entry: Operation, tainted: set[int]) -> bool:
    """Whether what an operation writes differs from replay to replay, given the memory that does."""
    return entry.random or not tainted.isdisjoint(entry.reads)


def leaves(thing: Any, kind: type[Leaf]) -> Iterator[Leaf]:
    """What is of a kind, in nested lists, tuples and dicts."""
    if isinstance(thing, kind):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from leaves(part, kind)
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from leaves(part, kind)


def whole_memory(tensor: Tensor) -> Tensor:
    """All bytes of the storage of a tensor ``[*]``: ``[bytes]`` uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def calling_frame() -> FrameType:
    """The innermost frame that belongs neither to torch nor to what watches operations."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame):
        frame = frame.f_back
    return frame


def _is_machinery(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in _RECORDERS or frame.f_code.co_filename.startswith(_TORCH)


def source_line() -> str:
    """``file:line`` of the calling frame."""
    frame = calling_frame()
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _key(tensor: Tensor) -> tuple[Any, ...]:
    try:
        address = tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError) as error:
        raise NotRecordable(f"a {tensor.layout} tensor has no memory that could be followed, at {source_line()}") from error
    if tensor.is_conj() or tensor.is_neg():
        raise NotRecordable(f"lazily conjugated numbers cannot be followed, at {source_line()}")
    return address, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


# --- the same operation by a shorter way -------------------------------------------------------------------------------------


class _Seen(Exception):
    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.call = function, args, kwargs


class _Probe(TorchDispatchMode):
    """Stops before the first operation and tells which it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Seen(func, args, kwargs or {})


_SHORTCUTS: dict[tuple[Any, ...], Callable[..., Any]] = {}
_BINDINGS = tuple(getattr(torch._C, name) for name in ("_VariableFunctions", "TensorBase", "_nn", "_linalg", "_special"))


def shortcut(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Torch's binding of the same name, if with these arguments it is this operation: it takes 0.7 of the time."""
    kind = (func, *map(_kind, args), *((name, _kind(value)) for name, value in kwargs.items()))
    found = _SHORTCUTS.get(kind)
    if found is None:
        name = func._schema.name.partition("::")[2]
        candidates = [getattr(module, name) for module in _BINDINGS if func.namespace == "aten" and hasattr(module, name)]
        fitting = (candidate for candidate in candidates if _leads_to(func, candidate, args, kwargs))
        found = _SHORTCUTS[kind] = next(fitting, func._op)
    return found


def _leads_to(func: Any, candidate: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    try:
        with _Probe():
            candidate(*args, **kwargs)
    except _Seen as seen:
        other, there, named = seen.call
        return other is func and _same(list(args), list(there)) and _same(kwargs, named)
    except (TypeError, ValueError, RuntimeError):
        return False  # the binding does not take these arguments
    return False


def _kind(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return (Tensor, value.ndim == 0) if isinstance(value, Tensor) else type(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and (one is other or _key(one) == _key(other))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other or one is other)
