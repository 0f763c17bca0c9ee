"""Steps that are taken again and again on rows of the same shape: recorded at first, then replayed without their Python."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit.keys import Key
from marlkit.options import CompileMode
from marlkit.recorder.recording import Graph, NotRecordable, Recording, record

ResultKey = TypeVar("ResultKey")

_PLAIN = (bool, int, float, str, type(None))


@dataclass
class _Known:
    """A step that has been met.

    Attributes:
        run: takes the tensors of the rows; ``None`` until the step is recorded.
        numbers: the Python numbers that it was recorded with, if it changes parameters; ``None``: it takes none in.
        afterwards: what Python does after the step's tensors.
    """

    run: Callable[[Sequence[Tensor]], dict[Any, Tensor]] | None = None
    numbers: tuple[Any, ...] | None = None
    afterwards: list[Callable[[], None]] = field(default_factory=list)


class StepRecorder:
    """Runs steps of policies and of gradient descent as they are (mode `none`), recorded (`record`) or as CUDA graphs (`graph`).

    A step is first run once as it is, so that the optimiser makes its state, and then recorded. It has to take whatever changes
    from call to call from its rows and from parameters, buffers and the optimiser's state; one that does not, or that changes
    what Python holds, is never recorded, and a warning says why.

    Args:
        mode: how.
        module: holds all parameters and buffers.
        state: other tensors that change between steps.
        numbers: Python numbers that steps take in which change parameters, such as learning rates; where they change, these
            steps are recorded anew.
    """

    def __init__(
        self, mode: CompileMode, module: nn.Module, state: Callable[[], Iterable[Tensor]], numbers: Callable[[], tuple[Any, ...]]
    ) -> None:
        self.mode = mode
        self._module, self._state, self._numbers = module, state, numbers
        self._known: dict[Hashable, _Known] = {}
        self._refused: set[Hashable] = set()
        self._deferred: list[Callable[[], None]] | None = None

    def __call__(
        self, name: Hashable, step: Callable[[TensorDictBase], dict[ResultKey, Tensor]], rows: TensorDictBase
    ) -> dict[ResultKey, Tensor]:
        """Take the step ``name`` on ``rows``, and what it has put off until after it."""
        if self.mode == "none" or name in self._refused:
            return self._as_it_is(step, rows)
        given = dict(rows.items(include_nested=True, leaves_only=True))
        known = (name, rows.batch_size, tuple((key, tensor.shape, tensor.dtype) for key, tensor in given.items()))
        if known not in self._known:
            self._known[known] = _Known()
            return self._as_it_is(step, rows)
        found = self._known[known]
        if found.run is None or (found.numbers is not None and found.numbers != self._numbers()):
            try:
                self._record(found, step, given, rows.batch_size)
            except NotRecordable as error:
                self._refused.add(name)
                warnings.warn(f"the step `{_words(name)}` is not recorded, but run operation by operation: {error}", stacklevel=2)
                return self._as_it_is(step, rows)
        assert found.run is not None
        results: dict[ResultKey, Tensor] = found.run(list(given.values()))
        if self.mode == "graph":
            results = {result: value.clone() for result, value in results.items()}
        for after in found.afterwards:
            after()
        return results

    def _as_it_is(
        self, step: Callable[[TensorDictBase], dict[ResultKey, Tensor]], rows: TensorDictBase
    ) -> dict[ResultKey, Tensor]:
        put_off: list[Callable[[], None]] = []
        with self._deferring(put_off):
            results = step(rows)
        for after in put_off:
            after()
        return results

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do what is Python after a step's tensors: after this step, and after each replay where it is being recorded."""
        if self._deferred is None:
            action()
        else:
            self._deferred.append(action)

    def _record(
        self,
        found: _Known,
        step: Callable[[TensorDictBase], dict[Any, Tensor]],
        rows: dict[Key, Tensor],
        batch_size: torch.Size,
    ) -> None:
        def function(*given: Tensor) -> dict[Any, Tensor]:
            return step(TensorDict(dict(zip(rows, given, strict=True)), batch_size=batch_size, device=given[0].device))

        own = [*self._module.parameters(), *self._module.buffers(), *self._state()]
        found.afterwards = []
        with self._deferring(found.afterwards), _unchanged_python(self._module):
            recording = record(function, _apart(rows.values()), own, undo=True)
        _refuse_foreign(recording, own, self._module)
        changed = {tensor.untyped_storage()._cdata for tensor in recording.program.written}
        learns = any(parameter.untyped_storage()._cdata in changed for parameter in self._module.parameters())
        found.numbers = self._numbers() if learns else None
        found.run = (Graph(recording, list(rows.values())) if self.mode == "graph" else recording).run

    @contextmanager
    def watching(self, part: nn.Module) -> Iterator[None]:
        """Record nothing from here on, after a warning, if the block changes what Python holds of ``part`` between two steps."""
        if self.mode == "none":
            yield
            return
        before = _python_state(part)
        yield
        changed = _changed(part, before)
        if changed:
            self.mode = "none"
            self._known.clear()
            message = f"{_places(changed)} of `{type(part).__name__}` changes between steps: hold in a buffer what changes"
            warnings.warn(f"steps are not recorded, but run operation by operation: {message}", stacklevel=3)

    @contextmanager
    def _deferring(self, actions: list[Callable[[], None]]) -> Iterator[None]:
        outer, self._deferred = self._deferred, actions
        try:
            yield
        finally:
            self._deferred = outer


