"""The tensors and values inside a simulated world, wherever they are held: found, named, copied row by row, saved, restored.

VMAS keeps the state of a batch of environments in attributes of many objects: entities, actions, dynamics, controllers,
sensors, joints, scripted policies, the scenario itself, and lists and dicts of these. :func:`survey` walks that graph of
objects breadth first and names every place by its path, entities first, so that the same place has the same name in two
worlds of one scenario, even where a reset points a reference (an agent's goal) at another entity.
"""

from __future__ import annotations

import enum
import types
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlkit.errors import MarlkitError

_VALUES: tuple[type, ...] = (bool, int, float, str, type(None))
_OPAQUE = (
    *(type, torch.Size, torch.device, torch.dtype, torch.Generator, bytes, complex, range, set, frozenset),
    *(types.ModuleType, types.BuiltinFunctionType),
)


_EMPTY_CELL = types.CellType()


class Slot(NamedTuple):
    """Where a tensor or a value is held: ``owner[key]``, a list's, a dict's or an object's ``__dict__``'s entry."""

    owner: Any
    key: Any
    content: Any


@dataclass
class Survey:
    """What a world holds.

    Attributes:
        objects: everything that holds something (objects, lists, tuples, dicts, closures), by name.
        names: the name of each of them, by ``id``.
        tensors: the places of the tensors, by name.
        values: the places of numbers, words, ``None`` and references to objects, by name; empty unless requested.
    """

    objects: dict[str, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, Slot] = field(default_factory=dict)
    values: dict[str, Slot] = field(default_factory=dict)


def survey(scenario: Any, *, values: bool = False) -> Survey:
    """Walk everything that a VMAS scenario and its world refer to."""
    found = Survey()
    names, objects = found.names, found.objects
    queue: deque[tuple[str, Any]] = deque()

    def meet(name: str, thing: Any) -> None:
        if id(thing) not in names:
            names[id(thing)] = name
            objects[name] = thing
            queue.append((name, thing))

    meet("world", scenario.world)
    for kind in ("landmarks", "agents"):
        for index, entity in enumerate(getattr(scenario.world, kind)):
            meet(f"{kind}[{index}]", entity)
    meet("scenario", scenario)
    while queue:
        name, thing = queue.popleft()
        owner, entries = _entries(thing)
        for position, (key, content) in enumerate(entries):
            role = _ROLES.get(type(content)) or _role(type(content))
            if role == "opaque" or (role == "value" and not values):
                continue
            label = f"{name}.{key}" if owner is not thing else f"{name}[{_label(key, position, names)}]"
            if role == "tensor":
                found.tensors[label] = Slot(owner, key, content)
                continue
            if role == "object":
                meet(label, content)
            if values:
                found.values[label] = Slot(owner, key, content)
    return found


def _role(kind: type) -> str:
    """How contents of a type are treated; cached, because a survey needs it thousands of times."""
    if issubclass(kind, Tensor):
        role = "tensor"
    elif issubclass(kind, (*_VALUES, enum.Enum)):
        role = "value"
    else:
        role = "opaque" if issubclass(kind, _OPAQUE) else "object"
    return _ROLES.setdefault(kind, role)


_ROLES: dict[type, str] = {}


def _entries(thing: Any) -> tuple[Any, Iterable[tuple[Any, Any]]]:
    """What ``thing`` holds as ``(key, content)``, and the list or dict in which it does."""
    if isinstance(thing, dict):
        return thing, thing.items()
    if isinstance(thing, (list, tuple)):
        return thing, enumerate(thing)
    if isinstance(thing, types.MethodType):
        return None, [("self", thing.__self__)]
    if isinstance(thing, types.FunctionType):
        cells = enumerate(thing.__closure__ or ())
        return None, [(f"closure{position}", cell.cell_contents) for position, cell in cells if cell != _EMPTY_CELL]
    holder = getattr(thing, "__dict__", {})
    return holder, holder.items()


def _label(key: Any, position: int, names: Mapping[int, str]) -> str:
    return f"{key}" if isinstance(key, (str, int, tuple)) else names.get(id(key), f"#{position}")


# --- which tensors have a row per environment --------------------------------------------------------------------------------

NOT_BATCHED = -1
"""In place of an axis: the tensor has no row per environment."""


def learn_axes(smaller: Survey, larger: Survey, sizes: tuple[int, int]) -> dict[str, int]:
    """The axis of every tensor that follows the number of environments, from two worlds that differ in nothing else.

    Raises:
        MarlkitError: a tensor follows it in another way, or a Python container does, so that its rows cannot be identified.
    """
    axes = {}
    for name in smaller.tensors.keys() & larger.tensors.keys():
        shapes = [tuple(world.tensors[name].content.shape) for world in (smaller, larger)]
        differing = [axis for axis, pair in enumerate(zip(*shapes, strict=False)) if pair[0] != pair[1]]
        axes[name] = differing[0] if differing else NOT_BATCHED
        same_rank = len(shapes[0]) == len(shapes[1])
        if not same_rank or len(differing) > 1 or any((shapes[0][axis], shapes[1][axis]) != sizes for axis in differing):
            raise MarlkitError(
                f"the scenario's tensor `{name}` has shape {shapes[0]} for {sizes[0]} environments and {shapes[1]} for "
                f"{sizes[1]}: its rows cannot be told apart. Give it one axis with one entry per environment"
            )
    for name in smaller.objects.keys() & larger.objects.keys():
        held = [world.objects[name] for world in (smaller, larger)]
        if all(isinstance(thing, (list, tuple, dict)) for thing in held) and tuple(map(len, held)) == sizes:
            raise MarlkitError(
                f"the scenario keeps one entry per environment in the Python container `{name}`, which cannot be reset "
                "together with the tensors. Keep that state in a tensor with one row per environment"
            )
    return axes


