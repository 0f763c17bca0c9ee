"""Steps that are taken again and again on rows of the same shape: recorded at first, then replayed without their Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit.component import Name
from marlkit.keys import Key
from marlkit.options import Mode
from marlkit.recording import Graph, NotRecordable, Recording, record

_PLAIN = (bool, int, float, str, type(None))


@dataclass
class _Known:
    """A step that has been met.

    Attributes:
        run: takes the tensors of the rows; ``None`` until the step is recorded.
        afterwards: what Python does after the step's tensors.
    """

    run: Callable[[Sequence[Tensor]], dict[Any, Tensor]] | None = None
    afterwards: list[Callable[[], None]] = field(default_factory=list)


class Repetition:
    """Runs steps of policies and of gradient descent as they are (mode `none`), recorded (`record`) or as CUDA graphs (`graph`).

    A step is first run once as it is, so that the optimiser makes its state, and then recorded. It has to take whatever changes
    from call to call from its rows and from parameters, buffers and the optimiser's state; one that does not, or that changes
    what Python holds, is never recorded, and a warning says why.

    Args:
        mode: how.
        module: holds all parameters and buffers.
        state: other tensors that change between steps.
        numbers: Python numbers that the steps take in, such as learning rates; where they change, steps are recorded anew.
    """

    def __init__(
        self, mode: Mode, module: nn.Module, state: Callable[[], Iterable[Tensor]], numbers: Callable[[], tuple[Any, ...]]
    ) -> None:
        self.mode = mode
        self._module, self._state, self._numbers = module, state, numbers
        self._known: dict[Hashable, _Known] = {}
        self._recorded_with: tuple[Any, ...] = ()
        self._refused: set[Hashable] = set()
        self._deferred: list[Callable[[], None]] | None = None

    def __call__(
        self, name: Hashable, step: Callable[[TensorDictBase], dict[Name, Tensor]], rows: TensorDictBase
    ) -> dict[Name, Tensor]:
        """Take the step ``name`` on ``rows``, and what it has put off until after it."""
        if self.mode == "none" or name in self._refused:
            return step(rows)
        given = dict(rows.items(include_nested=True, leaves_only=True))
        numbers = self._numbers()
        if numbers != self._recorded_with:
            self._known.clear()
            self._recorded_with = numbers
        known = (name, rows.batch_size, tuple((key, tensor.shape, tensor.dtype) for key, tensor in given.items()))
        if known not in self._known:
            self._known[known] = _Known()
            return step(rows)
        found = self._known[known]
        if found.run is None:
            try:
                self._record(found, step, given, rows.batch_size)
            except NotRecordable as error:
                self._refused.add(name)
                warnings.warn(f"the step `{_words(name)}` is not recorded, but run operation by operation: {error}", stacklevel=2)
                return step(rows)
        assert found.run is not None
        results: dict[Name, Tensor] = found.run(list(given.values()))
        if self.mode == "graph":
            results = {result: value.clone() for result, value in results.items()}
        for after in found.afterwards:
            after()
        return results

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do what is Python after a step's tensors: now, or after each replay where the step is being recorded."""
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

        before = _python_state(self._module)
        own = [*self._module.parameters(), *self._module.buffers(), *self._state()]
        with self._deferring(found.afterwards):
            recording = record(function, _apart(rows.values()), own, undo=True)
        _refuse_python_state(self._module, before)
        _refuse_foreign(recording, own, self._module)
        found.run = (Graph(recording, list(rows.values())) if self.mode == "graph" else recording).run

    @contextmanager
    def _deferring(self, actions: list[Callable[[], None]]) -> Iterator[None]:
        self._deferred = actions
        try:
            yield
        finally:
            self._deferred = None


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
    """What the modules hold in numbers, words, and lists and dicts of these."""
    return {
        (name, attribute): list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value
        for name, part in module.named_modules()
        for attribute, value in vars(part).items()
        if not attribute.startswith("_") and attribute != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(part, _PLAIN) for part in value)
    if isinstance(value, dict):
        return all(isinstance(part, _PLAIN) for part in value.values())
    return isinstance(value, _PLAIN)


def _refuse_python_state(module: nn.Module, before: dict[tuple[str, str], Any]) -> None:
    """Put back what Python held.

    Raises:
        NotRecordable: it is another than before.
    """
    changed = [place for place, value in _python_state(module).items() if place in before and value != before[place]]
    for name, attribute in changed:
        setattr(module.get_submodule(name), attribute, before[name, attribute])
    if changed:
        names = ", ".join(f"`{name}.{attribute}`".replace("`.", "`") for name, attribute in changed)
        raise NotRecordable(f"it changes {names}, which Python holds and a replay would not change")


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
    return " ".join(map(str, name)) if isinstance(name, tuple) else str(name)
