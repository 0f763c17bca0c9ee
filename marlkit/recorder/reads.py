"""What a step reads of Python's state while it is recorded: attributes, items, variables of closures and of modules.

Objects tell when an attribute of theirs is read: while :class:`Reads` is active, `__getattribute__` of `nn.Module` and of the
classes of all other objects that the step comes to does so. Variables tell nothing, so that the functions that the step comes
to are looked at: the cells of their closures and, in code that is neither marlkit's nor a library's, the names that they use of
modules and classes.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial
from mmap import mmap
from multiprocessing.managers import BaseProxy
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.sharedctypes import SynchronizedBase
from types import CodeType, FunctionType, GetSetDescriptorType, MethodType, ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from marlkit.recorder.python_values import (
    ATOMS,
    HOOKS,
    HOOKS_OF_OPTIMIZERS,
    LIBRARIES,
    MISSING,
    TABLES,
    called,
    contents,
    differences,
    found_in,
    functions_of,
    is_container,
    is_internal,
    is_of_library,
    names_in,
    restore,
    same,
)
from marlkit.recorder.tape import NotRecordable

LARGEST = 10_000
"""Entries of the largest container and elements of the largest array that can be compared before each replay."""

UNWATCHED = (ContextVar, threading.local, ctypes.Structure.__mro__[-2], mmap, SharedMemory, SynchronizedBase, BaseProxy)
"""What holds another value in another context, or memory that another process or the language C may write."""

_OF_TORCH = frozenset(vars(nn.Module())) - {"training", *TABLES}
"""What torch keeps in every module for itself."""

_NOT_WHILE_STEPPING = frozenset(
    {"__init__", "__new__", "__init_subclass__", "__repr__", "__str__", "__getstate__", "__setstate__"}
)
"""Methods that Python calls by itself, but in no step."""


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
        of_user: whether it has come to code that is neither marlkit's nor a library's, or may do so.
    """

    def __init__(self, step: Callable[..., Any], parts: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.held: dict[int, Held] = {}
        self.attributes: dict[tuple[int, str], None] = {}
        self.variables: dict[tuple[int, str], Variable] = {}
        self.tensors: dict[int, Tensor] = {}
        self._step, self._optimizers = step, list(optimizers)
        self._parts = {id(part): part for part in parts}
        self._packages = {type(part).__module__.partition(".")[0] for part in self._parts.values()} - LIBRARIES - {"marlkit"}
        self.of_user = any(self.is_of_user(type(part).__module__) for part in self._parts.values())
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
        try:
            self._begin()
        except NotRecordable:
            self._unhook()
            raise
        return self

    def _begin(self) -> None:
        self.meet(self._step, "step", decides=False)
        for optimizer in self._optimizers:
            self.meet(optimizer, type(optimizer).__name__)
            # What is in the groups are numbers, which those who record look at, and parameters.
            self.meet(optimizer.param_groups, "param_groups", decides=False)
            self.meet(optimizer.state, "state", decides=False)
            for hooks in HOOKS_OF_OPTIMIZERS:
                self.meet(vars(optimizer)[hooks], f"{type(optimizer).__name__}'s hooks")
        self._looking = False

    def _unhook(self) -> None:
        self._looking = True
        for cls, own in self._hooked.items():
            if own is MISSING:
                del cls.__getattribute__
            else:
                setattr(cls, "__getattribute__", own)  # noqa: B010
        self._hooked.clear()

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._unhook()
        if self._problem is not None and kind is None:
            raise self._problem  # which the step has caught

    def is_of_user(self, module: Any) -> bool:
        """Whether a module is neither marlkit's nor a library's; a package that a component is from is no library."""
        if not isinstance(module, str):  # some types in C have none
            return False
        package = module.partition(".")[0]
        return package in self._packages or not (package == "marlkit" or is_of_library(module))

    def _hook(self, cls: type) -> None:
        """Let a class tell which attributes of its objects are read."""
        original: Any = cls.__getattribute__
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
            self._meet_class(type(owner), made=False)
        if name.startswith("__") or is_internal(type(owner), name) or (isinstance(owner, nn.Module) and name in _OF_TORCH):
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
            found = vars(base).get(name)
            for function in functions_of(found):
                self.look_at(function)
            if self.is_of_user(type(found).__module__) and hasattr(type(found), "__get__"):
                self.meet(found, f"{base.__name__}.{name}")

    # --- what is come to -----------------------------------------------------------------------------------------------------

    def meet(self, thing: Any, label: str, decides: bool = True) -> None:
        """Come to a value of any kind.

        Raises:
            NotRecordable: it is an iterator, or too large or of no kind to be compared before each replay.
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
            self.meet(thing.__func__, label, decides)
            self.meet(thing.__self__, type(thing.__self__).__name__, decides)
        elif isinstance(thing, partial):
            for part in (thing.func, thing.args, thing.keywords):
                self.meet(part, label, decides)
        elif isinstance(thing, type):
            self._meet_class(thing, made=not issubclass(thing, nn.Module))
        elif isinstance(thing, ModuleType):
            if self.is_of_user(thing.__name__):
                self._meet_space(thing)
        elif is_container(thing):
            self._meet_container(thing, label, decides)
        else:
            self._meet_object(thing, label, decides)

    def _meet_container(self, thing: Any, label: str, decides: bool) -> None:
        size = thing.size if isinstance(thing, np.ndarray) else len(thing) if isinstance(thing, Sized) else 0
        if size > LARGEST:
            self._refuse(f"it reads `{label}`, whose {size:,} entries are too many to be compared before each replay")
        try:
            before = contents(thing)
        except Exception as error:  # such as a value of OmegaConf's that is missing
            self._refuse(f"it reads `{label}`, which cannot be compared before each replay ({type(error).__name__})")
        self.held[id(thing)] = Held(thing, label, before, decides)
        if self.is_of_user(type(thing).__module__):  # of a subclass
            self._meet_class(type(thing), made=True)
            if hasattr(thing, "__dict__"):
                self.meet(vars(thing), label, decides)
        if isinstance(before, dict):
            for key, value in before.items():
                self.meet(value, f"{label}[{key!r}]" if isinstance(key, (str, int)) else label, decides)
        elif isinstance(before, list):
            for place, value in enumerate(before):
                self.meet(value, f"{label}[{place}]", decides)

    def _meet_object(self, thing: Any, label: str, decides: bool) -> None:
        cls = type(thing)
        self.of_user |= self.is_of_user(cls.__module__)
        if isinstance(thing, Iterator) and (cls.__module__ in ("builtins", "itertools", "_io") or not hasattr(thing, "__dict__")):
            self._refuse(f"it reads `{label}`, an iterator ({cls.__name__}), which a replay would not advance")
        if isinstance(thing, UNWATCHED):
            self._refuse(f"it reads `{label}`, a {cls.__name__}, which cannot be compared before each replay")
        for function in functions_of(thing):
            self.look_at(function, decides)
        is_module = isinstance(thing, nn.Module)
        known = is_of_library(cls.__module__) and not self.is_of_user(cls.__module__)
        if cls.__module__.startswith("marlkit.recorder") or (known and not is_module):
            return
        self.held[id(thing)] = Held(thing, label, contents(thing), decides=False)
        if is_module:
            for table in TABLES:
                held = vars(thing)[table]
                self.held.setdefault(id(held), Held(held, label, dict(held), decides=False))
            for hooks in HOOKS:
                self.meet(vars(thing)[hooks], f"{label}'s hooks")
        try:
            self._hook(cls)
        except (TypeError, AttributeError):  # a class that cannot be changed
            for name in contents(thing):
                self._note(thing, name, "")
        if self.is_of_user(cls.__module__):
            self._meet_class(cls, made=False)  # `type(self).name`, or `cls.name` in a class method, tells nothing
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
        self.of_user |= self.is_of_user(module)
        self.held[id(function)] = Held(function, function.__name__, contents(function), decides and bool(vars(function)))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self.held and not (known and not any(map(_is_function, contents(cell)))):
                self.held[id(cell)] = Held(cell, name, contents(cell), decides)
                for value in contents(cell):
                    self.meet(value, called(value, name), decides)
        if known:
            return
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()):
            self.meet(value, function.__name__, decides)
        if code not in self._code and self.is_of_user(module):
            self._code.add(code)
            self._use(set(names_in(code)), function.__globals__, module)

    def _use(self, names: set[str], space: dict[str, Any], module: str) -> None:
        """Names that a function of the user's uses: of its own module, or of a module or class that it has from somewhere."""
        if "globals" in names and "globals" not in space:
            self._refuse(f"it uses `globals()` of {module}, which cannot be compared before each replay: name the variable")
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
        if all(owner is not other for other, _, _ in self._spaces):
            self._spaces.append((owner, space, owner.__name__))
        for name in self._names & space.keys():
            self._variable(owner, space, name, owner.__name__)

    def _meet_class(self, cls: type, made: bool) -> None:
        """Come to a class; if the step may have ``made`` objects of it, which tell nothing, all its functions are looked at."""
        of_class: type = type(cls)
        for base in (*cls.__mro__, *of_class.__mro__):
            if not self.is_of_user(base.__module__):
                continue
            self.of_user = True
            self._meet_space(base)
            for value in vars(base).values() if made or issubclass(base, type) else ():
                for function in functions_of(value):
                    self.look_at(function)

    def _variable(self, owner: Any, space: Mapping[str, Any], name: str, label: str) -> None:
        value, key = space[name], (id(owner), name)
        if key in self.variables or name.startswith("__"):
            return
        for function in functions_of(value):
            self.look_at(function)
        if not isinstance(value, (ModuleType, GetSetDescriptorType, staticmethod, classmethod, property, cached_property)):
            self._met.setdefault(id(owner), owner)
            self.variables[key] = Variable(owner, space, name, f"{label}.{name}", value)
        self.meet(value, called(value, f"{label}.{name}"))

    # --- what the step itself has changed ------------------------------------------------------------------------------------

    def changed(self) -> list[str]:
        """The places that hold something else than when the step came to them."""
        found = [held.label + place for held in self.held.values() for place in differences(held.thing, held.before)]
        return found + [v.label for v in self.variables.values() if not same(v.space.get(v.name, MISSING), v.before)]

    def put_back(self) -> None:
        """Undo what :meth:`changed` tells."""
        for held in self.held.values():
            if differences(held.thing, held.before):
                restore(held.thing, held.before)
        for variable in self.variables.values():
            if variable.space.get(variable.name, MISSING) is variable.before:
                continue
            if isinstance(variable.owner, dict):
                variable.owner[variable.name] = variable.before
            else:
                setattr(variable.owner, variable.name, variable.before)


def _is_function(value: Any) -> bool:
    return isinstance(value, (FunctionType, MethodType, partial))
