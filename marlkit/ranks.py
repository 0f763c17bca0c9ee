"""Processes that train one team together: each plays in its own environments, and all take the same optimiser steps.

Rank ``r`` of ``R`` has a batch of its own. A loss that is a mean over a batch becomes the mean over the batches of all ranks, and
with it its gradient: ``mean_r(share_r mean_r(x)) = sum_r(w_r x_r) / sum_r(w_r)`` with ``share_r = sum(w_r) / mean_r sum(w_r)``.
All quantities that change parameters are therefore averaged, or drawn in :meth:`Ranks.common`; other draws differ between ranks.
With one rank all methods are the identity.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from marlkit.errors import LostRankError, RunError
from marlkit.functional.reduce import masked_mean
from marlkit.saved import COUNT, refuse_misfit

STRIDE = 10_000_000
"""Difference of the seeds of consecutive ranks: larger than that between the seeds of evaluations and of training."""

DRIFT = 1e-3
"""Largest difference of parameters between ranks, relative to the largest: far above rounding, far below a missed step."""


def rank_seed(seed: int, rank: int) -> int:
    """The seed of the draws of ``rank`` alone; for the first rank that of the recipe."""
    return seed + rank * STRIDE


def is_first() -> bool:
    """Whether this process is the first rank, or the only process."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


class Ranks:
    """The ranks of a training, as seen by one of them; a single one until :meth:`join`.

    Every method but :meth:`common` is called by all ranks, in the same order and with tensors of the same shapes.

    Args:
        seed: of the recipe; also seeds the draws that all ranks share.

    Raises:
        LostRankError: by any method that communicates: another rank has stopped.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.index = 0
        self.size = 1
        self._stream = torch.Generator().manual_seed(seed + STRIDE // 2).get_state()
        self._plain: distributed.ProcessGroup | None = None

    def join(self) -> None:
        """Become one of the ranks of torch's process group, which must have been initialised."""
        self.index, self.size = distributed.get_rank(), distributed.get_world_size()
        if self.size > 1 and distributed.get_backend() != "gloo":
            # Plain data stays on the CPU, which other backends do not support.
            self._plain = distributed.new_group(backend="gloo")

    # --- means ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors ``[*]`` by their means over the ranks, in one exchange; the result is bit-identical on all ranks."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._exchange():
            distributed.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of ``tensor`` ``[*]`` over the ranks, without gradient."""
        if self.size == 1:
            return tensor
        mean = tensor.detach().clone()
        self.mean_([mean])
        return mean

    def mean_each(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of every scalar ``[]`` over the ranks."""
        if self.size == 1 or not values:
            return values
        stacked = self.mean(torch.stack([value.detach().float() for value in values.values()]))
        return dict(zip(values, stacked.unbind(), strict=True))

    def share(self, weight: Tensor, dtype: torch.dtype) -> Tensor | float:
        """``share_r``, a scalar ``[]``: the factor of the mean over this rank's entries of ``weight`` ``[*]``."""
        if self.size == 1:
            return 1.0
        count = weight.detach().sum().to(dtype)
        return count / self.mean(count).clamp(min=1 / self.size)

    def weigh(self, weight: Tensor, value: Tensor) -> Tensor:
        """``share_r value``, whose mean over the ranks is the mean over the entries of all ranks.

        Args:
            weight: weights of the entries on this rank, ``[*]``.
            value: their weighted mean, ``[]``; keeps its gradient.
        """
        return value if self.size == 1 else value * self.share(weight, value.dtype)

    def masked_mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """:func:`marlkit.functional.reduce.masked_mean` over the entries ``[*]`` of all ranks; with several, without gradient."""
        return self.mean(self.weigh(weight, masked_mean(x, weight)))

    # --- equality -------------------------------------------------------------------------------------------------------

    @contextmanager
    def common(self) -> Iterator[None]:
        """Within the block torch's CPU generator draws the same numbers on every rank; with one rank it has no effect."""
        if self.size == 1:
            yield
            return
        own = torch.get_rng_state()
        torch.set_rng_state(self._stream)
        try:
            yield
        finally:
            self._stream = torch.get_rng_state()
            torch.set_rng_state(own)

    @torch.no_grad()
    def align(self, parameters: Iterable[Tensor]) -> None:
        """Set parameters ``[*]`` to those of the first rank, from which they may differ by rounding on a GPU.

        Raises:
            RunError: they differ by more than rounding: a component draws outside :meth:`common`, or takes steps on gradients
                that are not averaged.
        """
        own = list(parameters)
        if self.size == 1 or not own:
            return
        flat = torch.cat([parameter.reshape(-1) for parameter in own])
        first = flat.clone()
        with self._exchange():
            distributed.broadcast(first, 0)
        apart = ((flat - first).abs().max() / first.abs().max().clamp(min=1.0)).nan_to_num(nan=0.0)
        with self._exchange():
            distributed.all_reduce(apart, distributed.ReduceOp.MAX)
        if apart > DRIFT:
            raise RunError(
                f"the parameters of the {self.size} ranks differ by {apart.item():.2g} of the largest. A component of the recipe "
                "changes parameters by draws or gradients of one rank alone; set trainer.devices=1 and trainer.nodes=1."
            )
        for parameter, value in zip(own, first.split([parameter.numel() for parameter in own]), strict=True):
            parameter.copy_(value.view_as(parameter))

    # --- plain data -----------------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Plain data and tensors of every rank, on the CPU, in the order of the ranks; an empty list on all but the first."""
        if self.size == 1:
            return [value]
        buffer = io.BytesIO()
        torch.save(value, buffer)
        packed: list[Any] | None = [None] * self.size if self.index == 0 else None
        with self._exchange():
            distributed.gather_object(buffer.getvalue(), packed, group=self._plain)
        return [torch.load(io.BytesIO(each), map_location="cpu", weights_only=True) for each in packed or []]

    def from_first(self, value: Any) -> Any:
        """Small plain data of the first rank, on every rank."""
        if self.size == 1:
            return value
        held = [value]
        with self._exchange():
            distributed.broadcast_object_list(held, 0, group=self._plain)
        return held[0]

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over the ranks, in one exchange."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with self._exchange():
            distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._plain)
        return found.tolist()

    def state_dict(self) -> dict[str, Any]:
        """The number of ranks, and the state of the generator that they share."""
        return {"size": self.size, "stream": self._stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            RunError: it is from another number of ranks, or no such state.
        """
        refuse_misfit(state, {"size": COUNT, "stream": self._stream}, "marlkit.ranks")
        if state["size"] != self.size:
            raise RunError(
                f"this run was trained by {state['size']} ranks and cannot be resumed by {self.size}: every rank has "
                "environments and data of its own. Set trainer.devices and trainer.nodes in its recipe.yaml as they were."
            )
        self._stream = state["stream"].cpu()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        with reaching_others(self.index, self.size):
            yield


@contextmanager
def reaching_others(index: int, size: int) -> Iterator[None]:
    """A block in which rank ``index`` of ``size`` communicates.

    Raises:
        LostRankError: another rank has stopped.
    """
    try:
        yield
    except RuntimeError as error:
        # Without the source location at the start of gloo's message, and without its advice.
        reason = re.sub(r"^\[\S*\]\s*", "", str(error).strip()).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise LostRankError(
            f"rank {index} of {size} can no longer reach the others: one of them has stopped ({reason}). Its own message names "
            "the cause. `marlkit resume <run>` continues from the last checkpoint."
        ) from error


ALONE = Ranks()
"""A training of one process."""
