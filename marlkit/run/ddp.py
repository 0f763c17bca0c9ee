"""The strategy by which Lightning starts the ranks of a training; averages are computed in :mod:`marlkit.ranks`."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another that does not answer and is not known to have failed: longer than any evaluation."""


class RanksStrategy(DDPStrategy):
    """Lightning's DDP without the wrapper around the model.

    ``DistributedDataParallel`` averages in hooks of one backward pass that reaches every parameter. An iteration here has many
    backward passes, each of which reaches some parameters, and gradients that are never accumulated (trust regions).
    """

    strategy_name = "marlkit_ranks"

    def __init__(self) -> None:
        super().__init__(timeout=PATIENCE)

    def configure_ddp(self) -> None:
        """Do not wrap the model."""
