"""Steps that are taken again and again on rows of the same shape: recorded at first, then replayed without their Python."""

from __future__ import annotations

import re
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
from marlkit.recorder.guards import Guards, fits, misfits, pattern
from marlkit.recorder.python_values import is_own, same
from marlkit.recorder.reads import Reads
from marlkit.recorder.recording import Graph, NotRecordable, Recording, preserved, record
from marlkit.recorder.tape import whole_memory

ResultKey = TypeVar("ResultKey")
Step = Callable[[TensorDictBase], dict[ResultKey, Tensor]]

WORTH = 100
"""Replays that pay for a recording."""

SPARE = 4
"""Recordings of a step that need not be paid for, and as many are kept."""

COMPARED = frozenset(10**power for power in range(9))
"""In place of which replays of a recording the step itself is run."""

REMEDY = "hold in a buffer what changes and fill it in place"


@dataclass
class _Recorded:
    """A step as recorded under certain circumstances.

    Attributes:
        recording: its operations.
        run: takes the tensors of the rows.
        guards: what it has read of Python's state.
        looks: the function that it was recorded from, see :func:`marlkit.recorder.guards.pattern`.
        numbers: what the optimisers' parameter groups held, if it changes parameters; else nothing.
        afterwards: what Python does after the step's tensors.
        own: whether all code around is marlkit's own or a library's.
        replays: how often it was run.
        looked: the stretch of :meth:`StepRecorder.undisturbed` in which its guards have held already.
    """

    recording: Recording
    run: Callable[[Sequence[Tensor]], dict[Any, Tensor]]
    guards: Guards
    looks: Any
    numbers: list[Any]
    afterwards: list[Callable[[], None]]
    own: bool
    replays: int = 0
    looked: object = None

    def fits(self, step: Callable[..., Any], stretch: object) -> bool:
        """Whether the step still is what was recorded."""
        found = fits(step, self.looks) and self.guards.hold()
        self.looked = stretch if found and self.own else None
        return found

    def changed(self, step: Callable[..., Any]) -> list[str]:
        """Why not, by name."""
        return [*misfits(step, self.looks), *self.guards.changed()]


@dataclass
class _Known:
    """A step that has been met on rows of some shape.

    Attributes:
        recorded: its recordings, the one used last at the end.
        made: how many were made because Python's state had changed.
        replays: how often these were run.
    """

    recorded: list[_Recorded] = field(default_factory=list)
    made: int = 0
    replays: int = 0


