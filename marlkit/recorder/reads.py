"""What a step reads of Python's state while it is recorded: attributes, items, variables of closures and of modules.

Reads of attributes tell of themselves: while :class:`Reads` is active, so do `nn.Module` and the classes of all other objects that
the step comes to. Reads of variables do not, so that the functions that the step comes to are looked at: the cells of their
closures and, in code that is not marlkit's or a known library's, the names that they use of modules and classes.
"""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import _lru_cache_wrapper, cache, cached_property, partial
from types import (
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from marlkit.recorder.tape import NotRecordable

MISSING = object()
"""In place of what is not there."""

ATOMS = (bool, int, float, complex, str, bytes, type(None), Enum, np.generic, torch.dtype, torch.device, torch.Size, range, slice)
"""Values without parts, which are the same if they look the same."""

LARGEST = 10_000
"""Entries of the largest container and elements of the largest array that can be compared before each replay."""

_SEQUENCES = (list, tuple, deque, set, frozenset)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_BAGS = (SimpleNamespace, argparse.Namespace)
_LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"lightning", "numpy", "tensordict", "torch", "torchrl", "vmas"}
_INSTALLED = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
_TABLES = ("_parameters", "_buffers", "_modules")
_OF_TORCH = frozenset(vars(nn.Module())) - {"training", *_TABLES}
"""What torch keeps in every module for itself."""

_NOT_WHILE_STEPPING = frozenset(
    {"__init__", "__new__", "__init_subclass__", "__repr__", "__str__", "__getstate__", "__setstate__"}
)


@dataclass
class Held:
    """An object, a container or a variable that the step has come to.

    Attributes:
        thing: it.
        label: what to call it.
        before: its :func:`contents` at that time.
        decides: whether all that it holds decides what the step does; of an object, only what was read does.
    """

    thing: Any
    label: str
    before: Any
    decides: bool


@dataclass
class Variable:
    """A name of a module or a class that a function uses.

    Attributes:
        owner: the module or class, or the namespace of a function's module.
        space: its namespace.
        name: in there.
        label: what to call it.
        before: what it was when the step came to it.
    """

    owner: Any
    space: Mapping[str, Any]
    name: str
    label: str
    before: Any


