"""The strategy by which Lightning starts the ranks of a training; averages are computed in :mod:`marlkit.ranks`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import distributed

from marlkit.interrupts import LAUNCHER
from marlkit.ranks import reaching_others

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another that does not answer and is not known to have failed: longer than any evaluation."""

UNANSWERED = 5.0
"""Seconds in which the exchange with a rank that has ended fails by itself, with the better message."""


class RanksStrategy(DDPStrategy):
    """Lightning's DDP without the wrapper around the model.

    ``DistributedDataParallel`` averages in hooks of one backward pass that reaches every parameter. An iteration here has many
    backward passes, each of which reaches some parameters, and gradients that are never accumulated (trust regions).

    Raises:
        LostRankError: by every method that communicates: another rank has stopped.
    """

    strategy_name = "marlkit_ranks"

    def __init__(self) -> None:
        super().__init__(timeout=PATIENCE)

    def configure_ddp(self) -> None:
        """Do not wrap the model."""

    def setup_distributed(self) -> None:
        """Meet the other ranks."""
        with reaching_others(self.global_rank, self.world_size):
            super().setup_distributed()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the other ranks."""
        with reaching_others(self.global_rank, self.world_size):
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Plain data of rank ``src``."""
        with reaching_others(self.global_rank, self.world_size):
            return super().broadcast(obj, src)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = RanksLauncher(self.cluster_environment, self.num_processes, self.num_nodes)


class RanksLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, and ends the training when one of them ends too early.

    Lightning's own kills this process as soon as it sees that a rank has ended, most often before the error is shown.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the ranks and call ``function``; they end with it if it fails."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        over = threading.Event()
        if not self.cluster_environment.creates_processes_externally:
            os.environ[LAUNCHER] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[LAUNCHER]
            threading.Thread(target=self._watch, args=(over,), name="ranks", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except BaseException:
            self.kill(signal.SIGKILL)
            raise
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(0.5):
            codes = [child.poll() for child in self.procs]
            for rank, code in enumerate(codes, start=1):
                if code is None or (code == 0 and distributed.is_initialized()) or over.wait(UNANSWERED):
                    continue
                how = f"was killed by signal {-code}" if code < 0 else f"has ended with code {code}"
                self.kill(signal.SIGKILL)
                os.write(2, f"error: rank {rank} {how}; the training of all ranks has ended.\n".encode())
                os._exit(2)


class NoSignals(_SignalConnector):
    """Lightning's handlers of signals, none of them: see :mod:`marlkit.interrupts`.

    Its handler of SIGTERM exchanges data with the other ranks, while these, or this one, may be in another exchange.
    """

    def register_signal_handlers(self) -> None:
        """Leave the handlers as they are."""