class StepRecorder:
    """Runs steps of policies and of gradient descent as they are (mode `none`), recorded (`record`) or as CUDA graphs (`graph`).

    A step is first run once as it is, so that the optimiser makes its state, and then recorded. What it has read of Python's
    state is compared before each replay (:mod:`marlkit.recorder.guards`); where it has changed, the step is recorded anew, and if
    that happens too often to pay, run as it is from then on. So is a step that changes what Python holds. As there are things
    that cannot be seen to change, such as a file, steps in the place of replays number 1, 10, 100, … are run as they are, and
    compared with what a replay would have done. A warning tells of every step that is no longer recorded.

    Where no code of a user's runs between two replays, nothing can have changed: see :meth:`undisturbed`.

    Args:
        mode: how.
        module: holds all parameters and buffers.
        optimizers: those whose steps are taken. Where a number in their parameter groups changes, such as a learning rate,
            steps that change parameters are recorded anew.
        others: what else runs between the steps, beside these.
    """

    def __init__(
        self,
        mode: CompileMode,
        module: nn.Module,
        optimizers: Callable[[], Sequence[torch.optim.Optimizer]] = tuple,
        others: Sequence[object] = (),
    ) -> None:
        self.mode = mode
        self._module, self._optimizers, self._others = module, optimizers, others
        self._stretch: object = None
        self._known: dict[Hashable, _Known] = {}
        self._refused: set[Hashable] = set()
        self._deferred: list[Callable[[], None]] | None = None

    def __call__(self, name: Hashable, step: Step[ResultKey], rows: TensorDictBase) -> dict[ResultKey, Tensor]:
        """Take the step ``name`` on ``rows``, and what it has put off until after it."""
        if self.mode == "none" or name in self._refused:
            return self._as_it_is(step, rows)
        given = dict(rows.items(include_nested=True, leaves_only=True))
        kinds = tuple((key, tensor.shape, tensor.dtype) for key, tensor in given.items())
        known = (name, rows.batch_size, kinds, _circumstances())
        if known not in self._known:
            self._known[known] = _Known()
            return self._as_it_is(step, rows)
        try:
            recorded = self._recorded(self._known[known], step, given, rows.batch_size)
            number, recorded.replays = recorded.replays, recorded.replays + 1
            if number in COMPARED:
                return self._compared(name, recorded, number - number // 10 - 1, step, rows)
        except NotRecordable as error:
            self._refuse(name, str(error))
            return self._as_it_is(step, rows)
        results: dict[ResultKey, Tensor] = recorded.run(list(given.values()))
        if self.mode == "graph":
            results = {result: value.clone() for result, value in results.items()}
        for after in recorded.afterwards:
            after()
        return results

    def _as_it_is(self, step: Step[ResultKey], rows: TensorDictBase) -> dict[ResultKey, Tensor]:
        put_off: list[Callable[[], None]] = []
        with self._deferring(put_off):
            results = step(rows)
        for after in put_off:
            after()
        return results

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A stretch in which only the components run, not what called for them.

        If all components are marlkit's own or a library's, what a step reads of Python's state is compared once per stretch.
        """
        self._stretch = object()
        try:
            yield
        finally:
            self._stretch = None

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do what is Python after a step's tensors: after this step, and after each replay where it is being recorded."""
        if self._deferred is None:
            action()
        else:
            self._deferred.append(action)

    def _refuse(self, name: Hashable, reason: str) -> None:
        """Run a step as it is from now on."""
        self._refused.add(name)
        for known in [known for known in self._known if known[0] == name]:  # type: ignore[index]
            del self._known[known]
        message = f"the step `{_words(name)}` is not recorded, but run operation by operation: {reason}"
        warnings.warn(f"{message}. trainer.compile=none does so without a warning", stacklevel=3)

    # --- recordings ----------------------------------------------------------------------------------------------------------

    def _recorded(self, known: _Known, step: Step[Any], rows: dict[Key, Tensor], batch_size: torch.Size) -> _Recorded:
        """The recording for the circumstances of now; a new one if need be.

        Raises:
            NotRecordable: a step like this cannot be recorded, or not often enough to pay.
        """
        last = known.recorded[-1] if known.recorded else None
        if last is not None and self._has_been_looked_at(last) and fits(step, last.looks):
            known.replays += 1
            return last
        numbers = self._numbers() if any(recorded.numbers for recorded in known.recorded) else []
        known.recorded = [recorded for recorded in known.recorded if not recorded.numbers or _equal(recorded.numbers, numbers)]
        found = next((recorded for recorded in reversed(known.recorded) if recorded.fits(step, self._stretch)), None)
        if found is None:
            known.made += bool(known.recorded)
            if known.made > SPARE + known.replays // WORTH:
                places = _places(known.recorded[-1].changed(step))
                raise NotRecordable(f"{places}, which it reads, changes again and again: {REMEDY}")
            found = self._record(step, rows, batch_size)
            known.recorded = [*known.recorded[1 - SPARE :], found]
        elif found is not known.recorded[-1]:
            known.recorded.remove(found)
            known.recorded.append(found)
        known.replays += 1
        return found

    def _has_been_looked_at(self, recorded: _Recorded) -> bool:
        if recorded.looked is None or recorded.looked is not self._stretch:
            return False
        return not recorded.numbers or _equal(recorded.numbers, self._numbers())

    def _record(self, step: Step[Any], rows: dict[Key, Tensor], batch_size: torch.Size) -> _Recorded:
        def function(*given: Tensor) -> dict[Any, Tensor]:
            return step(TensorDict(dict(zip(rows, given, strict=True)), batch_size=batch_size, device=given[0].device))

        plain = [value for part in self._module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
        held = [*self._module.parameters(), *self._module.buffers(), *plain]
        own = [*held, *self._state()]
        afterwards: list[Callable[[], None]] = []
        reads = Reads(step, self._module.modules(), self._optimizers())
        try:
            with self._deferring(afterwards), reads:
                recording = record(function, _apart(rows.values()), own, undo=True)
        finally:
            changed = reads.changed()
            reads.put_back()
        if changed:
            raise NotRecordable(f"it changes {_places(changed)}, which Python holds and a replay would not change: {REMEDY}")
        _refuse_foreign(recording, own)
        memory, program = recording.program.memory, recording.program
        written = {tensor.untyped_storage()._cdata for tensor in program.written}
        learns = any(parameter.untyped_storage()._cdata in written for parameter in self._module.parameters())
        read = [tensor for tensor in held if tensor.untyped_storage()._cdata in memory]
        return _Recorded(
            recording,
            (Graph(recording, list(rows.values())) if self.mode == "graph" else recording).run,
            Guards(reads, read, self._optimizers() if learns else ()),
            pattern(step, memory),
            self._numbers() if learns else [],
            afterwards,
            not reads.of_user and all(is_own(type(other).__module__) for other in (*self._optimizers(), *self._others)),
        )

    def _compared(
        self, name: Hashable, recorded: _Recorded, uncertain: int, step: Step[ResultKey], rows: TensorDictBase
    ) -> dict[ResultKey, Tensor]:
        """Take a step as it is, and record it no more if a replay would have done something else.

        ``uncertain`` is the number of replays before it that nothing was compared with.
        """
        program = recorded.recording.program
        with preserved(program.written, program.generators):
            replayed = recorded.run(list(rows.values(include_nested=True, leaves_only=True)))
            replayed = {result: value.clone() for result, value in replayed.items()}
            memory = [whole_memory(tensor).clone() for tensor in program.written]
            generator = torch.get_rng_state()
        put_off: list[Callable[[], None]] = []
        with self._deferring(put_off):
            results = step(rows)
        exact = program.device.type == "cpu"
        agree = results.keys() == replayed.keys() and all(_agree(results[key], replayed[key], exact) for key in results)
        if agree and exact:
            agree = all(map(torch.equal, memory, map(whole_memory, program.written)))
            agree &= torch.equal(generator, torch.get_rng_state())
        for after in put_off:
            after()
        if not agree:
            already = f" (perhaps for {uncertain} steps already)" if uncertain > 0 else ""
            reason = "it does something else than when it was recorded, because it reads what cannot be seen to change, such as"
            self._refuse(name, f"{reason} the time or a file{already}: {REMEDY}")
        return results

    def _state(self) -> Iterator[Tensor]:
        """The tensors that an optimiser's step changes or takes in, the parameters aside."""
        for optimizer in self._optimizers():
            for held in (*optimizer.state.values(), *optimizer.param_groups):
                yield from (value for value in held.values() if isinstance(value, Tensor))

    def _numbers(self) -> list[Any]:
        """What else it takes in, and which tensors."""
        groups = [group for optimizer in self._optimizers() for group in optimizer.param_groups]
        return [value for group in groups for name, value in group.items() if name != "params"]

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


def _agree(one: Tensor, other: Tensor, exactly: bool) -> bool:
    tolerances = (0.0, 0.0) if exactly else (1e-3, 1e-5)  # a GPU may add in another order
    return one.shape == other.shape and one.dtype == other.dtype and torch.allclose(one, other, *tolerances, equal_nan=True)


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def _circumstances() -> tuple[Any, ...]:
    """What torch is told beside a step's rows, and a step may do otherwise for."""
    casts = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *casts


def _places(changed: Iterable[str]) -> str:
    """Some names, in quotes."""
    names = list(dict.fromkeys(re.sub(r"\._(?:parameters|buffers|modules)\['([^']*)'\]", r".\1", name) for name in changed))
    more = [f"{len(names) - 3} more"] * (len(names) > 4)
    return ", ".join([f"`{name}`" for name in (names[:3] if more else names)] + more)


def _refuse_foreign(recording: Recording, own: list[Tensor]) -> None:
    """Tensors that a closure has brought along would stay what they were when recorded.

    Raises:
        NotRecordable: the step reads one that neither its rows nor any module holds.
    """
    allowed = {tensor.untyped_storage()._cdata for tensor in own}
    foreign = [tensor for tensor in recording.program.foreign if tensor.untyped_storage()._cdata not in allowed]
    if foreign:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in foreign)
        raise NotRecordable(f"it reads tensors of shape {shapes} that neither its rows nor a component's buffers hold")


def _words(name: Hashable) -> str:
    parts = name if isinstance(name, tuple) else (name,)
    return " ".join(str(part) for part in parts if not isinstance(part, nn.Module))