class Reads:
    """Notices what is read of Python's state.

    Args:
        step: will be run. Functions and containers that it has in its closure may be new ones at each step: what they hold is
            not to be compared, but see :func:`marlkit.recorder.guards.pattern`.
        parts: modules that it may come to by ways that cannot be seen.
        optimizers: likewise.

    Attributes:
        held: what the step has come to, by identity.
        attributes: which attributes of these it has read: the owner's identity and the name.
        variables: which variables of modules and classes it may have read.
        tensors: those that it has come to, by identity.
    """

    def __init__(self, step: Callable[..., Any], parts: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.held: dict[int, Held] = {}
        self.attributes: dict[tuple[int, str], None] = {}
        self.variables: dict[tuple[int, str], Variable] = {}
        self.tensors: dict[int, Tensor] = {}
        self._step, self._optimizers = step, list(optimizers)
        self._parts = {id(part): part for part in parts}
        self._packages = {type(part).__module__.partition(".")[0] for part in self._parts.values()} - _LIBRARIES - {"marlkit"}
        self._names: set[str] = set()
        self._spaces: list[tuple[Any, Mapping[str, Any], str]] = []
        self._met: dict[int, Any] = {}  # kept alive, so that an identity means one object
        self._code: set[CodeType] = set()
        self._hooked: dict[type, Any] = {}
        self._looking = True
        self._thread = 0
        self._problem: NotRecordable | None = None

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        self._hook(nn.Module)
        self.meet(self._step, "step", decides=False)
        for optimizer in self._optimizers:
            self.meet(optimizer, type(optimizer).__name__)
            # What is in the groups are numbers, which those who record look at, and parameters.
            self.meet(optimizer.param_groups, "param_groups", decides=False)
            self.meet(optimizer.state, "state", decides=False)
        self._looking = False
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        for cls, own in self._hooked.items():
            if own is MISSING:
                del cls.__getattribute__
            else:
                setattr(cls, "__getattribute__", own)  # noqa: B010
        self._hooked.clear()
        self._looking = True
        if self._problem is not None and kind is None:
            raise self._problem  # which the step has caught

    def is_of_user(self, module: str) -> bool:
        """Whether a module is neither marlkit's nor a library's; a package that a component is from is no library."""
        package = module.partition(".")[0]
        return package in self._packages or not (package == "marlkit" or is_of_library(module))

    def _hook(self, cls: type) -> None:
        """Let a class tell which attributes of its objects are read."""
        original: Callable[[Any, str], Any] = cls.__getattribute__
        if any(vars(hooked)["__getattribute__"] is original for hooked in self._hooked):
            return

        def telling(owner: Any, name: str) -> Any:
            self._read(owner, name)
            return original(owner, name)

        own = vars(cls).get("__getattribute__", MISSING)
        setattr(cls, "__getattribute__", telling)  # noqa: B010
        self._hooked[cls] = own

    # --- attributes ----------------------------------------------------------------------------------------------------------

    def _read(self, owner: Any, name: str) -> None:
        key = id(owner), name
        if self._looking or key in self.attributes or threading.get_ident() != self._thread:
            return
        if key[0] not in self.held and key[0] not in self._parts:
            return  # made by the step itself
        self._looking = True
        try:
            self.meet(owner, type(owner).__name__)
            self._note(owner, name, sys._getframe(2).f_globals.get("__name__", ""))
        finally:
            self._looking = False

    def _note(self, owner: Any, name: str, reader: str) -> None:
        """Note an attribute that code of the module ``reader`` reads."""
        if name == "__dict__" and not is_of_library(reader):
            for each in contents(owner):
                self._note(owner, each, reader)
        if name == "__class__":
            self.meet(type(owner), type(owner).__name__)
        if name.startswith("__") or (isinstance(owner, nn.Module) and name in _OF_TORCH):
            return
        self.attributes[id(owner), name] = None
        value = found_in(owner, name)[1]
        if value is MISSING:
            self._methods(type(owner), name)
        else:
            own = isinstance(owner, nn.Module) or not isinstance(value, nn.Module)
            self.meet(value, f"{self.held[id(owner)].label}.{name}" if own else type(value).__name__)

    def _methods(self, cls: type, name: str) -> None:
        """All definitions of a method or property, since one may call those above."""
        for base in cls.__mro__:
            for function in _functions_of(vars(base).get(name)):
                self.look_at(function)

    # --- what is come to -----------------------------------------------------------------------------------------------------

    def meet(self, thing: Any, label: str, decides: bool = True) -> None:
        """Come to a value of any kind.

        Raises:
            NotRecordable: it is an iterator, or too large to be compared before each replay.
        """
        if isinstance(thing, ATOMS) or id(thing) in self._met:
            return
        self._met[id(thing)] = thing
        if isinstance(thing, Tensor):
            if decides:
                self.tensors[id(thing)] = thing
        elif isinstance(thing, FunctionType):
            self.look_at(thing, decides)
        elif isinstance(thing, MethodType):
            self.look_at(thing.__func__, decides)
            self.meet(thing.__self__, type(thing.__self__).__name__, decides)
        elif isinstance(thing, partial):
            for part in (thing.func, thing.args, thing.keywords):
                self.meet(part, label, decides)
        elif isinstance(thing, type):
            self._meet_class(thing)
        elif isinstance(thing, ModuleType):
            if self.is_of_user(thing.__name__):
                self._meet_space(thing)
        elif is_container(thing):
            self._meet_container(thing, label, decides)
        else:
            self._meet_object(thing, label, decides)

    def _meet_container(self, thing: Any, label: str, decides: bool) -> None:
        size = thing.size if isinstance(thing, np.ndarray) else len(thing) if isinstance(thing, (dict, *_SEQUENCES)) else 0
        if size > LARGEST:
            self._refuse(f"it reads `{label}`, whose {size:,} entries are too many to be compared before each replay")
        before = contents(thing)
        self.held[id(thing)] = Held(thing, label, before, decides)
        if isinstance(thing, (dict, *_BAGS)):
            for key, value in before.items():
                self.meet(value, f"{label}[{key!r}]" if isinstance(key, (str, int)) else label, decides)
        elif isinstance(thing, _SEQUENCES):
            for place, value in enumerate(before):
                self.meet(value, f"{label}[{place}]", decides)

    def _meet_object(self, thing: Any, label: str, decides: bool) -> None:
        cls = type(thing)
        if isinstance(thing, Iterator) and (cls.__module__ in ("builtins", "itertools", "_io") or not hasattr(thing, "__dict__")):
            self._refuse(f"it reads `{label}`, an iterator ({cls.__name__}), which a replay would not advance")
        for function in _functions_of(thing):
            self.look_at(function, decides)
        is_module = isinstance(thing, nn.Module)
        known = is_of_library(cls.__module__) and not self.is_of_user(cls.__module__)
        if cls.__module__.startswith("marlkit.recorder") or (known and not is_module):
            return
        self.held[id(thing)] = Held(thing, label, contents(thing), decides=False)
        if is_module:
            for table in _TABLES:
                held = vars(thing)[table]
                self.held.setdefault(id(held), Held(held, label, dict(held), decides=False))
        try:
            self._hook(cls)
        except TypeError:  # a class that cannot be changed
            for name in contents(thing):
                self._note(thing, name, "")
        if self.is_of_user(cls.__module__):
            for base in cls.__mro__:
                for name in vars(base).keys() - _NOT_WHILE_STEPPING if self.is_of_user(base.__module__) else ():
                    if name.startswith("__"):
                        self._methods(base, name)

    def _refuse(self, reason: str) -> None:
        self._problem = self._problem or NotRecordable(reason)
        raise self._problem

    # --- functions -----------------------------------------------------------------------------------------------------------

    def look_at(self, function: FunctionType, decides: bool = True) -> None:
        """Come to all that a function reads of variables: cells, defaults, and of a user's function names.

        Args:
            function: it.
            decides: whether what its cells hold is to be compared; that of functions made anew for each step is not.
        """
        if id(function) in self.held:
            return
        code, module = function.__code__, function.__globals__.get("__name__", "")
        known = is_of_library(module) and not self.is_of_user(module)
        self.held[id(function)] = Held(function, function.__name__, contents(function), decides and bool(vars(function)))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self.held and not (known and not any(map(_is_function, contents(cell)))):
                self.held[id(cell)] = Held(cell, name, contents(cell), decides)
                for value in contents(cell):
                    self.meet(value, _called(value, name), decides)
        if known:
            return
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()):
            self.meet(value, function.__name__, decides)
        if code not in self._code and self.is_of_user(module):
            self._code.add(code)
            self._use(set(_names_in(code)), function.__globals__, module)

    def _use(self, names: set[str], space: dict[str, Any], module: str) -> None:
        """Names that a function of the user's uses: of its own module, or of a module or class that it has from somewhere."""
        for name in names:
            if name in space:
                self._variable(space, space, name, module)
            elif name in sys.modules:
                self.meet(sys.modules[name], name)
        new = names - self._names
        self._names |= new
        for owner, other, label in list(self._spaces):
            for name in new & other.keys():
                self._variable(owner, other, name, label)

    def _meet_space(self, owner: Any) -> None:
        """A module or a class whose attributes functions may use."""
        space = vars(owner)
        self._spaces.append((owner, space, owner.__name__))
        for name in self._names & space.keys():
            self._variable(owner, space, name, owner.__name__)

    def _meet_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if self.is_of_user(base.__module__):
                self._meet_space(base)
                # One that is made by the step itself cannot be told from others.
                for value in vars(base).values() if not issubclass(cls, nn.Module) else ():
                    for function in _functions_of(value):
                        self.look_at(function)

    def _variable(self, owner: Any, space: Mapping[str, Any], name: str, label: str) -> None:
        value, key = space[name], (id(owner), name)
        if key in self.variables or name.startswith("__"):
            return
        for function in _functions_of(value):
            self.look_at(function)
        if not isinstance(value, (ModuleType, GetSetDescriptorType, staticmethod, classmethod, property, cached_property)):
            self._met.setdefault(id(owner), owner)
            self.variables[key] = Variable(owner, space, name, f"{label}.{name}", value)
        self.meet(value, _called(value, f"{label}.{name}"))

    # --- what the step itself has changed ------------------------------------------------------------------------------------

    def changed(self) -> list[str]:
        """The places that hold something else than when the step came to them."""
        found = [held.label + place for held in self.held.values() for place in differences(held.thing, held.before)]
        return found + [v.label for v in self.variables.values() if not same(v.space.get(v.name, MISSING), v.before)]

    def put_back(self) -> None:
        """Undo what :meth:`changed` tells."""
        for held in self.held.values():
            if differences(held.thing, held.before):
                _restore(held.thing, held.before)
        for variable in self.variables.values():
            if variable.space.get(variable.name, MISSING) is variable.before:
                continue
            if isinstance(variable.owner, dict):
                variable.owner[variable.name] = variable.before
            else:
                setattr(variable.owner, variable.name, variable.before)


