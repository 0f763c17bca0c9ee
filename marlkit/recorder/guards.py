"""Whether what a recorded step has read of Python's state is still what it was.

Looking takes a few microseconds: the comparisons are by identity, and written out as one expression.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marlkit.recorder.python_values import (
    HOOKS,
    MISSING,
    SEQUENCES,
    TABLES,
    contents,
    differences,
    found_in,
    is_code,
    is_container,
    is_open,
    same,
)
from marlkit.recorder.reads import Held, Reads

_SOURCE = """
def same():
    try:
        return {}
    except (AttributeError, KeyError, ValueError):
        return False
"""
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class _Guard(NamedTuple):
    """One comparison, of a value (``now``) or of all that a container holds (``places``).

    Attributes:
        label: what to call what is compared.
        expected: the name under which the value is known that is compared with.
        now: what is there now.
        places: where a container holds something else than it did, as suffixes of the label.
    """

    label: str
    expected: str
    now: Callable[[], Any]
    places: Callable[[], list[str]] | None = None


class Guards:
    """Compares what was read with what is there.

    Args:
        reads: what was read while a step was recorded.
        tensors: those whose memory the recording works on.
        optimizers: those that the step uses.
    """

    def __init__(self, reads: Reads, tensors: Iterable[Tensor], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._names: dict[str, Any] = {}
        self._guards: list[_Guard] = []
        self._texts: list[str] = []
        self._tables: list[dict[Any, Any]] = []
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[Collection[Any]] = []
        for owner, name in reads.attributes:
            self._watch_attribute(reads, reads.held[owner], name)
        for variable in reads.variables.values():
            self._watch_entry(variable.space, variable.name, variable.label)
        modules = [held.thing for held in reads.held.values() if isinstance(held.thing, nn.Module)]
        tables = {id(vars(module)[table]) for module in modules for table in (*TABLES, *HOOKS)}
        for held in reads.held.values():
            if held.decides:
                self._watch_contents(held, id(held.thing) in tables)
        for optimizer in optimizers:
            self._watch_state(optimizer)
        self._tensors = list({id(tensor): tensor for tensor in chain(reads.tensors.values(), tensors)}.values())
        self._plain = [tensor for tensor in self._tensors if not isinstance(tensor, nn.Parameter)]
        self._lie = self._lie_now()
        self._sizes, self._inside = self._sizes_now(), self._inside_now()
        text = " and ".join(self._texts) or "True"
        exec(compile(_SOURCE.format(text), "<guards>", "exec"), self._names)
        self._same: Callable[[], bool] = self._names["same"]

    def hold(self) -> bool:
        """Whether everything is as it was."""
        return self._identical() or next(self.changed(), None) is None

    def changed(self) -> Iterator[str]:
        """What is not as it was, by name."""
        for guard in self._guards:
            for place in self._places(guard):
                yield guard.label + place
        if self._lie_now() != self._lie:
            yield "a tensor's memory, shape or `requires_grad`"

    def _identical(self) -> bool:
        return (
            self._same()
            and self._sizes_now() == self._sizes
            and all(map(is_, self._inside_now(), self._inside))
            and self._lie_now() == self._lie
        )

    def _sizes_now(self) -> list[int]:
        return [*map(len, self._tables), *map(len, self._dicts), *map(len, self._lists)]

    def _inside_now(self) -> list[Any]:
        tables, dicts = map(dict.values, self._tables), map(dict.values, self._dicts)
        return [*chain.from_iterable(chain(tables, dicts, self._dicts, self._lists))]

    def _lie_now(self) -> list[Any]:
        """Where the tensors lie, how (of parameters only how large), and whether they take part in gradients."""
        tensors, plain = self._tensors, self._plain
        where = [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors), *map(_REQUIRES_GRAD, tensors)]
        return [*where, *map(Tensor.size, plain), *map(Tensor.stride, plain)]

    def _places(self, guard: _Guard) -> list[str]:
        if guard.places is not None:
            return guard.places()
        now = guard.now()
        if not same(now, self._names[guard.expected]):
            return [""]
        self._names[guard.expected] = now  # equal to what was there, and from now on found by identity
        return []

    # --- what is compared ------------------------------------------------------------------------------------------------

    def _watch_attribute(self, reads: Reads, held: Held, name: str) -> None:
        owner = held.thing
        space, value = found_in(owner, name)
        if space is None:
            # A method, or nothing: what an instance would have in its place. Libraries do not play such tricks.
            if not is_code(owner, name) or reads.is_of_user(type(owner).__module__):
                own = vars(owner) if hasattr(owner, "__dict__") else {}
                now = partial(_entry, own, name)
                self._add(f"{name!r} not in {self._name(own)}", _Guard(f"{held.label}.{name}", self._name(MISSING), now))
        elif isinstance(space, dict):
            self._watch_entry(space, name, f"{held.label}.{name}")
        else:
            expected = self._name(value)
            now = partial(getattr, owner, name, MISSING)
            self._add(f"{self._name(owner)}.{name} is {expected}", _Guard(f"{held.label}.{name}", expected, now))

    def _watch_entry(self, space: Mapping[str, Any], name: str, label: str) -> None:
        expected = self._name(space[name])
        self._add(f"{self._name(space)}[{name!r}] is {expected}", _Guard(label, expected, partial(_entry, space, name)))

    def _watch_contents(self, held: Held, table: bool = False) -> None:
        """Watch what a container holds; in a table, the names under which it does never change."""
        thing, before = held.thing, contents(held.thing)
        places = partial(differences, thing, before)
        if isinstance(thing, (tuple, frozenset)):
            return  # what it holds it holds for ever
        if isinstance(thing, CellType) and before:
            self._texts.append(f"{self._name(thing)}.cell_contents is {self._name(before[0])}")
        elif isinstance(thing, dict):
            (self._tables if table else self._dicts).append(thing)
        elif isinstance(thing, SEQUENCES):
            self._lists.append(thing)
        else:
            self._texts.append(f"not {self._name(places)}()")
        self._guards.append(_Guard(held.label, "", lambda: MISSING, places))

    def _watch_state(self, optimizer: torch.optim.Optimizer) -> None:
        """That of each parameter; parameters that are met later are added behind."""
        label, known = f"{type(optimizer).__name__}.state", list(optimizer.state.values())

        def kept() -> bool:
            return len(optimizer.state) >= len(known) and all(map(is_, optimizer.state.values(), known))

        self._texts.append(f"{self._name(kept)}()")
        self._guards.append(_Guard(label, "", lambda: MISSING, lambda: [] if kept() else [""]))
        for state in known:
            self._watch_contents(Held(state, label, None, decides=True), table=True)

    def _add(self, text: str, guard: _Guard) -> None:
        self._texts.append(text)
        self._guards.append(guard)

    def _name(self, value: Any) -> str:
        name = f"v{len(self._names)}"
        self._names[name] = value
        return name


def _entry(space: Mapping[str, Any], name: str) -> Any:
    return space.get(name, MISSING)


# --- the step itself ---------------------------------------------------------------------------------------------------------


class _Function(NamedTuple):
    code: CodeType
    cells: list[Any]
    rest: list[Any]


class _Method(NamedTuple):
    function: Any
    owner: Any


class _Kind(NamedTuple):
    """A tensor of which nothing is read but its kind."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class _Parts(NamedTuple):
    """A container, or an object whose attributes are looked at if it is another one than then."""

    cls: type
    names: list[Any]
    values: list[Any]
    itself: Any = MISSING


