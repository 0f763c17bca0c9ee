"""A simulated world as plain data and tensors, and back: for exact resumption of a run.

The saved form holds no code and no class: objects are named by their path (:mod:`marlkit.envs._vmas.world_graph`) and filled
in the freshly built world of the same scenario. Tensors that share memory share it again afterwards.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from marlkit.envs._vmas.world_graph import _VALUES, Survey, survey
from marlkit.errors import MarlkitError
from marlkit.saved import LIST, MAPPING, Kind, at, is_plain, refuse_misfit, refuse_other_tensor

_CONTAINERS: dict[type, str] = {dict: "dict", list: "list", tuple: "tuple"}


def save_world(scenario: Any) -> dict[str, Any]:
    """Everything that a VMAS scenario and its world hold, loadable with ``torch.load(…, weights_only=True)``."""
    found = survey(scenario)
    tensors: list[Tensor] = []

    def encode(content: Any) -> Any:
        if isinstance(content, Tensor):
            tensors.append(content)
            return {"tensor": len(tensors) - 1}
        if isinstance(content, enum.Enum):
            return {"enum": content.name}
        if isinstance(content, _VALUES):
            return content
        name = found.names.get(id(content))
        return {"kept": True} if name is None else {"object": name}

    def encode_key(key: Any, position: int) -> Any:
        if isinstance(key, (str, int)):
            return key
        if isinstance(key, (tuple, frozenset)) and all(isinstance(part, (str, int)) for part in key):
            return {type(key).__name__: list(key)}
        return {"object": found.names[id(key)]} if id(key) in found.names else {"position": position}

    objects = {}
    for name, thing in found.objects.items():
        entries = [
            [encode_key(key, position), encode(content)] for position, (key, content) in enumerate(_held_by(thing).items())
        ]
        objects[name] = [_kind(thing), entries]
    return {"objects": objects, "tensors": copied(tensors)}


def restore_world(scenario: Any, saved: Mapping[str, Any], device: torch.device) -> None:
    """Fill a world of the same scenario, options and number of environments with what :func:`save_world` returned.

    Raises:
        MarlkitError: the saved world holds objects that this one has not got.
        CheckpointError: an entry is not what this world has there; names it. The world is unchanged.
    """
    refuse_misfit(saved, {"objects": MAPPING, "tensors": LIST}, "world")
    for index, tensor in enumerate(saved["tensors"]):
        plain = Kind("a plain tensor", lambda value: isinstance(value, Tensor) and is_plain(value))
        refuse_misfit(tensor, plain, f"world.tensors[{index}]")
    _Restoration(survey(scenario), saved["objects"], copied(saved["tensors"], device)).run()


class _Restoration:
    def __init__(self, found: Survey, saved: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        self.saved = saved
        self.tensors = tensors
        self.built: dict[str, Any] = {}
        self.tuples: dict[str, tuple[Any, ...]] = {}  # made once each, because several places may share one
        for name, (kind, _) in saved.items():
            thing = found.objects.get(name)
            if thing is None or _kind(thing) != kind:
                if kind not in _CONTAINERS.values():
                    raise MarlkitError(
                        f"the saved simulation holds `{name}`, a {kind}, which a newly built one has not got. It cannot be "
                        "resumed exactly: was it saved from another scenario, other options or another version of VMAS?"
                    )
                thing = {"dict": {}, "list": [], "tuple": ()}[kind]
            self.built[name] = thing
        self.before = {name: dict(_held_by(thing)) for name, thing in self.built.items()}

    def run(self) -> None:
        # All is decoded before anything is changed.
        decoded = {name: self._contents(name, entries) for name, (_, entries) in self.saved.items()}
        for name, (kind, entries) in self.saved.items():
            thing = self.built[name]
            if kind == "list":
                thing[:] = decoded[name].values()
            elif kind == "dict" or (kind != "tuple" and entries):
                holder = thing if kind == "dict" else vars(thing)
                holder.clear()
                holder.update(decoded[name])

    def _contents(self, name: str, entries: Sequence[Any]) -> dict[Any, Any]:
        before = self.before[name]
        contents = {}
        for code, content in entries:
            key = self._key(code, before)
            contents[key] = self._decode(content, before.get(key))
            _refuse_other_kind(contents[key], before.get(key), at(name, key if isinstance(key, (str, int)) else str(code)))
        return contents

    def _key(self, code: Any, before: Mapping[Any, Any]) -> Any:
        if not isinstance(code, dict):
            return code
        if "object" in code:
            return self.built[code["object"]]
        if "position" in code:
            return list(before)[code["position"]]
        return tuple(code["tuple"]) if "tuple" in code else frozenset(code["frozenset"])

    def _decode(self, code: Any, before: Any) -> Any:
        if not isinstance(code, dict):
            return code
        if "tensor" in code:
            return self.tensors[code["tensor"]]
        if "enum" in code:
            # The scenario's own enumerations stand where they were; VMAS' colours are the ones that a reset may change.
            return type(before)[code["enum"]] if isinstance(before, enum.Enum) else _colour(code["enum"])
        if "object" in code:
            return self._object(code["object"])
        return before

    def _object(self, name: str) -> Any:
        kind, entries = self.saved[name]
        if kind != "tuple":
            return self.built[name]
        if name not in self.tuples:
            contents = tuple(self._contents(name, entries).values())
            before = self.built[name]
            unchanged = len(before) == len(contents) and all(map(_same, before, contents))
            self.tuples[name] = before if unchanged else contents
        return self.tuples[name]


def _refuse_other_kind(found: Any, before: Any, where: str) -> None:
    """Refuse a tensor of another shape, and a value of another kind, than a world has there that is newly built.

    Not one of another type: scenarios hold whole numbers or booleans at first and compute with them.
    """
    if found is None or before is None:
        return
    if isinstance(before, Tensor):
        refuse_other_tensor(found, where, before.shape, getattr(found, "dtype", before.dtype))
    elif isinstance(before, (int, float, str)) and not isinstance(before, enum.Enum):
        numbers = isinstance(before, (int, float)) and type(found) in (int, float)
        if not numbers or bool in (type(before), type(found)):
            refuse_misfit(found, before, where)


def _same(first: Any, second: Any) -> bool:
    return first is second or (type(first) is type(second) and isinstance(first, _VALUES) and first == second)


def _held_by(thing: Any) -> dict[Any, Any]:
    if isinstance(thing, dict):
        return thing
    if isinstance(thing, (list, tuple)):
        return dict(enumerate(thing))
    return {} if isinstance(thing, (types.FunctionType, types.MethodType)) else getattr(thing, "__dict__", {})


def _kind(thing: Any) -> str:
    return next((kind for base, kind in _CONTAINERS.items() if isinstance(thing, base)), type(thing).__name__)


def _colour(name: str) -> Any:
    from vmas.simulator.utils import Color

    return Color[name]


def copied(tensors: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
    """Copies of tensors ``[*]``, on ``device``, that share memory with each other where the originals do."""
    storages: dict[int, Tensor] = {}  # by their identity: tensors without elements lie at the same address
    copies = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place not in storages:
            content = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            storages[place] = content.to(device or tensor.device, copy=True)
        copy = torch.empty(0, dtype=tensor.dtype, device=storages[place].device)
        memory = storages[place].untyped_storage()
        copies.append(copy.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride()))
    return copies
