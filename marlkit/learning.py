"""What an update is given to learn with: how to take an optimiser step, how to repeat one, what to log.

Functions of tensors and protocols; the components that they speak of stand in :mod:`marlkit.component`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit.ranks import ALONE, Ranks
from marlkit.recorder.steps import ResultKey

if TYPE_CHECKING:
    from marlkit.component import Actor, Critic, Opponents

Metrics = dict[str, Tensor]
"""Scalars to log, detached, on the device; reading them is left to the end of the iteration."""


Afterwards = Callable[[Callable[[], None]], None]
"""Runs what is Python after a step, such as a count: when the step is over, and after each replay of it."""


def at_once(action: Callable[[], None]) -> None:
    """The :data:`Afterwards` where nothing is put off."""
    action()


class RunStep(Protocol):
    """Runs a step that is repeated many times."""

    def __call__(
        self, name: Hashable, step: Callable[[TensorDictBase], dict[ResultKey, Tensor]], rows: TensorDictBase, /
    ) -> dict[ResultKey, Tensor]:
        """``step(rows)``.

        Args:
            name: the same for steps that do the same, and different for others.
            step: takes what changes from call to call from ``rows``, parameters, buffers and the optimiser. What it reads of
                Python's state and finds changed costs a new recording, or the recording altogether.
            rows: what it works on.
        """


def run_directly(
    name: Hashable, step: Callable[[TensorDictBase], dict[ResultKey, Tensor]], rows: TensorDictBase, /
) -> dict[ResultKey, Tensor]:
    """The :class:`RunStep` that records nothing: ``step(rows)``, rows ``[*]``."""
    return step(rows)


def mean_metrics(history: Sequence[Metrics]) -> Metrics:
    """The mean over several updates of each metric that any of them has."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    return {name: torch.stack([metrics[name] for metrics in history if name in metrics]).mean() for name in names}


class Adjust(Protocol):
    """Changes gradients after they were clipped and before the optimiser's step."""

    def __call__(self) -> None:
        """Write to the ``grad`` of parameters."""


class Minimise(Protocol):
    """Takes one optimiser step."""

    def __call__(self, loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        """One step on every parameter that ``loss`` reaches, and on no other.

        Args:
            loss: scalar; it must reach the same parameters on every rank.
            max_grad_norm: what the gradient of each component is clipped to; ``None``: not.
            adjust: called between clipping and the step.

        Returns:
            The norms of the gradients before clipping, by component.
        """


@dataclass(frozen=True)
class Learning:
    """What an update works on.

    Attributes:
        actor, critic, opponents: the components whose parameters it may change.
        minimise: takes an optimiser step.
        progress: share of the training that is done, in [0, 1].
        run_step: runs a step that is repeated on rows of the same shape; it may replay the operations of the first time
            without their Python (:mod:`marlkit.recorder.steps`).
        afterwards: runs what is Python after a step, such as a count: when the step is over, and after each replay of it.
        moved: called with the names of the components that an update has changed without ``minimise``, so that targets follow.
        ranks: the processes that train together, over which ``minimise`` averages gradients. Means that a loss is made of are
            weighed, statistics and steps without ``minimise`` averaged, and draws that decide parameters made in common there.
    """

    actor: Actor
    critic: Critic
    opponents: Opponents
    minimise: Minimise
    progress: float | Tensor
    moved: Callable[[Sequence[str]], None] = lambda changed: None
    ranks: Ranks = ALONE
    run_step: RunStep = run_directly
    afterwards: Afterwards = at_once