# --- values ------------------------------------------------------------------------------------------------------------------


def contents(thing: Any) -> Any:
    """What a thing holds, as a container of its own."""
    if isinstance(thing, dict):
        return dict(thing)
    if isinstance(thing, _SEQUENCES):
        return list(thing)
    if isinstance(thing, CellType):
        try:
            return [thing.cell_contents]
        except ValueError:
            return []
    if isinstance(thing, FunctionType):
        return dict(vars(thing))
    if isinstance(thing, np.ndarray):
        return thing.copy()
    if isinstance(thing, _GENERATORS):
        return _state(thing)
    own = getattr(thing, "__dict__", {})
    return {**own, **{name: getattr(thing, name) for name in _slots(type(thing)) if hasattr(thing, name)}}


def differences(thing: Any, before: Any) -> list[str]:
    """Where a thing holds something else than ``before``, each as a suffix of its name."""
    now = contents(thing)
    if isinstance(thing, np.ndarray):
        return [] if now.shape == before.shape and now.dtype == before.dtype and now.tobytes() == before.tobytes() else [""]
    if isinstance(thing, _GENERATORS):
        return [] if now == before else [""]
    if isinstance(now, list):
        return [] if len(now) == len(before) and all(map(same, now, before)) else [""]
    names = [name for name in {**before, **now} if not same(now.get(name, MISSING), before.get(name, MISSING))]
    if isinstance(thing, dict):
        return [f"[{name!r}]" if isinstance(name, (str, int)) else "" for name in names]
    return [f".{name}" for name in names if not isinstance(_of_class(type(thing), name), cached_property)]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or atoms that look the same, or tuples of such."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple) and not isinstance(one, torch.Size):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, ATOMS) and repr(one) == repr(other)


