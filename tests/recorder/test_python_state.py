"""A step that reads what Python holds is taken with what Python holds now, or a warning says that it is not recorded any more."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import random
import sys
import threading
import warnings
from array import array
from collections import ChainMap, UserDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import rng
from marlkit.options import CompileMode
from marlkit.recorder.steps import SPARE, Step, StepRecorder

WEIGHT = 1.0
COUNT = 0
CONTEXT: ContextVar[float] = ContextVar("CONTEXT", default=1.0)
TABLE = {"weights": [1.0]}
SETTINGS = ModuleType("tests_of_python_state")
sys.modules[SETTINGS.__name__] = SETTINGS


@dataclass
class Holder:
    weight: float = 1.0


class Slotted:
    __slots__ = ("weight",)

    def __init__(self) -> None:
        self.weight = 1.0


class Pair(NamedTuple):
    weight: float
    other: float = 0.0


class Update(nn.Module):
    """Fits ``w`` by steps whose loss has a weight; what that is and how it changes is up to those that inherit."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.optimizer = torch.optim.Adam([self.w], lr=0.1, fused=True)
        self.latest = 1.0
        self.set(1.0)

    def set(self, value: float) -> None:
        raise NotImplementedError

    def weight(self) -> Any:
        raise NotImplementedError

    def before(self, value: float) -> Step[str]:
        """What the user does before a step, and the step."""
        if value != self.latest:
            self.latest = value
            self.set(value)
        return self.step

    def step(self, rows: TensorDictBase) -> dict[str, Tensor]:
        loss = self.weight() * (self.w * rows["x"]).square().mean()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return {"loss": loss.detach()}


class Attribute(Update):
    def set(self, value: float) -> None:
        self.value = value

    def weight(self) -> Any:
        return self.value


class NestedObject(Update):
    def set(self, value: float) -> None:
        if not hasattr(self, "holder"):
            self.holder = SimpleHolder()
        self.holder.inner.weight = value

    def weight(self) -> Any:
        return self.holder.inner.weight


class SimpleHolder:
    weight = 1.0

    def __init__(self) -> None:
        self.inner = Holder()


class ObjectReplaced(Update):
    def set(self, value: float) -> None:
        self.holder = Holder(value)

    def weight(self) -> Any:
        return self.holder.weight


class InSlots(Update):
    held: Any = None

    def set(self, value: float) -> None:
        self.held = self.held or Slotted()
        self.held.weight = value

    def weight(self) -> Any:
        return self.held.weight


class Namespace(Update):
    held: Any = None

    def set(self, value: float) -> None:
        self.held = self.held or SimpleNamespace()
        self.held.weight = value

    def weight(self) -> Any:
        return self.held.weight


class NamedTuples(Update):
    def set(self, value: float) -> None:
        self.pair = Pair(value)

    def weight(self) -> Any:
        return self.pair.weight


class ListElement(Update):
    values: Any = None

    def set(self, value: float) -> None:
        self.values = self.values or [0.0, 0.0]
        self.values[1] = value

    def weight(self) -> Any:
        return self.values[1]


class NestedDict(Update):
    values: Any = None

    def set(self, value: float) -> None:
        self.values = self.values or {"all": [{"weight": 0.0}]}
        self.values["all"][0]["weight"] = value

    def weight(self) -> Any:
        return self.values["all"][0].get("weight")


class ByVars(Update):
    def set(self, value: float) -> None:
        self.value = value

    def weight(self) -> Any:
        return vars(self)["value"]


class ByComputedName(Update):
    def set(self, value: float) -> None:
        self.value_1 = value

    def weight(self) -> Any:
        return getattr(self, f"value_{1}")


class Property(Update):
    def set(self, value: float) -> None:
        self._value = value

    @property
    def value(self) -> float:
        return 2 * self._value

    def weight(self) -> Any:
        return self.value


class OfClass(Update):
    value = 1.0

    def set(self, value: float) -> None:
        type(self).value = value

    def weight(self) -> Any:
        return self.value


class OfClassByType(OfClass):
    def weight(self) -> Any:
        return type(self).value


class OfClassByMethod(OfClass):
    @classmethod
    def of_class(cls) -> float:
        return cls.value

    def weight(self) -> Any:
        return self.of_class()


