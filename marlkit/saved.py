"""What a saved state has to look like: held against an inventory of what was saved, and against what it is loaded into.

A checkpoint that fits is loaded, any other is refused by the name of the first entry that does not fit, before anything of it is
used: a fused kernel trusts the shapes that it is given.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlkit.errors import CheckpointError, MarlkitError

REMEDY = "Use another checkpoint of the run, or train again."


@dataclass(frozen=True)
class Kind:
    """In place of an example: what an entry must be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


COUNT = Kind("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < 2**53)
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
TEXT = Kind("text", lambda value: type(value) is str)
MAPPING = Kind("a dict", lambda value: isinstance(value, dict))
TENSOR = Kind("a tensor", lambda value: isinstance(value, Tensor))
ANY = Kind("anything", lambda _: True)
LIST = Kind("a list", lambda value: isinstance(value, list))


def at(where: str, key: Any) -> str:
    """The name of an entry inside the entry ``where``."""
    if not isinstance(key, str):
        return f"{where}[{key}]"
    return f"{where}.{key}" if where else key


def described(value: Any) -> str:
    """A value in few words: a tensor by type and shape, a number by itself."""
    if isinstance(value, Kind):
        return value.words
    if isinstance(value, Tensor):
        kind = "" if is_plain(value) else f"{str(value.layout).removeprefix('torch.')} "
        return f"a {kind}tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}, {text[:40]}…"


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor ``[*]`` is nothing but numbers in memory: not sparse, quantised, nested or of a class of its own."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta or tensor.is_conj() or tensor.is_neg())
    )


def refuse_misfit(found: Any, example: Any, where: str, *, finite: bool = False, exact: bool = True) -> None:
    """Hold a saved entry to an example of it: keys, lengths, types of values, shapes and types of tensors; not the values.

    Args:
        found: what was saved.
        example: what it is loaded into, or a :class:`Kind`; dicts, lists and tuples may hold either.
        where: name of the entry.
        finite: whether infinity is refused too where the example holds none; NaN always is.
        exact: whether dicts hold no further keys and lists are of the same length; otherwise only what both hold is compared, and
            ``None`` stands for any value that is no dict.

    Raises:
        CheckpointError: names the first entry that differs, what it is and what would fit.
    """
    if not exact and (found is None or example is None) and not isinstance(example, (Kind, Mapping)):
        return
    if isinstance(example, Kind):
        _refuse(example.fits(found), where, found, example)
    elif isinstance(example, Mapping):
        _refuse(isinstance(found, Mapping), where, found, example)
        for key in example:
            if key not in found:
                raise CheckpointError(f"lacks `{at(where, key)}`, {described(example[key])}.")
        surplus = [key for key in found if key not in example] if exact else []
        if surplus:
            raise CheckpointError(f"holds `{at(where, surplus[0])}`, {described(found[surplus[0]])}, which is not known here.")
        for key, value in example.items():
            refuse_misfit(found[key], value, at(where, key), finite=finite, exact=exact)
    elif isinstance(example, (list, tuple)):
        _refuse(type(found) is type(example) and (not exact or len(found) == len(example)), where, found, example)
        for index, (own, value) in enumerate(zip(found, example, strict=False) if exact else ()):
            refuse_misfit(own, value, f"{where}[{index}]", finite=finite, exact=exact)
    elif isinstance(example, Tensor):
        refuse_other_tensor(found, where, example.shape, example.dtype, example)
        _refuse_not_finite(found, example, where, finite=finite)
    else:
        whole = type(example) is float and type(found) is int
        _refuse(type(found) is type(example) or whole, where, found, example)


def refuse_other_tensor(found: Any, where: str, shape: Sequence[int], dtype: torch.dtype, words: Any = None) -> None:
    """Refuse what is no plain tensor of this shape and type.

    Raises:
        CheckpointError: names the entry ``where``.
    """
    fits = isinstance(found, Tensor) and is_plain(found) and tuple(found.shape) == tuple(shape) and found.dtype == dtype
    _refuse(fits, where, found, torch.empty(tuple(shape), dtype=dtype, device="meta") if words is None else words)


def refuse_nan(found: Tensor, where: str) -> None:
    """Refuse a tensor ``[*]`` that holds NaN.

    Raises:
        CheckpointError: names the entry ``where``.
    """
    if found.is_floating_point() and found.isnan().any():
        raise CheckpointError(f"`{where}` holds NaN.")


def _refuse_not_finite(found: Tensor, example: Tensor, where: str, *, finite: bool) -> None:
    if not found.is_floating_point():
        return
    if not example.isnan().any():
        refuse_nan(found, where)
    if finite and not found.isfinite().all() and example.isfinite().all():
        raise CheckpointError(f"`{where}` holds infinity.")


def _refuse(fits: bool, where: str, found: Any, example: Any) -> None:
    if not fits:
        word = example if isinstance(example, (Kind, Tensor, dict, list, tuple)) else Kind(f"a {type(example).__name__}", bool)
        raise CheckpointError(f"`{where}` is {described(found)}, where {described(word)} fits.")


@contextmanager
def named(where: str) -> Iterator[None]:
    """Say of an error within the block which entry it is about; whatever code meets in damaged data becomes such an error.

    Raises:
        CheckpointError: in place of any error.
    """
    try:
        yield
    except MarlkitError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:  # whatever code makes of data that it does not expect
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{where}: {type(error).__name__}: {reason}.") from error


# --- the inventory -----------------------------------------------------------------------------------------------------------

SHORT = 60
"""Longer texts are noted by their checksum."""


def inventory(value: Any, where: str = "") -> dict[str, str]:
    """Every entry of plain data by name, with what it is: a tensor by type and shape, all else by its value or checksum."""
    if isinstance(value, Mapping) and value:
        return {name: text for key, entry in value.items() for name, text in inventory(entry, at(where, key)).items()}
    if isinstance(value, (list, tuple)) and _holds_tensors(value):
        kind = {where: f"a {type(value).__name__} of {len(value)}"}
        return kind | {name: text for i, entry in enumerate(value) for name, text in inventory(entry, f"{where}[{i}]").items()}
    return {where: _noted(value)}


def refuse_altered(found: Mapping[str, Any], noted: Any, parts: Sequence[str]) -> None:
    """Refuse a saved state that no longer holds what its inventory lists.

    Args:
        found: the saved state.
        noted: its inventory; ``None`` where it was saved without one.
        parts: the entries at the top of it to look at, each with all that it holds.

    Raises:
        CheckpointError: names the first entry that is not as it was saved.
    """
    if noted is None:
        return
    refuse_misfit(noted, MAPPING, "the inventory")
    present = inventory({part: found[part] for part in parts if part in found})
    listed = {name: text for name, text in noted.items() if str(name).partition(".")[0].partition("[")[0] in parts}
    for name in [*listed, *present]:
        if listed.get(name) != present.get(name):
            was, now = (entries.get(name, "not there") for entries in (listed, present))
            raise CheckpointError(f"has been altered: `{name}` was {was} when it was saved, and is {now}.")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensors, value)))


def _noted(value: Any) -> str:
    if isinstance(value, Tensor):
        return described(value)
    text = _text(value)
    return text if len(text) <= SHORT else f"a {type(value).__name__} with checksum {zlib.crc32(text.encode()):08x}"


def _text(value: Any) -> str:
    """The same text for equal values; a set has no order of its own."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, set):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if type(value) in (list, tuple):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    return repr(value)
