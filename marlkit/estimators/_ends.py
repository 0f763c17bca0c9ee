"""The ends that an estimator goes by: of each agent where the environment tells them, else of the episode."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys


def terminated_and_done(batch: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Of a batch ``[B, T]``: ``[B, T, N, 1]`` where agents may end before the episode does, else ``[B, T, 1]``."""
    terminated, done = (batch.get(key, None) for key in keys.AGENT_ENDS)
    if terminated is None or done is None:
        return batch[keys.TERMINATED], batch[keys.DONE]
    return terminated, done
