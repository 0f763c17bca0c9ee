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
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor

from marlkit.errors import CheckpointError
from marlkit.run.lock import partial_path

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
ZIP_START = b"PK\x03\x04"
OTHER_CHECKPOINT = "Use another checkpoint of the run, or train again."


class AtomicCheckpointIO(CheckpointIO):
    """Lightning plugin that saves with :func:`save_checkpoint` and loads with :func:`load_checkpoint`.

    Args:
        required: keys that a checkpoint of marlkit must hold.
    """

    def __init__(self, required: Collection[str] = ()) -> None:
        self.required = required

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """See :func:`save_checkpoint`."""
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: _PATH, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See :func:`load_checkpoint`; only plain data is loaded, whatever the value of ``weights_only``."""
        return load_checkpoint(path, map_location=map_location, required=self.required)

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
            f"{target}: not saved: `{where}` is a {type(value).__name__}; a checkpoint holds plain data and tensors."
        )
    partial = partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError.
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{target}: cannot be written ({error}). The file that was there before is unchanged.") from error


def load_checkpoint(path: str | os.PathLike[str], *, map_location: Any = "cpu", required: Collection[str] = ()) -> dict[str, Any]:
    """Read the checkpoint at ``path`` without executing anything in it.

    Args:
        path: the file.
        map_location: where its tensors go, as for :func:`torch.load`; ``None`` means the devices that they were saved from.
        required: keys that it must hold.

    Raises:
        CheckpointError: there is no such file, it is damaged, it holds more than plain data, or a required key is missing.
    """
    source = Path(path)
    _check_archive(source)
    try:
        checkpoint = torch.load(source, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{source}: refused: it holds more than plain data. Nothing in it was run. {OTHER_CHECKPOINT}"
        ) from error
    except Exception as error:  # whatever torch makes of damaged bytes
        raise CheckpointError(f"{source}: is damaged ({_first_line(error)}). {OTHER_CHECKPOINT}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{source}: holds a {type(checkpoint).__name__}, not a checkpoint. {OTHER_CHECKPOINT}")
    missing = [key for key in required if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{source}: is not a checkpoint of marlkit: it lacks {', '.join(missing)}. {OTHER_CHECKPOINT}")
    return checkpoint


def _check_archive(source: Path) -> None:
    """Refuse a file that is no checkpoint, or only a part of one."""
    if not source.is_file():
        what = "is a folder, not a checkpoint file" if source.is_dir() else "there is no such checkpoint"
        raise CheckpointError(f"{source}: {what}. Checkpoints of a run end in .ckpt.")
    with source.open("rb") as file:
        start = file.read(len(ZIP_START))
    if not ZIP_START.startswith(start):
        raise CheckpointError(
            f"{source}: refused: it is not an archive of plain data and tensors. Nothing in it was run. {OTHER_CHECKPOINT}"
        )
    if not zipfile.is_zipfile(source):
        raise CheckpointError(f"{source}: is damaged: its end is missing. {OTHER_CHECKPOINT}")


def _not_plain(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every part of ``value`` that a weights-only load would refuse, with its path."""
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            yield from _not_plain(key, f"{where} key {key!r}")
            yield from _not_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, entry in enumerate(value):
            yield from _not_plain(entry, f"{where}[{index}]")
    elif type(value) not in PLAIN and not isinstance(value, Tensor):
        yield where, value


def _sync_folder(folder: Path) -> None:
    """Flush the rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