def found_in(owner: Any, name: str) -> tuple[Any, Any]:
    """An attribute that no code computes: the dict that it stands in (the owner itself for slots and classes), and its value."""
    inherited = _of_class(type(owner), name)
    if isinstance(inherited, MemberDescriptorType):
        return owner, inherited.__get__(owner) if hasattr(owner, name) else MISSING
    if hasattr(type(inherited), "__set__"):
        return None, MISSING
    own = getattr(owner, "__dict__", {})
    for table in (own, *(own[table] for table in _TABLES if isinstance(owner, nn.Module) and table in own)):
        if name in table:
            return table, table[name]
    if inherited is MISSING or hasattr(type(inherited), "__get__"):
        return None, MISSING
    return owner, inherited


def is_code(owner: Any, name: str) -> bool:
    """Whether an attribute is a method, a property or the like."""
    return hasattr(type(_of_class(type(owner), name)), "__get__")


def is_container(thing: Any) -> bool:
    """Whether a thing is looked at with all that it holds."""
    return isinstance(thing, (dict, *_SEQUENCES, np.ndarray, *_GENERATORS, *_BAGS)) and not isinstance(thing, ATOMS)


def is_open(thing: Any) -> bool:
    """Whether a thing is an object of a class of marlkit's or the user's that is no module, so that others may be made like it."""
    cls = type(thing)
    known = is_of_library(cls.__module__) or cls.__module__.startswith("marlkit.recorder")
    return hasattr(thing, "__dict__") and not known and not isinstance(thing, (type, nn.Module))


@cache
def is_of_library(module: str) -> bool:
    """Whether a module is one of Python's, or installed: variables of these are taken to stay what they are."""
    package = module.partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in _LIBRARIES or file.startswith(_INSTALLED)


@cache
def _slots(cls: type) -> list[str]:
    return sorted({name for base in cls.__mro__ for name, entry in vars(base).items() if isinstance(entry, MemberDescriptorType)})


def _of_class(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), MISSING)


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions behind a function, a method of any kind or a property."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _functions_of(value.__func__)
    elif isinstance(value, property):
        yield from _functions_of(value.fget)
    elif isinstance(value, cached_property):
        yield from _functions_of(value.func)
    elif isinstance(value, _lru_cache_wrapper):
        yield from _functions_of(value.__wrapped__)


def _is_function(value: Any) -> bool:
    return isinstance(value, (FunctionType, MethodType, partial))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _called(value: Any, name: str) -> str:
    """An object is called by its class, everything else by where it was found."""
    return name if isinstance(value, (*ATOMS, Tensor, dict, *_SEQUENCES, np.ndarray)) else type(value).__name__


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return pickle.dumps(generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else generator)


def _restore(thing: Any, before: Any) -> None:
    """Let a thing hold what it held before."""
    if isinstance(thing, CellType):
        if before:
            thing.cell_contents = before[0]
    elif isinstance(thing, np.ndarray):
        thing[...] = before
    elif isinstance(thing, random.Random):
        thing.setstate(before)
    elif isinstance(thing, np.random.RandomState):
        thing.set_state(pickle.loads(before))
    elif isinstance(thing, np.random.Generator):
        thing.bit_generator.state = pickle.loads(before).bit_generator.state
    elif isinstance(thing, (list, deque, dict, set)):
        thing.clear()
        (thing.extend if isinstance(thing, (list, deque)) else thing.update)(before)
    elif not isinstance(thing, (tuple, frozenset)):
        own = getattr(thing, "__dict__", {})
        for name in own.keys() - before.keys():
            del own[name]
        for name, value in before.items():
            if isinstance(_of_class(type(thing), name), MemberDescriptorType):
                object.__setattr__(thing, name, value)
            else:
                own[name] = value