class OfClassOfObject(Update):
    def set(self, value: float) -> None:
        self.holder = getattr(self, "holder", None) or SimpleHolder()
        SimpleHolder.weight = value

    def weight(self) -> Any:
        return type(self.holder).weight


class OfOtherClass(Update):
    def set(self, value: float) -> None:
        Constants.weight = value

    def weight(self) -> Any:
        return Constants.weight


class Constants:
    weight = 1.0


class Global(Update):
    def set(self, value: float) -> None:
        global WEIGHT
        WEIGHT = value

    def weight(self) -> Any:
        return WEIGHT


class GlobalOfHelper(Global):
    def weight(self) -> Any:
        return sum(map(lambda _: helper(), [0]))  # noqa: C417


def helper() -> float:
    return WEIGHT


class GlobalDict(Update):
    def set(self, value: float) -> None:
        TABLE["weights"][0] = value

    def weight(self) -> Any:
        return TABLE["weights"][0]


class GlobalOfModule(Update):
    def set(self, value: float) -> None:
        SETTINGS.weight = value  # type: ignore[attr-defined]

    def weight(self) -> Any:
        return SETTINGS.weight


class Imported(GlobalOfModule):
    def weight(self) -> Any:
        import tests_of_python_state  # type: ignore[import-not-found]

        return tests_of_python_state.weight


class Cell(Update):
    """A variable of a function that made both the step and what changes it."""

    def __init__(self) -> None:
        value = 1.0

        def change(new: float) -> None:
            nonlocal value
            value = new

        self.set_cell, self.get_cell = change, lambda: value
        super().__init__()

    def set(self, value: float) -> None:
        self.set_cell(value)

    def weight(self) -> Any:
        return self.get_cell()


class CellList(Cell):
    def __init__(self) -> None:
        Update.__init__(self)

    def set(self, value: float) -> None:
        if not hasattr(self, "change"):
            values = [value]
            self.change, self.get_cell = values.__setitem__, lambda: values[0]
        self.change(0, value)


class OwnVariable(Update):
    """A step made anew each time, around a variable."""

    def set(self, value: float) -> None:
        pass

    def before(self, value: float) -> Step[str]:
        def step(rows: TensorDictBase) -> dict[str, Tensor]:
            self.now = lambda: value
            try:
                return self.step(rows)
            finally:
                del self.now

        return step

    def weight(self) -> Any:
        return self.now()


class OwnObject(Update):
    """A step made anew each time, around an object and a list made anew."""

    def set(self, value: float) -> None:
        pass

    def before(self, value: float) -> Step[str]:
        holder, parts = Holder(value), [value]
        return lambda rows: {"loss": self.weighted(holder.weight * parts[0], rows)}

    def weighted(self, weight: float, rows: TensorDictBase) -> Tensor:
        return weight * (self.w * rows["x"]).square().mean().detach()


class Default(OwnObject):
    def before(self, value: float) -> Step[str]:
        return lambda rows, value=value: {"loss": self.weighted(value, rows)}  # type: ignore[misc]


class Partial(OwnObject):
    def before(self, value: float) -> Step[str]:
        return partial(self.taken, value)

    def taken(self, value: float, rows: TensorDictBase) -> dict[str, Tensor]:
        return {"loss": self.weighted(value, rows)}


class FunctionReplaced(Update):
    def set(self, value: float) -> None:
        self.function = (lambda: 1.0) if value == 1 else (lambda: 3.0)

    def weight(self) -> Any:
        return self.function()


class MethodShadowed(Update):
    def set(self, value: float) -> None:
        if value != 1:
            self.weight = lambda: value  # type: ignore[method-assign]

    def weight(self) -> Any:
        return 1.0


class TensorReplaced(Update):
    def set(self, value: float) -> None:
        self.value = torch.tensor(value)

    def weight(self) -> Any:
        return self.value * 2


class TensorFilled(Update):
    """In place, but no buffer."""

    value: Any = None

    def set(self, value: float) -> None:
        self.value = torch.zeros(()) if self.value is None else self.value
        self.value.fill_(value)

    def weight(self) -> Any:
        return self.value * 2


