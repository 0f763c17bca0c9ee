"""Operations of a program that compute what an earlier one has computed: done once.

Layers of Python that know nothing of each other ask for the same mask, the same sum of weights, the same stacked parameters.
Where they are replayed together, one result serves them all. Nothing else changes: not a bit of any number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from marlkit.recorder.tape import Operation, Register, Tape, leaves

SHARED_ELEMENTS = 2**17
"""Elements of the largest result that is kept for a repeated operation; a larger one may be computed again to spare memory."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def without_repeats(tape: Tape, entries: Sequence[Operation], returned: Collection[int]) -> list[Operation]:
    """The entries less those whose result an earlier one has; the others read that.

    Args:
        tape: where they are from; views of results that are read in the place of others are added to its registers.
        entries: in their order.
        returned: storages that leave the program, each of which stays memory of its own.
    """
    sharing = _Sharing(tape, {storage for entry in entries for storage in entry.writes} | set(returned))
    return [kept for entry in entries if (kept := sharing.kept(entry)) is not None]


class _Sharing:
    """Walks a program and remembers results.

    Args:
        tape: where the entries are from.
        excluded: storages that can neither be shared nor done without.
    """

    def __init__(self, tape: Tape, excluded: set[int]) -> None:
        self.tape = tape
        self.excluded = excluded | {g.storage for number, g in enumerate(tape.registers) if not tape.derivable(number)}
        self.register_of = {_geometry(tape, number, g.storage): number for number, g in enumerate(tape.registers)}
        self.instead: dict[int, int] = {}
        self.writes: Counter[int] = Counter()
        self.results: dict[Any, list[int]] = {}

    def kept(self, entry: Operation) -> Operation | None:
        """The entry with earlier results in its arguments; ``None`` if it only repeats one."""
        if self.instead:
            entry = replace(entry, args=self._redirected(entry.args), kwargs=self._redirected(entry.kwargs))
        self.writes.update(entry.writes)
        if not self._is_shareable(entry):
            return entry
        question = entry.function, self._content(entry.args), self._content(entry.kwargs)
        earlier = self.results.setdefault(question, entry.creates)
        if earlier is entry.creates:
            return entry
        self.instead.update(zip(entry.creates, earlier, strict=True))
        return None

    def _is_shareable(self, entry: Operation) -> bool:
        """Whether it makes memory, which is small and stays as it is, and always makes the same of the same.

        An operation that also writes never finds the same: its arguments have been written to once more.
        """
        if entry.random or not entry.creates or not self.excluded.isdisjoint(entry.creates):
            return False
        geometries = [self.tape.registers[register.number] for register in leaves(entry.outputs, Register)]
        return all(prod(geometry.sizes) <= SHARED_ELEMENTS for geometry in geometries)

    def _redirected(self, thing: Any) -> Any:
        if isinstance(thing, Register):
            return Register(self._register(thing.number))
        if isinstance(thing, (list, tuple)):
            return [self._redirected(part) for part in thing]
        if isinstance(thing, dict):
            return {key: self._redirected(part) for key, part in thing.items()}
        return thing

    def _register(self, number: int) -> int:
        """The register that looks at the same part of the storage that is read in place of its own."""
        geometry = self.tape.registers[number]
        storage = self.instead.get(geometry.storage)
        if storage is None:
            return number
        place = _geometry(self.tape, number, storage)
        if place not in self.register_of:
            self.register_of[place] = len(self.tape.registers)
            self.tape.registers.append(replace(geometry, storage=storage))
        return self.register_of[place]

    def _content(self, thing: Any) -> Any:
        """What decides a result: places and how often they have been written to, and plain values by type."""
        if isinstance(thing, Register):
            return Register, thing.number, self.writes[self.tape.registers[thing.number].storage]
        if isinstance(thing, (list, tuple)):
            return tuple(map(self._content, thing))
        if isinstance(thing, dict):
            return tuple((key, self._content(part)) for key, part in thing.items())
        return repr(thing) if isinstance(thing, _PLAIN) else id(thing)


def _geometry(tape: Tape, number: int, storage: int) -> tuple[Any, ...]:
    geometry = tape.registers[number]
    return storage, geometry.offset, geometry.sizes, geometry.strides, geometry.dtype
