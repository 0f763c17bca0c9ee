"""The recent past of every step of a batch, for components that model behaviour."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.functional import history
from marlkit.keys import Key

SHOWN: dict[Key, Key] = {keys.RECENT_OBSERVATION: keys.OBSERVATION, keys.RECENT_ACTION: keys.ACTION}
"""The keys of the recent past, and the key of a step that each holds."""

PAST = (*SHOWN.values(), keys.IS_FIRST)
"""The keys of a step that the recent past of later steps needs."""


def write_recent(batch: TensorDict, steps: TensorDict, missing: Tensor | int, length: int) -> None:
    """Write ``RECENT_*`` of every step of a batch and of its ``next``.

    The past of ``next`` ends with the step itself; it is that of the state before any reset. Steps that do not belong to the
    running episode, or do not exist, are zero and not valid.

    Args:
        batch: ``[B, T]``, written to.
        steps: ``[M + T, B]``, the keys :data:`PAST` of the steps of the batch and of the M steps before them.
        missing: how many of the oldest of the M steps do not exist: one number or ``[B]``.
        length: M.
    """
    valid = history.in_episode_of_last(steps[keys.IS_FIRST].squeeze(-1), missing, length)
    written: dict[Key, Tensor] = {keys.RECENT_VALID: valid}
    for recent, key in SHOWN.items():
        shown = history.windows(steps[key], length)
        written[recent] = shown.masked_fill_(~valid.view(*valid.shape, *[1] * (shown.dim() - valid.dim())), 0)
    for recent, shown in written.items():
        before = shown.transpose(0, 1)
        batch.set(recent, before[:, :, :-1]).set(keys.following(recent), before[:, :, 1:])