class BufferReplaced(Update):
    value: Any

    def set(self, value: float) -> None:
        if "value" not in self._buffers:
            self.register_buffer("value", torch.zeros(()))
        self.value = torch.tensor(value)

    def weight(self) -> Any:
        return self.value * 2


class BufferFilled(BufferReplaced):
    def set(self, value: float) -> None:
        if "value" not in self._buffers:
            self.register_buffer("value", torch.zeros(()))
        self.value.fill_(value)


class Array(Update):
    values: Any = None

    def set(self, value: float) -> None:
        self.values = np.zeros(2) if self.values is None else self.values
        self.values[1] = value

    def weight(self) -> Any:
        return float(self.values[1])


class OptionOfModule(Update):
    def set(self, value: float) -> None:
        if not hasattr(self, "part"):
            self.part = nn.Sequential(nn.LeakyReLU())
        self.part[0].negative_slope = value  # type: ignore[assignment]

    def weight(self) -> Any:
        return self.part(-self.w).sum().abs()


class ModuleReplaced(Update):
    def set(self, value: float) -> None:
        self.part = nn.Sequential(nn.LeakyReLU(value))

    def weight(self) -> Any:
        return self.part(-self.w).sum().abs()


class Hook(Update):
    handle: Any = None

    def set(self, value: float) -> None:
        if not hasattr(self, "part"):
            self.part = nn.Sequential(nn.Identity())
        if value != 1:
            self.handle = self.handle or self.part[0].register_forward_hook(lambda *given: given[-1] * 3.0)

    def weight(self) -> Any:
        return self.part(self.w).sum().abs()


class BackwardHook(Update):
    handle: Any = None

    def set(self, value: float) -> None:
        if not hasattr(self, "part"):
            self.part = nn.Sequential(nn.Identity())
        if value != 1:
            self.handle = self.handle or self.part[0].register_full_backward_hook(lambda *given: (given[1][0] * 3.0,))

    def weight(self) -> Any:
        return self.part(self.w).square().sum()


class HookOfOptimizer(Update):
    handle: Any = None

    def set(self, value: float) -> None:
        if value != 1:
            self.handle = self.handle or self.optimizer.register_step_post_hook(self.halved)

    def halved(self, *given: Any) -> None:
        self.w.data.mul_(0.5)

    def weight(self) -> Any:
        return 1.0


class HookBeforeOptimizer(Update):
    handle: Any = None

    def set(self, value: float) -> None:
        if value != 1:
            self.handle = self.handle or self.optimizer.register_step_pre_hook(self.turned)

    def turned(self, *given: Any) -> None:
        assert self.w.grad is not None
        self.w.grad.neg_()

    def weight(self) -> Any:
        return 1.0


class Training(Update):
    def set(self, value: float) -> None:
        self.train(value == 1)

    def weight(self) -> Any:
        return 1.0 if self.training else 2.0


class Frozen(Update):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.Adam([self.w, self.v], lr=0.1, fused=True)

    def set(self, value: float) -> None:
        if hasattr(self, "v"):
            self.v.requires_grad_(value == 1)

    def weight(self) -> Any:
        return self.v


class DataReplaced(Update):
    def set(self, value: float) -> None:
        if value != 1:
            self.w.data = torch.full((2,), value)

    def weight(self) -> Any:
        return 1.0


class Decay(Update):
    def set(self, value: float) -> None:
        self.optimizer.param_groups[0]["weight_decay"] = value / 10

    def weight(self) -> Any:
        return 1.0


class RateReplaced(Update):
    """A tensor, by another."""

    def set(self, value: float) -> None:
        self.optimizer.param_groups[0]["lr"] = torch.tensor(value / 10)

    def weight(self) -> Any:
        return 1.0


class StateCleared(Update):
    def set(self, value: float) -> None:
        if value != 1:
            self.optimizer.state.clear()

    def weight(self) -> Any:
        return 1.0


class GradMode(Update):
    def set(self, value: float) -> None:
        self.graded = value == 1

    def before(self, value: float) -> Step[str]:
        torch.set_grad_enabled(value == 1)
        return lambda rows: {"loss": (self.w * rows["x"]).sum().detach() * (2 if torch.is_grad_enabled() else 3)}