def _apart(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same tensors, none of which shares memory with another: a recorder would take these for one."""
    seen: set[int] = set()
    found = []
    for tensor in tensors:
        address = tensor.untyped_storage().data_ptr()
        found.append(tensor.clone() if address in seen else tensor)
        seen.add(address)
    return found


def _python_state(module: nn.Module) -> dict[tuple[str, str], Any]:
    """What the modules hold in numbers, words, lists and dicts of these, and which tensors."""
    found: dict[tuple[str, str], Any] = {}
    for name, part in module.named_modules():
        for attribute, value in {**vars(part), **part._buffers}.items():
            if isinstance(value, Tensor):
                found[name, attribute] = value
            elif not attribute.startswith("_") and attribute != "training" and _is_plain(value):
                found[name, attribute] = copy.copy(value)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(part, _PLAIN) for part in value)
    if isinstance(value, dict):
        return all(isinstance(part, _PLAIN) for part in value.values())
    return isinstance(value, _PLAIN)


def _changed(module: nn.Module, before: dict[tuple[str, str], Any]) -> list[tuple[str, str]]:
    """Where the module holds another number, or another tensor, than before."""
    now = _python_state(module)
    pairs = [(place, now[place], value) for place, value in before.items() if place in now]
    return [place for place, one, other in pairs if (one is not other if isinstance(other, Tensor) else one != other)]


@contextmanager
def _unchanged_python(module: nn.Module) -> Iterator[None]:
    """Put back what Python held before the block.

    Raises:
        NotRecordable: the block has changed it.
    """
    before = _python_state(module)
    changed: list[tuple[str, str]] = []
    try:
        yield
    finally:
        changed = _changed(module, before)
        for name, attribute in changed:
            setattr(module.get_submodule(name), attribute, before[name, attribute])
    if changed:
        raise NotRecordable(f"it changes {_places(changed)}, which Python holds and a replay would not change")


def _places(changed: list[tuple[str, str]]) -> str:
    return ", ".join(f"`{name}.{attribute}`".replace("`.", "`") for name, attribute in changed)


def _refuse_foreign(recording: Recording, own: list[Tensor], module: nn.Module) -> None:
    """Tensors that a closure has brought along would stay what they were when recorded.

    Raises:
        NotRecordable: the step reads one that neither its rows nor any module holds.
    """
    held = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    allowed = {tensor.untyped_storage()._cdata for tensor in [*own, *held]}
    foreign = [tensor for tensor in recording.program.foreign if tensor.untyped_storage()._cdata not in allowed]
    if foreign:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in foreign)
        raise NotRecordable(f"it reads tensors of shape {shapes} that neither its rows nor a component's buffers hold")


def _words(name: Hashable) -> str:
    parts = name if isinstance(name, tuple) else (name,)
    return " ".join(str(part) for part in parts if not isinstance(part, nn.Module))
