"""A tape as a program: what of it has to run again, written out as straight-line Python.

Kept are operations that draw random numbers, write to memory that outlives the call, or lead to one of these or to an output.
What depends on nothing that varies is computed once and for all, and what is computed twice is computed once
(:mod:`marlkit.recorder.shared_results`). Views of memory that stays are taken once; other views are taken from the memory that
they look at, however long the chain of views was. Registers are dropped after their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlkit.recorder.shared_results import without_repeats
from marlkit.recorder.tape import NotRecordable, Operation, Register, Tape, leaves, spreads

_LITERALS = (bool, int, type(None))

_OF_TWO = frozenset(
    packet.Tensor
    for name in ("add", "sub", "mul", "div")
    for packet in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_"))
)
"""Operations whose second argument may be a number, which makes two tensors of it at every call."""

_AS_IT_IS = (torch.float32, torch.float64)
"""Types that are computed in as they are; with narrower ones a number takes part in single precision."""


class Program:
    """What of a tape has to run, given the registers that are returned at the end. Tensors are of any shape ``[*]``.

    Args:
        tape: a finished tape.
        outputs: registers to return.

    Attributes:
        entries: the operations that run at each replay.
        written: memory that existed before and is written to, one tensor each.
        tainted: memory whose content differs from replay to replay.

    Raises:
        NotRecordable: a value that differs from replay to replay decides what Python does, or a shape.
    """

    def __init__(self, tape: Tape, outputs: Sequence[int]) -> None:
        self.tape = tape
        self.outputs = list(outputs)
        self._returned = {tape.registers[register].storage for register in outputs}
        given = [index for index, memory in enumerate(tape.storages) if memory.given is not None]
        written = {storage for entry in tape.entries for storage in entry.writes}
        self.lasting = set(given) - {tape.registers[register].storage for register in tape.inputs}
        self.tainted = self._taint(tape.varying | (written & set(given)))
        self._refuse_decisions()
        if written & {tape.registers[register].storage for register in tape.inputs}:
            raise NotRecordable("the function writes to an input: let it write to a copy")
        self._changed = [storage for storage in given if storage in written]
        self.folded = self._foldable(written)
        self.entries = without_repeats(tape, self._needed(), self._returned)

    @property
    def written(self) -> list[Tensor]:
        """Memory that existed before and is written to, one tensor each."""
        return [memory.given for memory in map(self.tape.storages.__getitem__, self._changed) if memory.given is not None]

    @property
    def touched(self) -> set[int]:
        """The storages that its operations and its outputs look at."""
        seen = [
            register.number for entry in self.entries for register in leaves((entry.args, entry.kwargs, entry.outputs), Register)
        ]
        return {self.tape.registers[number].storage for number in [*seen, *self.outputs]}

    @property
    def memory(self) -> set[int]:
        """Addresses of the storages that existed before and that its operations and its outputs look at."""
        given = [self.tape.storages[storage].given for storage in self.touched]
        return {tensor.untyped_storage()._cdata for tensor in given if tensor is not None}

    @property
    def foreign(self) -> list[Tensor]:
        """Memory beside the inputs that existed before and was not made from Python values, one tensor each."""
        given = [memory.given for storage, memory in enumerate(self.tape.storages) if storage in self.lasting]
        return [t for t in given if t is not None and t.untyped_storage()._cdata not in self.tape.literals]

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that operations name; others draw from the global ones."""
        named = [value for entry in self.entries for value in entry.kwargs.values() if isinstance(value, torch.Generator)]
        return list({id(generator): generator for generator in named}.values())

    @property
    def device(self) -> torch.device:
        """Where it works: on the device of what varies."""
        return self.tape.storages[min(self.tainted)].device if self.tainted else torch.device("cpu")

    def outside(self, kind: str) -> str:
        """The first operation on varying memory that is not on a device of that kind, in words; empty if there is none."""
        for entry in self.entries:
            for storage in (*entry.reads, *entry.writes, *entry.creates):
                device = self.tape.storages[storage].device
                if storage in self.tainted and device.type != kind:
                    return f"`{entry.function}` works on what varies on the device `{device}`"
        return ""

    def _taint(self, tainted: set[int]) -> set[int]:
        """Memory that existed before and is written to is state: it counts as varying from the beginning."""
        tainted = set(tainted)
        for entry in self.tape.entries:
            if spreads(entry, tainted):
                entry.tainted = True
                tainted.update(entry.writes, entry.creates)
        return tainted

    def _refuse_decisions(self) -> None:
        for entry in self.tape.entries:
            if entry.decides and entry.tainted:
                raise NotRecordable(f"`{entry.function}` {entry.decides} that may differ at the next replay, at {entry.site}")

    def _foldable(self, written: set[int]) -> set[int]:
        """Memory made by the function from constants alone, and finished before anything that runs again reads it."""
        tape = self.tape
        constant = {i for i, m in enumerate(tape.storages) if m.given is not None and i not in written} - self.tainted
        foldable = {i for i, m in enumerate(tape.storages) if m.kept is not None} - self.tainted - self._returned
        last = {storage: position for position, entry in enumerate(tape.entries) for storage in entry.writes}
        before = -1
        while len(foldable) != before:
            before = len(foldable)
            for position, entry in enumerate(tape.entries):
                touched = {*entry.writes, *entry.creates}
                if touched and not entry.random and touched <= foldable and set(entry.reads) <= foldable | constant:
                    continue
                foldable -= touched
                if not entry.decides or touched:
                    foldable -= {storage for storage in entry.reads if last.get(storage, -1) > position}
        return foldable

    def _needed(self) -> list[Operation]:
        live = self.lasting | self._returned
        used: set[int] = set(self.outputs)
        kept = []
        for entry in reversed(self.tape.entries):
            touched = {*entry.writes, *entry.creates}
            if touched and touched <= self.folded:
                continue
            if entry.random or entry.checks or not live.isdisjoint(touched) or not used.isdisjoint(entry.views):
                arguments = [register.number for register in leaves((entry.args, entry.kwargs), Register)]
                live.update(self.tape.registers[number].storage for number in arguments)
                used.update(arguments)
                kept.append(entry)
        return kept[::-1]

    # --- writing it out ------------------------------------------------------------------------------------------------------

    def compile(self) -> Callable[..., list[Tensor]]:
        """The program as a Python function of the inputs that returns the outputs."""
        return _Writer(self).function()

    def standing(self, register: int) -> bool:
        """Whether a register looks at memory that is there before the program runs and stays."""
        storage = self.tape.registers[register].storage
        return storage in self.lasting or storage in self.folded

    def tensor(self, register: int) -> Tensor:
        """The tensor of a standing register."""
        geometry = self.tape.registers[register]
        memory = self.tape.storages[geometry.storage]
        held = memory.given if memory.given is not None else memory.kept
        assert held is not None
        if held.dtype == geometry.dtype:
            return torch.as_strided(held, geometry.sizes, geometry.strides, geometry.offset)
        place = geometry.offset, geometry.sizes, geometry.strides
        return torch.empty(0, dtype=geometry.dtype, device=held.device).set_(held.untyped_storage(), *place)