class OfLibrary(Update):
    """Holds the weight in a container of a library."""

    held: Any = None

    def make(self) -> Any:
        raise NotImplementedError

    def set(self, value: float) -> None:
        self.held = self.make() if self.held is None else self.held
        self.held["weight"] = value

    def weight(self) -> Any:
        return self.held["weight"]


class Config(OfLibrary):
    def make(self) -> Any:
        return OmegaConf.create({"weight": 1.0})


class ConfigInConfig(OfLibrary):
    def make(self) -> Any:
        self.outer = OmegaConf.create({"inner": {"weight": 1.0}})
        return self.outer.inner

    def weight(self) -> Any:
        return self.outer.inner.weight


class ConfigList(Update):
    values: Any = None

    def set(self, value: float) -> None:
        self.values = OmegaConf.create([1.0]) if self.values is None else self.values
        self.values[0] = value

    def weight(self) -> Any:
        return float(self.values[0])


class ConfigMissing(OfLibrary):
    def make(self) -> Any:
        return OmegaConf.create({"weight": 1.0, "other": "???"})


class UserDicts(OfLibrary):
    def make(self) -> Any:
        return UserDict()


class UserDictOfUser(OfLibrary):
    def make(self) -> Any:
        return Settings()


class Settings(UserDict[str, float]): ...


class Chain(OfLibrary):
    def make(self) -> Any:
        return ChainMap({}, {"weight": 1.0})


class NumberArray(ConfigList):
    def set(self, value: float) -> None:
        self.values = array("d", [1.0]) if self.values is None else self.values
        self.values[0] = value


class Bytes(ConfigList):
    def set(self, value: float) -> None:
        self.values = bytearray(1) if self.values is None else self.values
        self.values[0] = int(value)


class ListWithAttribute(Update):
    held: Any = None

    def set(self, value: float) -> None:
        self.held = self.held or ListOfUser([1.0])
        self.held.weight = value

    def weight(self) -> Any:
        return self.held.weight


class ListOfUser(list[float]):
    weight = 1.0


class DictWithClassAttribute(Update):
    def __init__(self) -> None:
        self.held = DictOfUser(a=1.0)
        super().__init__()

    def set(self, value: float) -> None:
        DictOfUser.scale = value

    def weight(self) -> Any:
        return self.held.scaled()


class DictOfUser(dict[str, float]):
    scale = 1.0

    def scaled(self) -> float:
        return self["a"] * self.scale


class Contextual(Update):
    def set(self, value: float) -> None:
        CONTEXT.set(value)

    def weight(self) -> Any:
        return CONTEXT.get()


class PerThread(Update):
    held: Any = None

    def set(self, value: float) -> None:
        self.held = self.held or threading.local()
        self.held.weight = value

    def weight(self) -> Any:
        return self.held.weight


class OfC(Update):
    def __init__(self) -> None:
        self.value: Any = self.make()
        super().__init__()

    def make(self) -> Any:
        return ctypes.c_double(1.0)

    def set(self, value: float) -> None:
        self.value.value = value

    def weight(self) -> Any:
        return self.value.value


class SharedValue(OfC):
    def make(self) -> Any:
        return multiprocessing.Value("d", 1.0)


class SharedWithoutLock(OfC):
    def make(self) -> Any:
        return multiprocessing.Value("d", 1.0, lock=False)


class SharedArray(OfC):
    def make(self) -> Any:
        return multiprocessing.Array("d", [1.0])

    def set(self, value: float) -> None:
        self.value[0] = value

    def weight(self) -> Any:
        return self.value[0]


class ArrayOfC(SharedArray):
    def make(self) -> Any:
        return (ctypes.c_double * 1)(1.0)


class CountsInC(Update):
    def __init__(self) -> None:
        self.count = ctypes.c_int(0)
        super().__init__()

    def set(self, value: float) -> None: ...

    def weight(self) -> Any:
        self.count.value += 1
        return self.count.value


class GlobalByName(Global):
    def weight(self) -> Any:
        return globals()["WEIGHT"]


class Meta(type):
    weight = 1.0

    @property
    def doubled(cls) -> float:
        return 2 * cls.weight


class WithMeta(metaclass=Meta): ...


class OfMetaclass(Update):
    def set(self, value: float) -> None:
        Meta.weight = value

    def weight(self) -> Any:
        return WithMeta.doubled


