"""What Python holds: what a thing consists of, where it differs from before, and whose it is."""

from __future__ import annotations

import argparse
import pickle
import random
import sys
import sysconfig
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence, Set
from enum import Enum
from functools import _lru_cache_wrapper, cache, cached_property
from pathlib import Path
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

MISSING = object()
"""In place of what is not there."""

ATOMS = (bool, int, float, complex, str, bytes, type(None), Enum, np.generic, torch.dtype, torch.device, torch.Size, range, slice)
"""Values without parts, which are the same if they look the same."""


SEQUENCES = (list, tuple, deque, set, frozenset)
BUFFERS = (bytearray, memoryview, array)
COLLECTIONS = (Mapping, Sequence, Set)
"""Of a library, such as OmegaConf's, `UserDict` or `ChainMap`; those of a user tell what is read of them."""
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
BAGS = (SimpleNamespace, argparse.Namespace)
LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"lightning", "numpy", "tensordict", "torch", "torchrl", "vmas"}
_STANDARD = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
TABLES = ("_parameters", "_buffers", "_modules")
"""Where a module of torch holds what it does not hold in its own dict."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOKS_OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def contents(thing: Any) -> Any:
    """What a thing holds, as a container of its own."""
    if isinstance(thing, dict):
        return dict(thing)
    if isinstance(thing, SEQUENCES):
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
    if isinstance(thing, GENERATORS):
        return _state(thing)
    if isinstance(thing, BUFFERS):
        return thing.tobytes() if not isinstance(thing, bytearray) else bytes(thing)
    if is_collection(thing):
        return dict(thing) if isinstance(thing, Mapping) else list(thing)
    own = getattr(thing, "__dict__", {})
    return {**own, **{name: getattr(thing, name) for name in _slots(type(thing)) if hasattr(thing, name)}}  # type: ignore[arg-type]


def differences(thing: Any, before: Any) -> list[str]:
    """Where a thing holds something else than ``before``, each as a suffix of its name."""
    now = contents(thing)
    if isinstance(thing, np.ndarray):
        return [] if now.shape == before.shape and now.dtype == before.dtype and now.tobytes() == before.tobytes() else [""]
    if isinstance(thing, (*GENERATORS, *BUFFERS)):
        return [] if now == before else [""]
    if isinstance(now, list):
        return [] if len(now) == len(before) and all(map(same, now, before)) else [""]
    names = [name for name in {**before, **now} if not same(now.get(name, MISSING), before.get(name, MISSING))]
    if isinstance(thing, dict) or is_collection(thing):
        return [f"[{name!r}]" if isinstance(name, (str, int)) else "" for name in names]
    cls = type(thing)
    return [f".{name}" for name in names if not (is_internal(cls, name) or isinstance(_of_class(cls, name), cached_property))]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same object or method, or atoms that look the same, or tuples of such."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple) and not isinstance(one, torch.Size):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, MethodType):
        return bool(one == other)
    return isinstance(one, ATOMS) and repr(one) == repr(other)


def found_in(owner: Any, name: str) -> tuple[Any, Any]:
    """An attribute that no code computes: the dict that it stands in (the owner itself for slots and classes), and its value."""
    inherited = _of_class(type(owner), name)
    if isinstance(inherited, MemberDescriptorType):
        return owner, inherited.__get__(owner) if hasattr(owner, name) else MISSING
    if hasattr(type(inherited), "__set__"):
        return None, MISSING
    own = getattr(owner, "__dict__", {})
    for table in (own, *(own[table] for table in TABLES if isinstance(owner, nn.Module) and table in own)):
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
    if isinstance(thing, ATOMS):
        return False
    return isinstance(thing, (dict, *SEQUENCES, np.ndarray, *GENERATORS, *BAGS, *BUFFERS)) or is_collection(thing)


def is_collection(thing: Any) -> bool:
    """Whether a thing is a container of a library that is neither Python's own kind nor made of tensors."""
    if isinstance(thing, (*ATOMS, dict, *SEQUENCES, TensorDictBase, nn.Module)) or not isinstance(thing, COLLECTIONS):
        return False
    return is_of_library(type(thing).__module__)


def is_open(thing: Any) -> bool:
    """Whether a thing is an object, though no module, of a class that is no library's: others may be made like it."""
    cls = type(thing)
    known = is_of_library(cls.__module__) or cls.__module__.startswith("marlkit.recorder")
    return hasattr(thing, "__dict__") and not known and not isinstance(thing, (type, nn.Module))


def is_internal(cls: type, name: str) -> bool:
    """Whether an attribute is what a library's class keeps for itself."""
    return name.startswith("_") and name not in TABLES and is_of_library(cls.__module__)


def is_own(module: str) -> bool:
    """Whether a module is marlkit's, or of a library that marlkit is built on."""
    return module.partition(".")[0] in {"marlkit", *LIBRARIES}


@cache
def is_of_library(module: str) -> bool:
    """Whether a module is one of Python's, or installed: variables of these are taken to stay what they are."""
    package = module.partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    installed = file.startswith(_STANDARD) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return package in LIBRARIES or (installed and package != "__main__")


@cache
def _slots(cls: type) -> list[str]:
    return sorted({name for base in cls.__mro__ for name, entry in vars(base).items() if isinstance(entry, MemberDescriptorType)})


def _of_class(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), MISSING)


def functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions behind a function, a method of any kind or a property."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, (staticmethod, classmethod)):
        yield from functions_of(value.__func__)
    elif isinstance(value, property):
        yield from functions_of(value.fget)
    elif isinstance(value, cached_property):
        yield from functions_of(value.func)
    elif isinstance(value, _lru_cache_wrapper):
        yield from functions_of(value.__wrapped__)


def names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes that a function's code uses, functions within it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def called(value: Any, name: str) -> str:
    """An object is called by its class, everything else by where it was found."""
    return name if isinstance(value, (*ATOMS, Tensor, dict, *SEQUENCES, np.ndarray)) else type(value).__name__


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return pickle.dumps(generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else generator)


def restore(thing: Any, before: Any) -> None:
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
    elif isinstance(thing, (bytearray, array)):
        thing[:] = before if isinstance(thing, bytearray) else array(thing.typecode, before)
    elif is_collection(thing):
        if isinstance(thing, MutableMapping):
            thing.clear()
            thing.update(before)
        elif isinstance(thing, MutableSequence):
            thing[:] = before
    elif not isinstance(thing, (tuple, frozenset, memoryview)):
        own = getattr(thing, "__dict__", {})
        for name in own.keys() - before.keys():
            del own[name]
        for name, value in before.items():
            if isinstance(_of_class(type(thing), name), MemberDescriptorType):
                object.__setattr__(thing, name, value)
            else:
                own[name] = value