class _Row(NamedTuple):
    """A tensor of which some rows are to be overwritten, and by what."""

    place: Slot
    fresh: Tensor
    rows: Tensor
    axis: int


def copy_rows(source: Survey, target: Survey, axes: Mapping[str, int], rows: Tensor, start: int) -> None:
    """Overwrite ``rows`` ``[R]`` of every per-environment tensor of ``target`` by as many rows of ``source`` from ``start`` on.

    Tensors that share memory go on sharing it wherever what is written agrees. A tensor that ``source`` has not got (one that
    only an event of an episode creates) is left as it is.

    Raises:
        MarlkitError: a tensor's shape changes during an episode.
    """
    sharing: dict[int, list[_Row]] = {}
    for name, place in target.tensors.items():
        fresh = source.tensors.get(name)
        if fresh is None:
            continue
        axis = axes.get(name)
        if axis is None:
            axis = _conventional_axis(place.content, source)
        if axis == NOT_BATCHED:
            continue
        if fresh.content.shape != place.content.shape:
            shapes = f"{tuple(place.content.shape)}, and {tuple(fresh.content.shape)} after a reset"
            raise MarlkitError(f"the scenario's tensor `{name}` has shape {shapes}: its rows cannot be reset")
        written = _turned(fresh, place, axis).narrow(axis, start, rows.numel())
        sharing.setdefault(place.content.untyped_storage().data_ptr(), []).append(_Row(place, fresh.content, written, axis))
    for group in sharing.values():
        _write(group, rows)


def _conventional_axis(content: Tensor, source: Survey) -> int:
    """The axis of a tensor that appeared after the axes were learnt: the leading one, by the simulator's convention."""
    batch = source.objects["world"].batch_dim
    return 0 if content.ndim > 0 and content.shape[0] == batch else NOT_BATCHED


def _turned(fresh: Slot, place: Slot, axis: int) -> Tensor:
    """The content of ``fresh``; a ring of past values ``[T, B, …]`` is turned so that its latest lands on the latest one here.

    A ring counts its next free place in ``pointer``, beside the buffer (the histories of `road_traffic`).
    """
    content: Tensor = fresh.content
    if axis != 1 or not isinstance(place.owner, dict):
        return content
    there, here = fresh.owner.get("pointer"), place.owner.get("pointer")
    return content.roll(here - there, 0) if isinstance(there, int) and isinstance(here, int) else content


def _write(group: Sequence[_Row], rows: Tensor) -> None:
    """Write to tensors that share one storage."""
    if _shares_alike(group):
        for row in group:
            row.place.content.index_copy_(row.axis, rows, row.rows)
        return
    by_memory: dict[tuple[Any, ...], list[_Row]] = {}
    for row in group:
        by_memory.setdefault(_memory(row.place.content), []).append(row)
    for alike in by_memory.values():
        agree = all(torch.equal(alike[0].rows, row.rows) for row in alike[1:])
        if agree and len(by_memory) == 1 and not _overlaps_itself(alike[0].place.content):
            alike[0].place.content.index_copy_(alike[0].axis, rows, alike[0].rows)
            continue
        for together in [alike] if agree else [[row] for row in alike]:
            _replace(together, rows)


def _replace(together: Sequence[_Row], rows: Tensor) -> None:
    """Hold a new tensor in all these places."""
    first = together[0]
    content = first.place.content
    if content.stride(first.axis) == 0 and torch.equal(first.rows, content.narrow(first.axis, 0, 1).expand_as(first.rows)):
        return  # one value for all rows, before and after: a constant that was expanded
    replacement = content.clone(memory_format=torch.contiguous_format).index_copy_(first.axis, rows, first.rows)
    for row in together:
        row.place.owner[row.place.key] = replacement


def _shares_alike(group: Sequence[_Row]) -> bool:
    """Whether the fresh tensors share memory just as the tensors that they are written to."""
    if any(_overlaps_itself(row.place.content) for row in group):
        return False
    if len(group) == 1:
        return True
    storages = {row.fresh.untyped_storage().data_ptr() for row in group}
    return len(storages) == 1 and all(_memory(row.fresh) == _memory(row.place.content) for row in group)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _overlaps_itself(tensor: Tensor) -> bool:
    return 0 in tensor.stride() and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


# --- what all environments of a batch share ----------------------------------------------------------------------------------


def share(source: Survey, target: Survey, axes: Mapping[str, int]) -> None:
    """Make ``target`` equal to ``source`` in all that has no row per environment.

    These are counters, flags, references (which landmark is the goal of the whole batch), recorded values. Where a ring of
    past values stands is a matter of its own buffer and stays. Both surveys must hold the values.
    """
    rings = {id(place.owner) for name, place in target.tensors.items() if axes.get(name, NOT_BATCHED) > 0}
    for name, place in target.values.items():
        other = source.values.get(name)
        if other is None or not isinstance(place.owner, (dict, list)) or id(place.owner) in rings:
            continue
        content = _counterpart(other.content, source, target, place.content)
        if content is not place.content:
            place.owner[place.key] = content
    for name, place in target.tensors.items():
        other = source.tensors.get(name)
        if other is None or axes.get(name) != NOT_BATCHED or _overlaps_itself(place.content):
            continue
        if other.content.shape == place.content.shape:
            place.content.copy_(other.content)


def _counterpart(content: Any, source: Survey, target: Survey, current: Any) -> Any:
    if isinstance(content, enum.Enum):
        return type(current)[content.name] if isinstance(current, enum.Enum) else content
    if isinstance(content, _VALUES):
        return content
    return target.objects.get(source.names[id(content)], current)