class Tabled:
    """A descriptor that keeps the values of its owners."""

    def __init__(self) -> None:
        self.table: dict[int, float] = {}

    def __get__(self, owner: Any, cls: type) -> float:
        return self.table[id(owner)]

    def __set__(self, owner: Any, value: float) -> None:
        self.table[id(owner)] = value


class ByDescriptor(Update):
    value = Tabled()

    def set(self, value: float) -> None:
        self.value = value

    def weight(self) -> Any:
        return self.value


class Resized(Update):
    def __init__(self) -> None:
        self.mask = torch.ones(4)
        super().__init__()

    def set(self, value: float) -> None:
        self.mask.resize_(4 - int(value > 1))

    def weight(self) -> Any:
        return self.mask.sum() / 2


class Transposed(Resized):
    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.arange(4.0).view(2, 2)

    def set(self, value: float) -> None:
        if value > 1 and self.mask.ndim == 2:
            self.mask.t_()

    def weight(self) -> Any:
        return self.mask[0].sum()


WAYS = [
    Attribute, NestedObject, ObjectReplaced, InSlots, Namespace, NamedTuples, ListElement, NestedDict, ByVars, ByComputedName,
    Property, OfClass, OfClassByType, OfClassByMethod, OfClassOfObject, OfOtherClass,
    Global, GlobalOfHelper, GlobalDict, GlobalOfModule, Imported,
    Cell, CellList, OwnVariable, OwnObject, Default, Partial,
    FunctionReplaced, MethodShadowed, TensorReplaced, TensorFilled, BufferReplaced, BufferFilled, Array,
    OptionOfModule, ModuleReplaced, Hook, BackwardHook, HookOfOptimizer, HookBeforeOptimizer, Training, Frozen,
    DataReplaced, Decay, RateReplaced, StateCleared, GradMode,
    Config, ConfigInConfig, ConfigList, ConfigMissing, UserDicts, UserDictOfUser, Chain, NumberArray, Bytes,
    ListWithAttribute, DictWithClassAttribute, Contextual, PerThread, GlobalByName, OfMetaclass, ByDescriptor,
    Resized, Transposed, OfC, SharedValue, SharedWithoutLock, SharedArray, ArrayOfC,
]  # fmt: skip


REFUSED = {
    StateCleared, ConfigMissing, Contextual, PerThread, GlobalByName, OfC, SharedValue, SharedWithoutLock, SharedArray, ArrayOfC,
}  # fmt: skip
"""Not recorded at all: the step makes the state, or reads what cannot be compared."""


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    global WEIGHT, COUNT
    WEIGHT, COUNT = 1.0, 0
    yield
    torch.set_grad_enabled(True)
    OfClass.value = OfClassByType.value = OfClassByMethod.value = SimpleHolder.weight = Constants.weight = 1.0
    Meta.weight = DictOfUser.scale = 1.0


def outcome(cls: type[Update], mode: CompileMode, values: list[float], stretch: bool = False) -> tuple[list[Tensor], list[str]]:
    """Results and parameters after steps with these weights, and the warnings; all in one stretch, or not."""
    rng.seed_all(0)
    update = cls()
    run_step = StepRecorder(mode, update, lambda: [update.optimizer])
    found = []
    with warnings.catch_warnings(record=True) as told, run_step.undisturbed() if stretch else nullcontext():
        warnings.simplefilter("always")
        for value in values:
            rows = TensorDict({"x": torch.randn(3, 2)}, batch_size=[3])
            found += [run_step("step", update.before(value), rows)["loss"], update.w.detach().clone()]
    torch.set_grad_enabled(True)
    return found, [str(warning.message) for warning in told]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("stretch", [False, True], ids=["apart", "in a stretch"])
def test_what_has_changed_once_is_taken_in(way: type[Update], stretch: bool) -> None:
    """Between comparisons of replays with steps, which are number 1 and 10; the step is recorded in the second call."""
    values = [1.0] * 4 + [3.0] * 2 + [1.0] * 2
    (expected, _), (found, told) = (outcome(way, mode, values, stretch) for mode in ("none", "record"))
    assert all(map(torch.equal, found, expected))
    assert len(told) == (way in REFUSED)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_changes_all_the_time_is_taken_in(way: type[Update]) -> None:
    values = [1.0 + number for number in range(2 * SPARE + 4)]
    (expected, _), (found, told) = (outcome(way, mode, values) for mode in ("none", "record"))
    assert all(map(torch.equal, found, expected))
    assert len(told) <= 1


