"""Splitting a rollout into shuffled minibatches, of single steps or of sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase

from marlkit.errors import OptionError


def units(batch: TensorDictBase, sequence_length: int | None) -> TensorDictBase:
    """A rollout ``[B, T]`` as rows ``[B T]`` or, for recurrent actors, as sequences ``[B T / L, L]``.

    Raises:
        OptionError: T is no multiple of L.
    """
    if sequence_length is None:
        # A rollout is stored time-major: flattened in this order it is a view, not a copy.
        in_order = batch if batch.batch_size[1] == 1 else batch.transpose(0, 1)
        return in_order.flatten(0, 1)
    steps = batch.batch_size[1]
    refuse_unfit_length(steps, sequence_length)
    return batch.reshape(batch.batch_size[0] * (steps // sequence_length), sequence_length)


def refuse_unfit_length(steps: int, sequence_length: int | None) -> None:
    """Refuse a rollout of ``steps`` steps that is not a whole number of sequences.

    Raises:
        OptionError: it is not.
    """
    if sequence_length is not None and steps % sequence_length:
        raise OptionError("sequence_length", f"must divide the {steps} steps of a rollout, got {sequence_length}")


def minibatches(rows: TensorDictBase, size: int | None) -> Iterator[TensorDictBase]:
    """Minibatches of rows ``[R]`` or ``[R, L]``: every row once, in random order, about ``size`` joint steps each.

    ``size`` ``None``, or at least the whole: all rows at once, in order.
    """
    sequence_length = 1 if rows.batch_dims == 1 else rows.batch_size[1]
    if size is None or size >= rows.batch_size.numel():
        yield rows
        return
    order = torch.randperm(len(rows), device=rows.device)
    for index in order.split(max(1, size // sequence_length)):
        yield rows[index]
