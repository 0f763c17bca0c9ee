"""Functions of tensors without their Python: recorded once, replayed as a list of ATen operations or as a CUDA graph.

A step of a simulated world or of an optimiser issues hundreds to thousands of operations on small tensors. What takes time is
not their arithmetic but Python, autograd's bookkeeping and, on a GPU, their launches. :func:`record` runs such a function once
and writes its operations down (:mod:`marlkit.recorder.tape`); what has to run again becomes a straight-line program
(:mod:`marlkit.recorder.program`), which on CUDA can be captured as one graph (:class:`Graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marlkit import rng
from marlkit.errors import MarlkitError
from marlkit.recorder.program import Program
from marlkit.recorder.tape import NotRecordable, Register, Tape, whole_memory

__all__ = ["Graph", "NotRecordable", "Recording", "preserved", "record"]


class Recording:
    """A recorded function; made by :func:`record`. Its inputs and results are tensors of any shape ``[*]``.

    Attributes:
        first: what the recorded run returned, detached; ``None`` if the run was undone. Yours to delete.
        operations: number of operations that a replay runs.
        program: which operations these are, and on what memory they work.
        read: of each input, whether any operation or result looks at it.
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor], results: tuple[list[Any], pytree.TreeSpec]) -> None:
        self.first: Any = None
        self.program = program
        self.operations = len(program.entries)
        self._program = program.compile()
        read = program.touched
        self.read = [program.tape.registers[register].storage in read for register in program.tape.inputs]
        self._kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        self._leaves, self._structure = results
        self._names = _names(results)
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Register)]

    def replay(self, *inputs: Tensor) -> Any:
        """Do again what the function did, on other inputs and on what the varying memory holds now.

        Returns:
            what the function returned, in the same structure; tensors are new where the function made new ones. What it
            returned beside tensors is what it was when recorded.

        Raises:
            MarlkitError: the inputs are of another shape, type or device than those recorded.
        """
        self.refuse_unfit(inputs)
        return self.run(inputs)

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """As :meth:`replay`, for inputs that are known to fit."""
        compact = [_compact(tensor) if read else tensor for tensor, read in zip(inputs, self.read, strict=True)]
        return self.structured(self.outputs(compact))

    def outputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that :meth:`replay` returns, in the order of its structure, for inputs that also are compact."""
        with torch.no_grad(), _without_autocast():
            return self._program(*inputs)

    def structured(self, outputs: Sequence[Tensor]) -> Any:
        """Tensors in the structure that the function returned."""
        if self._names is not None:
            return dict(zip(self._names, outputs, strict=True))
        leaves = list(self._leaves)
        for place, output in zip(self._places, outputs, strict=True):
            leaves[place] = output
        return pytree.tree_unflatten(leaves, self._structure)

    def refuse_unfit(self, inputs: Sequence[Tensor]) -> None:
        """Look whether inputs are of the kind recorded.

        Raises:
            MarlkitError: they are of another shape, type or device.
        """
        kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        if kinds != self._kinds:
            here, there = (", ".join(map(_described, each)) or "nothing" for each in (kinds, self._kinds))
            raise MarlkitError(f"the recorded function takes {there}, and not {here}; record it anew for other inputs")


def record(function: Callable[..., Any], inputs: Sequence[Tensor], varying: Iterable[Tensor], *, undo: bool = False) -> Recording:
    """Run ``function(*inputs)``, whose tensors are of any shape ``[*]``, once and write down its operations.

    The run is a real one: it changes what the function changes, and its results are in ``Recording.first``. With ``undo``,
    memory that existed before and torch's generators are put back after it (attributes of Python objects are not).

    What is Python in the function is done once and for all: branches, loops, numbers that it computes, attributes that it sets.
    References to tensors made in the function must therefore not be relied on after a replay: an optimiser's recorded step
    changes parameters and its state in place, but ``.grad`` of the parameters is what the recorded run left. A function that
    makes its state when it is first called (an optimiser does) must have been called once before. Memory that existed before is
    read where it is at each replay; what is computed from memory that is neither varying nor written to is computed once.

    Args:
        function: takes tensors and returns a nested structure of tensors. It may run `backward` and step an optimiser.
        inputs: handed to it now; others of the same shape, type and device are handed to each replay. They share memory with
            nothing, and the function does not write to them. Kept as contiguous tensors.
        varying: tensors that exist already and whose content may differ at the next replay: state, parameters, hyperparameters.
            Memory that the function writes to counts as such in any case.
        undo: whether to leave everything as it was.

    Raises:
        NotRecordable: the function reads values that may differ at the next replay, or makes shapes depend on them.
    """
    inputs = [_compact(tensor.detach()) for tensor in inputs]
    generators = rng.state()
    tape = Tape(inputs, list(varying), undo)
    try:
        with tape:
            result = function(*inputs)
        leaves, structure = pytree.tree_flatten(result)
        first = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        marked = [Register(tape.register(leaf, given=True)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        drawn = rng.drawn_since(generators)
    finally:
        if undo:
            tape.rewind()
            rng.restore(generators)
    if drawn & {"numpy", "python"}:
        raise NotRecordable("it draws random numbers from numpy or Python")
    program = Program(tape, [leaf.number for leaf in marked if isinstance(leaf, Register)])
    recording = Recording(program, inputs, (marked, structure))
    recording.first = None if undo else pytree.tree_unflatten(first, structure)
    return recording


class Graph:
    """A recording captured as one CUDA graph, for tensors of any shape ``[*]``: a replay costs one launch.

    Args:
        recording: what to capture.
        inputs: inputs to warm up with.
        warm_ups: replays before the capture, in which libraries choose their algorithms and allocate their workspaces.

    Memory that is written to and the random generators are afterwards as they were before.

    Raises:
        NotRecordable: the recording cannot be captured, because something in it works outside the GPU or waits for it.
    """

    def __init__(self, recording: Recording, inputs: Sequence[Tensor], warm_ups: int = 3) -> None:
        self.recording = recording
        program = recording.program
        site = program.outside("cuda")
        if site or not torch.cuda.is_available():
            raise NotRecordable(f"it cannot be a CUDA graph: {site or 'there is no CUDA device'}")
        recording.refuse_unfit(inputs)
        self._inputs = [_compact(tensor).clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        for generator in program.generators:
            self._graph.register_generator_state(generator)
        stream = torch.cuda.Stream(program.device)
        with torch.cuda.device(program.device), preserved(program.written, program.generators):
            try:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(warm_ups):
                        recording.outputs(self._inputs)
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(self._graph, stream=stream):
                    self._outputs = recording.outputs(self._inputs)
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                raise NotRecordable(f"it cannot be captured as a CUDA graph: {reason}") from error

    def replay(self, *inputs: Tensor) -> Any:
        """As :meth:`Recording.replay`, but the tensors returned are always the same: the next replay overwrites them.

        Raises:
            MarlkitError: the inputs are of another shape, type or device than those recorded.
        """
        self.recording.refuse_unfit(inputs)
        return self.run(inputs)

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """As :meth:`replay`, for inputs that are known to fit."""
        for static, tensor, read in zip(self._inputs, inputs, self.recording.read, strict=True):
            if read:
                static.copy_(tensor)
        self._graph.replay()
        return self.recording.structured(self._outputs)


@contextmanager
def preserved(tensors: Iterable[Tensor], generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Put back, after the block, what the tensors ``[*]`` hold, and the states of these and of all global random generators."""
    whole = {tensor.untyped_storage()._cdata: whole_memory(tensor) for tensor in tensors}
    saved = {address: memory.clone() for address, memory in whole.items()}
    drawn, own = rng.state(), [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        for address, memory in whole.items():
            memory.copy_(saved[address])
        rng.restore(drawn)
        for generator, state in own:
            generator.set_state(state)


def _names(results: tuple[list[Any], pytree.TreeSpec]) -> list[Any] | None:
    """The names of results that are a dict of tensors, which needs no more than them to be made again."""
    leaves, structure = results
    numbered = pytree.tree_unflatten(range(len(leaves)), structure)
    flat = type(numbered) is dict and list(numbered.values()) == list(range(len(leaves)))
    return list(numbered) if flat and all(isinstance(leaf, Register) for leaf in leaves) else None


def _compact(tensor: Tensor) -> Tensor:
    """A tensor that begins at the beginning of its memory and fills it without gaps."""
    tensor = tensor.contiguous()
    return tensor if tensor.storage_offset() == 0 else tensor.clone()


@contextmanager
def _without_autocast() -> Iterator[None]:
    """What was cast was recorded; casting it again would change it."""
    active = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    if not active:
        yield
        return
    with ExitStack() as stack:
        for device in active:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _described(kind: tuple[torch.Size, torch.dtype, torch.device]) -> str:
    shape, dtype, device = kind
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