@pytest.mark.parametrize(
    ("way", "place"),
    [
        (Attribute, "`Attribute.value`"),
        (NestedObject, "`NestedObject.holder.inner.weight`"),
        (ListElement, "`ListElement.values`"),
        (NestedDict, "`NestedDict.values['all'][0]['weight']`"),
        (OfOtherClass, "`Constants.weight`"),
        (Global, "`test_python_state.WEIGHT`"),
        (Cell, "`value`"),
        (Default, "`step`"),
        (TensorReplaced, "`TensorReplaced.value`"),
        (OptionOfModule, "`OptionOfModule.part.0.negative_slope`"),
    ],
)
def test_the_warning_names_the_place_and_the_remedy(way: type[Update], place: str) -> None:
    _, told = outcome(way, "record", [1.0 + number for number in range(SPARE + 3)])
    assert len(told) == 1
    assert told[0].startswith("the step `step` is not recorded, but run operation by operation: ")
    assert place in told[0]
    assert "hold in a buffer" in told[0]
    assert "trainer.compile=none" in told[0]


# --- changes that do not matter ----------------------------------------------------------------------------------------------


class Counting(Attribute):
    """Counts, collects and caches outside of its step."""

    def __init__(self) -> None:
        self.calls, self.history, self.cache = 0, [0], {"a": 0}
        super().__init__()

    def before(self, value: float) -> Step[str]:
        global COUNT
        self.calls += 1
        self.history.append(self.calls)
        self.cache = {"a": self.calls}
        COUNT += 1
        self.value = float(str(value))  # another object, the same number
        return super().before(value)


