"""Signals that ask a process to end: Ctrl-C, `kill`, the time limit of a cluster, a terminal that was closed.

A training acts on them between two iterations, where it can be saved. Python runs handlers of signals in the main thread, between
two of its instructions: never while that thread waits in C++ for another rank, and an exception that a handler raises may hit a
library inside a lock, which then nobody releases. So the handlers here raise nothing while a training runs. Python also writes
the number of each signal to a socket, at once and whatever the main thread does; a thread reads it and keeps the time.
"""

from __future__ import annotations

import _thread
import atexit
import os
import select
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from marlkit.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

LONGEST_ITERATION = 8.0
"""Seconds after a signal in which the running iteration has to end, or the process ends without it: clusters kill after 30."""
LONGEST_SAVE = 25.0
"""Seconds after a signal in which the state has to be saved once the iteration has ended."""
SAME = 0.25
"""Seconds in which signals are one: `timeout` and launchers send again what the terminal has already sent to every process."""
NOTICE = 1.0
"""Seconds after a signal in which most trainings have ended, so that nothing is said before."""
UNWINDING = 1.5
"""Seconds for an exception to leave a training, before the process ends whatever holds it."""
ORPHANED = 5.0
"""Seconds in which a rank notices by itself that the one that started it is gone."""

LAUNCHER = "MARLKIT_LAUNCHER"
"""Environment variable: the process that has started this rank."""

Stage = Literal["idle", "training", "saving"]


