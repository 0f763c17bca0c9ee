"""The recent past of every step of a batch, for components that model behaviour from it."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.functional import history
from marlkit.keys import Key

SHOWN: dict[Key, Key] = {keys.RECENT_OBSERVATION: keys.OBSERVATION, keys.RECENT_ACTION: keys.ACTION}
"""What the recent past shows of a step."""

PAST = (*SHOWN.values(), keys.IS_FIRST)
"""What has to be kept of a step so that those after it can be shown it."""


def write_recent(batch: TensorDict, steps: TensorDict, missing: Tensor | int, length: int) -> None:
    """Write ``RECENT_*`` of every step of a batch and of its ``next``.

    The past of ``next`` ends with the step itself; it is that of the state before any reset. What does not belong to the running
    episode, or is not there, is zero and not valid.

    Args:
        batch: ``[B, T]``, written to.
        steps: ``[M + T, B]``, the keys :data:`PAST` of the steps of the batch and of the M steps before them.
        missing: how many of the M do not exist, from the oldest on: one number or ``[B]``.
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