class _Line(NamedTuple):
    """A statement, the names of temporary registers that it defines, and those that it uses."""

    text: str
    defines: list[str]
    uses: list[str]


class _Writer:
    """Writes a program out, one line per operation."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tape = program.tape
        self.names: dict[str, Any] = {"as_strided": torch.as_strided}
        self.made = set(self.tape.inputs)
        self.lines: list[_Line] = []
        self.uses: list[str] = []

    def function(self) -> Callable[..., list[Tensor]]:
        for entry in self.program.entries:
            self._write(entry)
        results = [self._tensor(register) for register in self.program.outputs]
        heads = [f"r{register}" for register in self.tape.inputs]
        source = [f"def program({', '.join(heads)}):", *self._with_drops({*results, *heads}), f"return [{', '.join(results)}]"]
        exec(compile("\n    ".join(source), "<recorded operations>", "exec"), self.names)
        function: Callable[..., list[Tensor]] = self.names["program"]
        return function

    def _write(self, entry: Operation) -> None:
        arguments = [self._expression(argument) for argument in self._with_tensors_for_numbers(entry)]
        arguments += [f"{name}={self._expression(value)}" for name, value in entry.kwargs.items()]
        call = f"{self._constant(entry.call)}({', '.join(arguments)})"
        defined: list[str] = []
        targets = self._targets(entry.outputs, defined)
        self._add(f"{targets} = {call}" if defined else call, defined)

    def _with_tensors_for_numbers(self, entry: Operation) -> list[Any]:
        first, second, *others = entry.args if entry.function in _OF_TWO else (None, None)
        if not isinstance(first, Register) or type(second) not in (int, float):
            return list(entry.args)
        dtype = self.tape.registers[first.number].dtype
        return [first, torch.tensor(second, dtype=dtype) if dtype in _AS_IT_IS else second, *others]

    def _add(self, text: str, defines: list[str]) -> None:
        self.lines.append(_Line(text, defines, self.uses))
        self.uses = []

    def _targets(self, outputs: Any, defined: list[str]) -> str:
        """What the results are assigned to."""
        if isinstance(outputs, Register):
            if self.program.standing(outputs.number) or outputs.number in self.made:
                return "_"
            self.made.add(outputs.number)
            defined.append(f"r{outputs.number}")
            return defined[-1]
        if isinstance(outputs, list):
            return f"[{', '.join(self._targets(part, defined) for part in outputs)}]"
        return "_"

    def _expression(self, value: Any) -> str:
        if isinstance(value, Register):
            return self._tensor(value.number)
        if isinstance(value, list) and any(True for _ in leaves(value, Register)):
            return f"[{', '.join(map(self._expression, value))}]"
        return repr(value) if type(value) in _LITERALS else self._constant(value)

    def _tensor(self, register: int) -> str:
        """The name of a register; a view that is not there yet is taken first."""
        if self.program.standing(register):
            name = f"t{register}"
            if name not in self.names:
                self.names[name] = self.program.tensor(register)
            return name
        name = f"r{register}"
        if register not in self.made:
            geometry = self.tape.registers[register]
            outer, self.uses = self.uses, []
            memory = self._tensor(self.tape.storages[geometry.storage].anchor)
            sizes, strides = self._constant(geometry.sizes), self._constant(geometry.strides)
            self.made.add(register)
            self._add(f"{name} = as_strided({memory}, {sizes}, {strides}, {geometry.offset})", [name])
            self.uses = outer
        self.uses.append(name)
        return name

    def _constant(self, value: Any) -> str:
        name = f"k{id(value)}"
        self.names[name] = value
        return name

    def _with_drops(self, stay: set[str]) -> list[str]:
        """The statements, each followed by the deletion of what is not used after it."""
        last: dict[str, int] = {}
        for position, line in enumerate(self.lines):
            last.update(dict.fromkeys([*line.uses, *line.defines], position))
        dropped: dict[int, list[str]] = {}
        for name, position in last.items():
            if name not in stay:
                dropped.setdefault(position, []).append(name)
        texts = []
        for position, line in enumerate(self.lines):
            texts.append(line.text)
            if position in dropped:
                texts.append(f"del {', '.join(dropped[position])}")
        return texts