def pattern(thing: Any, memory: Collection[int], depth: int = 6) -> Any:
    """What a function, or what it has in its closure, has to look like to do what the present one does; see :func:`fits`.

    Args:
        thing: the function, or a part of its closure.
        memory: addresses of the storages that the recorded operations work on.
        depth: up to which objects may be others that hold the same.
    """
    inner = partial(pattern, memory=memory, depth=depth - 1)
    if isinstance(thing, Tensor):
        if thing.untyped_storage()._cdata in memory:
            return thing
        return _Kind(thing.shape, thing.dtype, thing.device, thing.requires_grad)
    if isinstance(thing, FunctionType):
        return _Function(thing.__code__, list(map(inner, _cells(thing))), list(map(inner, _rest(thing))))
    if isinstance(thing, MethodType):
        return _Method(inner(thing.__func__), inner(thing.__self__))
    held = is_container(thing) or isinstance(thing, (partial, TensorDictBase))
    if held or (is_open(thing) and depth > 0):
        names, values = _parts(thing)
        return _Parts(type(thing), names, list(map(inner, values)), MISSING if held else thing)
    return thing


def fits(now: Any, then: Any) -> bool:
    """Whether a function, or what it has in its closure, looks like a :func:`pattern`.

    Functions, methods and containers may be others, and so may objects, if they hold the same. An object that is the same is
    taken for unchanged: what is read of it is compared by :class:`Guards`.
    """
    if isinstance(then, _Function):
        if type(now) is not FunctionType or now.__code__ is not then.code:
            return False
        return _all_fit(_cells(now), then.cells) and _all_fit(_rest(now), then.rest)
    if isinstance(then, _Method):
        return type(now) is MethodType and fits(now.__func__, then.function) and fits(now.__self__, then.owner)
    if isinstance(then, _Kind):
        return isinstance(now, Tensor) and _Kind(now.shape, now.dtype, now.device, now.requires_grad) == then
    if isinstance(then, _Parts):
        if now is then.itself:
            return True
        if type(now) is not then.cls:
            return False
        names, values = _parts(now)
        return len(names) == len(then.names) and all(map(same, names, then.names)) and _all_fit(values, then.values)
    return same(now, then)


def misfits(now: Any, then: Any, name: str = "step") -> list[str]:
    """What of a function does not look like a :func:`pattern`, by the names of variables."""
    if isinstance(then, _Function) and isinstance(now, FunctionType) and now.__code__ is then.code:
        pairs = zip(then.code.co_freevars, _cells(now), then.cells, strict=False)
        return [place for variable, one, other in pairs for place in misfits(one, other, f"{variable}` of `{now.__name__}")]
    return [] if fits(now, then) else [name]


def _all_fit(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(map(fits, now, then))


def _cells(function: FunctionType) -> list[Any]:
    return [part for cell in function.__closure__ or () for part in contents(cell)]


def _rest(function: FunctionType) -> list[Any]:
    return [function.__defaults__, function.__kwdefaults__, function.__dict__ or None]


def _parts(thing: Any) -> tuple[list[Any], list[Any]]:
    """Names and values of what a container or an object holds."""
    if isinstance(thing, TensorDictBase):
        held = dict(thing.items(include_nested=True, leaves_only=True))
        return [thing.batch_size, *held], list(held.values())
    if isinstance(thing, partial):
        return [], [thing.func, thing.args, thing.keywords]
    held = contents(thing)
    if isinstance(held, dict):
        return list(held), list(held.values())
    if isinstance(held, list):
        return [], held
    return [(held.shape, str(held.dtype), held.tobytes()) if isinstance(held, np.ndarray) else held], []
