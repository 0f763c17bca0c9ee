"""Checkpoints that a kill cannot damage and that cannot run code.

A checkpoint is written under another name, flushed to the disk and then renamed, which is atomic: the file of the checkpoint's
name is the old one or the new one, never a part of one. It holds plain data and tensors only, checked on saving and on loading,
so that opening an untrusted run executes no code.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor

from marlkit.errors import CheckpointError, CheckpointWriteError, WriteError, writing
from marlkit.run.checkpoints import LAST
from marlkit.run.files import partial_path, sync_folder
from marlkit.saved import REMEDY, described, inventory, is_plain, refuse_altered

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
ZIP_START = b"PK\x03\x04"
INVENTORY = "inventory"
"""The entry of a checkpoint that lists the others, see :func:`marlkit.saved.inventory`."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning plugin that saves with :func:`save_checkpoint` and loads with :func:`load_checkpoint`.

    Args:
        required: keys that a checkpoint of marlkit must hold.
    """

    def __init__(self, required: Collection[str] = ()) -> None:
        self.required = required
        self.device: Any = "cpu"
        """Where tensors are loaded to, whatever device they were saved from."""
        self.before_saving: Callable[[], None] | None = None
        """Called before each checkpoint is written: what it follows has to be on the disk before it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """See :func:`save_checkpoint`; an inventory of what is saved is added."""
        if self.before_saving is not None:
            self.before_saving()
        save_checkpoint({**checkpoint, INVENTORY: _listed(checkpoint)}, path)

    def load_checkpoint(self, path: _PATH, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See :func:`load_checkpoint`; only plain data is loaded, whatever the value of ``weights_only``.

        Raises:
            CheckpointError: also if an entry is not what was saved.
        """
        checkpoint = load_checkpoint(path, map_location=map_location or self.device, required=self.required)
        refuse_altered_checkpoint(checkpoint, path)
        return checkpoint

    def remove_checkpoint(self, path: _PATH) -> None:
        """Delete the file at ``path`` if there is one."""
        Path(path).unlink(missing_ok=True)


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``checkpoint`` to ``path``; when this returns, it survives a kill and a power cut.

    Raises:
        CheckpointError: it holds something that :func:`load_checkpoint` would refuse, or it cannot be written; a checkpoint
            that is already at ``path`` is unchanged.
    """
    target = Path(path)
    for where, value in _not_plain(checkpoint, "checkpoint"):
        raise CheckpointError(
            f"{target}: not saved: `{where}` is {_of_type(value)}; a checkpoint holds plain data and plain tensors."
        )
    partial = partial_path(target)
    with _saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                torch.save(dict(checkpoint), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        except (OSError, RuntimeError):
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def _saving(target: Path) -> Iterator[None]:
    kept = "The file that was there before is unchanged." if target.exists() else ""
    try:
        with writing(target, kept):
            yield
    except WriteError as error:
        raise CheckpointWriteError(str(error)) from error
    except RuntimeError as error:
        # How torch reports a full disk.
        raise CheckpointWriteError(f"{target}: cannot be written ({_first_line(error)}). {kept}") from error


def load_checkpoint(path: str | os.PathLike[str], *, map_location: Any = "cpu", required: Collection[str] = ()) -> dict[str, Any]:
    """Read the checkpoint at ``path`` without executing anything in it.

    Args:
        path: the file.
        map_location: where its tensors go, as for :func:`torch.load`.
        required: keys that it must hold.

    Raises:
        CheckpointError: there is no such file, it is damaged, it holds more than plain data, or a required key is missing.
    """
    source = Path(path)
    with of_file(source):
        _check_archive(source)
        checkpoint = _plain_data(source, map_location)
        if not isinstance(checkpoint, dict):
            raise CheckpointError(f"holds a {type(checkpoint).__name__}, not a checkpoint.")
        missing = [key for key in required if key not in checkpoint]
        if missing:
            raise CheckpointError(f"is not a checkpoint of marlkit: it lacks {', '.join(missing)}.")
        return checkpoint


def refuse_altered_checkpoint(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], parts: Sequence[str] | None = None
) -> None:
    """Hold a checkpoint to the inventory that was made when it was saved; older ones have none.

    Args:
        checkpoint: what was loaded from ``path``.
        path: the file, for the message.
        parts: the entries at its top to look at; ``None``: all that are or were there.

    Raises:
        CheckpointError: an entry is missing, too many, or not what it was.
    """
    noted = checkpoint.get(INVENTORY)
    everything = {*checkpoint, *(str(name).partition(".")[0].partition("[")[0] for name in noted or {})} - {INVENTORY}
    with of_file(path):
        refuse_altered(_without_recipe(checkpoint), noted, sorted(map(str, everything)) if parts is None else parts)


def _listed(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    return inventory(_without_recipe(checkpoint))


def _without_recipe(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What the inventory lists: the recipe is compared with that of the run instead."""
    own = checkpoint.get("marlkit")
    rest = {name: value for name, value in own.items() if name != "recipe"} if isinstance(own, dict) else own
    return {**checkpoint, "marlkit": rest} if "marlkit" in checkpoint else dict(checkpoint)


@contextmanager
def of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say of a :class:`CheckpointError` within the block which file it is about, and what to do.

    Raises:
        CheckpointError: with the name of the file.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error} {_remedy(Path(path))}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error


def _remedy(source: Path) -> str:
    """Another checkpoint of the run, if there is a whole one."""
    for other in sorted(source.parent.glob("*.ckpt")):
        if other.name != source.name and zipfile.is_zipfile(other) and _first_damaged(other) is None:
            goes_on = f", and training goes on from it once it is copied to {LAST}" if source.name == LAST else ""
            return f"{other.name} beside it is whole: `--checkpoint {other.stem}` uses it{goes_on}."
    return REMEDY


def _check_archive(source: Path) -> None:
    """Refuse a file that is no checkpoint, only a part of one, or not what was written."""
    if not source.is_file():
        what = "is a folder, not a checkpoint file" if source.is_dir() else "there is no such checkpoint"
        raise CheckpointError(f"{what}. Checkpoints of a run end in .ckpt.")
    with source.open("rb") as file:
        start = file.read(len(ZIP_START))
    if not ZIP_START.startswith(start):
        raise CheckpointError("refused: it is not an archive of plain data and tensors. Nothing in it was run.")
    if not zipfile.is_zipfile(source):
        raise CheckpointError("is damaged: its end is missing.")
    damaged = _first_damaged(source)
    if damaged is not None:
        raise CheckpointError(f"is damaged: the bytes of its part {damaged} have changed since they were written.")


def _first_damaged(source: Path) -> str | None:
    """The first part of an archive whose checksum is wrong; torch itself does not compare them."""
    try:
        with zipfile.ZipFile(source) as archive:
            return archive.testzip()
    except Exception as error:  # whatever zipfile makes of damaged bytes
        return f"list ({_first_line(error)})"


def _plain_data(source: Path, map_location: Any) -> Any:
    try:
        loaded = torch.load(source, map_location=map_location, weights_only=True)
        for where, value in _not_plain(loaded, "checkpoint"):
            raise CheckpointError(f"refused: `{where}` is {_of_type(value)}; a checkpoint holds plain data and plain tensors.")
    except pickle.UnpicklingError as error:
        raise CheckpointError("refused: it holds more than plain data. Nothing in it was run.") from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch makes of damaged bytes
        raise CheckpointError(f"is damaged ({_first_line(error)}).") from error
    return loaded


def _not_plain(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every part of ``value`` that a weights-only load would refuse, with its path."""
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            yield from _not_plain(key, f"{where} key {key!r}")
            yield from _not_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, entry in enumerate(value):
            yield from _not_plain(entry, f"{where}[{index}]")
    elif not is_plain(value) if isinstance(value, Tensor) else type(value) not in PLAIN:
        yield where, value


def _of_type(value: Any) -> str:
    return described(value) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