def test_what_the_step_does_not_read_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings: list[int] = []
    monkeypatch.setattr(StepRecorder, "_record", counted(StepRecorder._record, recordings))
    values = [1.0] * 12
    (expected, _), (found, told) = (outcome(Counting, mode, values) for mode in ("none", "record"))
    assert all(map(torch.equal, found, expected))
    assert told == []
    assert len(recordings) == 1


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counting(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return counting


def test_what_changes_back_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings: list[int] = []
    monkeypatch.setattr(StepRecorder, "_record", counted(StepRecorder._record, recordings))
    values = [1.0, 2.0] * 12
    (expected, _), (found, told) = (outcome(Attribute, mode, values) for mode in ("none", "record"))
    assert all(map(torch.equal, found, expected))
    assert told == []
    assert len(recordings) == 2


# --- changes that the step makes itself --------------------------------------------------------------------------------------


class Counter(Attribute):
    def weight(self) -> Any:
        self.value += 1
        return self.value


class Appends(Attribute):
    seen: Any = None

    def weight(self) -> Any:
        self.seen = self.seen or []
        self.seen.append(1)
        return len(self.seen)


class Writes(Attribute):
    """What it leaves is read after the step, and not by it."""

    last: Any = 0.0

    def weight(self) -> Any:
        self.last = torch.ones(())
        return self.value


class CountsInGlobal(Attribute):
    def weight(self) -> Any:
        global COUNT
        COUNT += 1
        return COUNT


class CountsInClass(Attribute):
    def weight(self) -> Any:
        Constants.weight += 1
        return Constants.weight


class CountsInCell(Attribute):
    def __init__(self) -> None:
        count = 0

        def counting() -> int:
            nonlocal count
            count += 1
            return count

        self.counting = counting
        super().__init__()

    def weight(self) -> Any:
        return self.counting()


class CountsInFunction(Attribute):
    def weight(self) -> Any:
        tally.count += 1  # type: ignore[attr-defined]
        return tally.count  # type: ignore[attr-defined]


def tally() -> None: ...


class CountsInArray(Array):
    def weight(self) -> Any:
        self.values[0] += 1
        return float(self.values[0])


class CountsInConfig(OfLibrary):
    def make(self) -> Any:
        return OmegaConf.create({"weight": 1.0, "count": 0})

    def weight(self) -> Any:
        self.held["count"] += 1
        return self.held["count"]


class CountsInUserDict(CountsInConfig):
    def make(self) -> Any:
        return UserDict(count=0)


class CountsInBytes(Attribute):
    def __init__(self) -> None:
        self.counts = bytearray(1)
        super().__init__()

    def weight(self) -> Any:
        self.counts[0] += 1
        return self.counts[0]


class Advances(Attribute):
    def __init__(self) -> None:
        self.schedule = (1.0 / number for number in itertools.count(1))
        super().__init__()

    def weight(self) -> Any:
        return next(self.schedule)


class AdvancesCount(Advances):
    def __init__(self) -> None:
        super().__init__()
        self.schedule = itertools.count(1)  # type: ignore[assignment]


class AdvancesCell(OwnObject):
    """An iterator that the step has in its closure."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = itertools.count(1)

    def before(self, value: float) -> Step[str]:
        schedule = self.schedule
        return lambda rows: {"loss": self.weighted(next(schedule), rows)}


class OwnRandom(Attribute):
    def __init__(self) -> None:
        self.random: Any = random.Random(0)
        super().__init__()

    def weight(self) -> Any:
        return self.random.random()


class OwnNumpy(OwnRandom):
    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)


class GlobalRandom(Attribute):
    def weight(self) -> Any:
        return random.random() + np.random.rand()


class Asks(Attribute):
    def weight(self) -> Any:
        return 1.0 if self.w.sum() > 0 else self.w.detach().sum().item()


class CountingOptimizer(torch.optim.Optimizer):
    """Gradient descent whose rate falls with a number of its own."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            parameter.sub_(parameter.grad, alpha=0.1 / state["step"])


class CountsInOptimizer(Attribute):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = CountingOptimizer([self.w])  # type: ignore[assignment]


OWN = [
    Counter, Appends, Writes, CountsInGlobal, CountsInClass, CountsInCell, CountsInFunction, CountsInArray, Advances,
    AdvancesCount, AdvancesCell, OwnRandom, OwnNumpy, GlobalRandom, Asks, CountsInOptimizer,
    CountsInConfig, CountsInUserDict, CountsInBytes, CountsInC,
]  # fmt: skip


@pytest.mark.parametrize("way", OWN, ids=lambda way: way.__name__)
def test_a_step_that_changes_what_python_holds_is_not_recorded(way: type[Update]) -> None:
    expected: list[Tensor] = []
    found: list[Tensor] = []
    modes: list[tuple[CompileMode, list[Tensor]]] = [("none", expected), ("record", found)]
    for mode, kept in modes:
        global COUNT
        COUNT, Constants.weight, tally.count = 0, 1.0, 0  # type: ignore[attr-defined]
        results, told = outcome(way, mode, [1.0] * 8)
        kept += results
    assert all(map(torch.equal, found, expected))
    assert len(told) == 1
    assert told[0].startswith("the step `step` is not recorded, but run operation by operation: ")


# --- what cannot be seen -----------------------------------------------------------------------------------------------------


class Unseen(Attribute):
    def set(self, value: float) -> None:
        os.environ["MARLKIT_TEST_WEIGHT"] = str(value)

    def weight(self) -> Any:
        return float(os.environ["MARLKIT_TEST_WEIGHT"])


def test_what_cannot_be_seen_is_found_by_comparing() -> None:
    values = [1.0] * 11 + [2.0, 3.0, 4.0]  # the twelfth step is replay number 10
    (expected, _), (found, told) = (outcome(Unseen, mode, values) for mode in ("none", "record"))
    assert all(map(torch.equal, found, expected))
    assert len(told) == 1
    assert "cannot be seen to change" in told[0]
    assert "perhaps for 8 steps already" in told[0]


def test_nothing_is_left_of_the_watching() -> None:
    own = {cls: "__getattribute__" in vars(cls) for cls in (nn.Module, Attribute, Holder, SimpleHolder)}
    outcome(NestedObject, "record", [1.0] * 4)
    outcome(Asks, "record", [1.0] * 4)
    outcome(AdvancesCell, "record", [1.0] * 4)
    assert own == {cls: "__getattribute__" in vars(cls) for cls in own} == dict.fromkeys(own, False)
