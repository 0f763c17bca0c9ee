"""When a run is saved: the last state each minute, at the end and on a signal, the best after the best evaluation so far.

The best is that of the largest value of one metric. Where none is named, every evaluation is taken to be better than the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Checkpoint

from marlkit.interrupts import Interrupts
from marlkit.run.metrics_file import EVALUATION_RETURN
from marlkit.training.learner import Learner

LAST = "last.ckpt"
BEST = "best.ckpt"


class Checkpoints(Checkpoint):
    """Saves between iterations only, where the state is consistent, after all other callbacks of the iteration.

    There it also ends the training on a signal that any of the ranks has received; see :class:`marlkit.interrupts.Interrupts`.

    Args:
        folder: folder of the checkpoints.
        seconds: time between checkpoints of the last state.
        monitor: the metric of the evaluations whose largest value is the best; ``None``: the latest evaluation is.
        clock: seconds since some fixed time.
        interrupts: the signals of this process; ``None``: none.

    Attributes:
        ended_by: the signal that has ended the training, on every rank; 0 if none has.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float,
        monitor: str | None = EVALUATION_RETURN,
        clock: Callable[[], float] = time.monotonic,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.folder = folder
        self.seconds = seconds
        self.monitor = monitor
        self.clock = clock
        self.interrupts = Interrupts() if interrupts is None else interrupts
        self.best = float("-inf")
        self.ended_by = 0
        self._saved = clock()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """From here on signals wait for the end of an iteration."""
        assert isinstance(pl_module, Learner)
        self.folder = Path(pl_module.ranks.from_first(str(self.folder)))
        self.interrupts.begin(self.folder.parent, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Save if the interval has passed, or if the evaluation is the best so far."""
        assert isinstance(pl_module, Learner)
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        best = self._best(trainer, pl_module)
        due = last or self.clock() - self._saved >= self.seconds
        # All ranks save together, and all end on a signal, or none does.
        best, save, signum = pl_module.ranks.largest((best, due, self.interrupts.received))
        if signum:
            self.ended_by = int(signum)
            self.interrupts.save(self.ended_by)
            trainer.should_stop = True
        if best > self.best:
            self.best = best
            trainer.save_checkpoint(self.folder / BEST, weights_only=False)
        if save or signum:
            trainer.save_checkpoint(self.folder / LAST, weights_only=False)
            self._saved = self.clock()
        self.interrupts.iteration_over(saved=bool(save or signum))

    def _best(self, trainer: lightning.Trainer, learner: Learner) -> float:
        """The largest value so far; without a metric, the iteration of the latest evaluation."""
        if self.monitor is None:
            return float(learner.iteration) if learner.is_evaluated() else self.best
        return max(self.best, float(trainer.callback_metrics.get(self.monitor, self.best)))

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and of what."""
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the best of another metric does not count."""
        if state_dict.get("monitor", EVALUATION_RETURN) == self.monitor:
            self.best = state_dict["best"]
