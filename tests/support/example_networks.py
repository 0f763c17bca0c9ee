"""Networks as users may write them, named in recipes by dotted path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

if TYPE_CHECKING:
    # tensordict has no types.
    TypedTensorDictModule = nn.Module
else:
    TypedTensorDictModule = TensorDictModule


class ReadsKeys(TypedTensorDictModule):
    """A module of tensordict: one linear map of a key.

    Args:
        inputs, outputs: numbers of features.
        key: what it reads, its parts joined by dots.
        extra: whether it writes a second key.
    """

    def __init__(self, inputs: int, outputs: int, key: str = "agents.observation", extra: bool = False) -> None:
        written = ["result", "more"] if extra else ["result"]
        super().__init__(_Twice(inputs, outputs) if extra else nn.Linear(inputs, outputs), [tuple(key.split("."))], written)


class _Twice(nn.Linear):
    def forward(self, features: Tensor) -> Any:
        once = super().forward(features)
        return once, once


class ValueOfState(TypedTensorDictModule):
    """A module of tensordict: the state ``[*, S]`` as it is in the batch, to a value of each of ``n`` agents."""

    def __init__(self, state: int, n: int) -> None:
        super().__init__(nn.Sequential(nn.Linear(state, n), nn.Unflatten(-1, (n, 1))), ["state"], ["value"])


class CountsRows(nn.Linear):
    """A linear map with running statistics that only training changes."""

    rows: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """``[*, inputs]`` to ``[*, outputs]``."""
        if self.training:
            self.rows += len(features)
        return super().forward(features)


def make_linear(inputs: int, outputs: int) -> nn.Module:
    """No class."""
    return nn.Linear(inputs, outputs)