class Interrupts:
    """What signals do to this process, from :meth:`listen` to :meth:`leave`.

    While a training runs, the first signal is noted in ``received`` for :class:`marlkit.run.checkpoints.Checkpoints` to act on. A
    second one ends the process at once, and so does an iteration that is not over after :data:`LONGEST_ITERATION`. At other times
    there is nothing to save: a signal does at once what it did before.

    Args:
        owner: whether the process is the command's own. A signal that acts at once then ends the process, with a line that says
            how to go on; in a process of the user it does what the handler before did, such as raising ``KeyboardInterrupt``.

    Attributes:
        received: the first signal, or 0.
        run: the run folder, to name it.
        rank: of this process.
        saved: the number of iterations in the last checkpoint; ``None`` without one.
        before_exit: called before the process is ended, such as to end the ranks that it has started.
    """

    def __init__(self, *, owner: bool = False) -> None:
        self.owner = owner
        self.received = 0
        self.run: Path | None = None
        self.rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.saved: int | None = None
        self.before_exit: Callable[[], None] = lambda: None
        self._stage: Stage = "idle"
        self._iteration = 0
        self._seconds = 0.0
        self._ended = time.monotonic()
        self._since = 0.0
        self._noticed = self._passing_on = False
        self._stopped = 0.0
        self._launcher = int(os.environ.get(LAUNCHER, "0"))
        self._last_seen = time.monotonic()
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    # --- the training ---------------------------------------------------------------------------------------------------

    def begin(self, run: Path, iteration: int) -> None:
        """The training of ``run`` starts at ``iteration``."""
        self.run, self._iteration, self._ended = run, iteration, time.monotonic()
        self._stage = "training"

    def iteration_over(self, *, saved: bool) -> None:
        """One more iteration has ended, and whether it was saved."""
        now = time.monotonic()
        self._iteration, self._seconds, self._ended = self._iteration + 1, now - self._ended, now
        self.saved = self._iteration if saved else self.saved

    def save(self, signum: int) -> None:
        """The ranks have agreed to end because one has received ``signum``: the state is saved from here on."""
        if not self.received:
            self.received, self._since = signum, time.monotonic()
        self._stage = "saving"

    def end(self) -> None:
        """The training is over: there is nothing more to save."""
        self._stage = "idle"

    def error(self, signum: int) -> Interrupted:
        """What a training raises that ``signum`` has ended between two iterations."""
        return Interrupted(f"interrupted after iteration {self._iteration}.{self._hint()}", signum, self.run)

    def loss(self) -> Interrupted:
        """What a training raises that a ``KeyboardInterrupt`` has ended within an iteration."""
        why = f"stopped in iteration {self._iteration}, which is lost."
        return Interrupted(f"{why}{self._hint()}", self.received or signal.SIGINT, self.run)

    def refuse_to_go_on(self) -> None:
        """Act on a signal that came too late for the last iteration.

        Raises:
            Interrupted: there was one.
        """
        if self.received:
            raise self.error(self.received)

    # --- listening ------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take over the signals that are not ignored; only the main thread can, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()
        for signum in SIGNALS:
            before = signal.getsignal(signum)
            if before not in (signal.SIG_IGN, None):
                self._before[signum] = before
                signal.signal(signum, self._handle)

    def leave(self) -> None:
        """Give the signals back."""
        if self._thread is None:
            return
        for signum, before in self._before.items():
            # Python raises KeyboardInterrupt while it shuts down, with a traceback.
            at_the_end = self.owner and before is signal.default_int_handler
            signal.signal(signum, signal.SIG_DFL if at_the_end else before)
        signal.set_wakeup_fd(self._wakeup)
        self._writing.send(b"\0")
        self._thread.join()
        self._thread = None
        self._reading.close()
        self._writing.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """In the main thread."""
        if self.owner or (self._stage != "idle" and not self._passing_on):
            return
        # Once: a second exception would interrupt the cleaning up after the first.
        self._passing_on = False
        before = self._before[signum]
        if callable(before):
            before(signum, frame)
        else:
            signal.signal(signum, before)
            signal.raise_signal(signum)

    def _watch(self) -> None:
        """In the thread: until :meth:`leave`."""
        while True:
            waits = 0.1 if self.received else 1.0 if self._launcher else None
            if select.select([self._reading], [], [], waits)[0]:
                for signum in self._reading.recv(64):
                    if signum == 0:
                        return
                    if signum in self._before:
                        self._arrived(signum)
            self._look_at_the_clock()
            self._look_after_the_launcher()

    def _arrived(self, signum: int) -> None:
        now = time.monotonic()
        if not self.received:
            self._since = now
            if self._stage != "idle":
                self.received = signum
            elif self.owner:
                self.received = signum
                self._stop("interrupted")
        elif now - self._since > SAME and not self._stopped:
            self._stop(f"stopped in iteration {self._iteration}, which is lost")

    def _look_at_the_clock(self) -> None:
        if not self.received:
            return
        passed, stage = time.monotonic() - self._since, self._stage
        if self._stopped:
            stuck = time.monotonic() - self._stopped > UNWINDING and stage != "idle"
            if stuck and not hasattr(sys, "ps1"):
                self._exit()
        elif stage == "training" and passed > LONGEST_ITERATION:
            self._stop(f"stopped in iteration {self._iteration}, which was not over after {passed:.0f} s and is lost")
        elif stage == "saving" and passed > LONGEST_SAVE:
            self._stop(f"stopped while saving, which was not over after {passed:.0f} s")
        elif stage != "idle" and passed > NOTICE and not self._noticed and self.rank == 0:
            self._noticed = True
            usual = f" (the last took {self._seconds:.1f} s)" if self._seconds else ""
            limit = f"without it in {LONGEST_ITERATION - passed:.0f} s"
            self._say(f"interrupted: ends after the running iteration{usual}, or {limit}. A second signal ends it at once.")

    def _look_after_the_launcher(self) -> None:
        if not self._launcher or os.getppid() == self._launcher:
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > ORPHANED:
            os._exit(1)

    def _stop(self, why: str) -> None:
        """End at once what the main thread does."""
        self._stopped = time.monotonic()
        if self.rank == 0 or self._stage != "idle":
            self._say(f"{why}.{self._hint()}" if self.rank == 0 else f"rank {self.rank}: {why}.")
        if self.owner:
            self._exit()
        self._passing_on = True
        if hasattr(signal, "pthread_kill"):
            # Wakes the main thread, too, where that sleeps.
            signal.pthread_kill(threading.main_thread().ident or 0, self.received)
        else:
            _thread.interrupt_main(signal.Signals(self.received))

    def _exit(self) -> None:
        with suppress(Exception):
            self.before_exit()
        with suppress(OSError):
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
        os._exit(128 + self.received)

    def _hint(self) -> str:
        if self.run is None:
            return ""
        run = shlex.quote(str(self.run))
        begun = "Begin anew" if self.saved is None else "Go on"
        return f" {begun} with: marlkit resume {run}"

    def _say(self, text: str) -> None:
        """Print without a lock, which the main thread may hold."""
        with suppress(OSError):
            os.write(2, f"{chr(10) if os.isatty(2) else ''}{text}\n".encode())


def end_process(code: int) -> None:
    """End this process in order, without freeing all of its memory first, for which Python takes seconds on a busy machine."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


_active: Interrupts | None = None


@contextmanager
def listening(*, owner: bool = False) -> Iterator[Interrupts]:
    """The interrupts of this process: those that listen already, or new ones that listen within the block."""
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield Interrupts() if _active is None else _active
        return
    _active = Interrupts(owner=owner)
    _active.listen()
    try:
        yield _active
    finally:
        _active.leave()
        _active = None
