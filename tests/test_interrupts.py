"""What signals do to a process: before, while and after it trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from marlkit import interrupts
from marlkit.interrupts import SIGNALS, Interrupts, listening


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "UNWINDING", 1000.0)


def eventually(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def send(signum: signal.Signals) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_while_a_run_trains_a_signal_is_noted_and_raises_nothing(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with listening() as found:
        found.begin(Path("runs/x"), 3)
        send(signum)
        assert eventually(lambda: found.received == signum)
        found.iteration_over(saved=True)
        found.end()
        error = found.error(signum)
    assert str(error) == "interrupted after iteration 4. Go on with: marlkit resume runs/x"
    assert (error.code, error.folder) == (128 + signum, Path("runs/x"))
    assert signal.getsignal(signum) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_run_without_a_checkpoint_is_begun_again() -> None:
    found = Interrupts()
    found.begin(Path("runs/a b"), 0)
    assert "Begin anew with: marlkit resume 'runs/a b'" in str(found.loss())


def test_outside_of_a_training_a_signal_does_what_it_did() -> None:
    with listening() as found:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        found.begin(Path("runs/x"), 0)
        found.end()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert found.received == 0
        found.refuse_to_go_on()


def test_a_signal_after_the_last_iteration_is_not_forgotten() -> None:
    with listening() as found:
        found.begin(Path("runs/x"), 0)
        found.iteration_over(saved=True)
        send(signal.SIGTERM)
        assert eventually(lambda: found.received > 0)
        found.end()
        with pytest.raises(KeyboardInterrupt, match="interrupted after iteration 1"):
            found.refuse_to_go_on()


def test_the_second_signal_acts_at_once_but_not_one_that_was_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[int] = []
    arrive = Interrupts._arrived

    def noting(self: Interrupts, signum: int) -> None:
        arrive(self, signum)
        arrived.append(signum)

    monkeypatch.setattr(Interrupts, "_arrived", noting)
    monkeypatch.setattr(interrupts, "SAME", 1000.0)
    with listening() as found:
        found.begin(Path("runs/x"), 0)
        for count in range(1, 4):
            send(signal.SIGINT)
            assert eventually(lambda count=count: len(arrived) == count)  # type: ignore[misc]
        assert found.received == signal.SIGINT
        monkeypatch.setattr(interrupts, "SAME", 0.0)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            send(signal.SIGINT)
            time.sleep(20)


def test_an_iteration_that_takes_too_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "LONGEST_ITERATION", 0.1)
    with listening() as found:
        found.begin(Path("runs/x"), 0)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            send(signal.SIGINT)
            time.sleep(20)


def test_saving_may_take_longer_than_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "LONGEST_ITERATION", 0.1)
    with listening() as found:
        found.begin(Path("runs/x"), 0)
        found.save(signal.SIGTERM)
        time.sleep(0.5)
        found.end()
        assert found.received == signal.SIGTERM


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as found:
            found.begin(Path("runs/x"), 0)
            send(signal.SIGHUP)
            send(signal.SIGTERM)
            assert eventually(lambda: found.received > 0)
            assert found.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_main_thread_listens() -> None:
    handlers = [signal.getsignal(signum) for signum in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with listening():
            seen.extend(signal.getsignal(signum) for signum in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == handlers


def test_who_listens_already_is_shared() -> None:
    with listening() as outer, listening() as inner:
        assert inner is outer


OWNER = """
import sys, threading, time
from pathlib import Path
from marlkit import interrupts
interrupts.LONGEST_ITERATION = 0.3
with interrupts.listening(owner=True) as found:
    found.before_exit = lambda: print("children ended", flush=True)
    {stage}
    print("ready", flush=True)
    # The main thread waits for what never comes, as for a rank that does not answer.
    threading.Lock().acquire() and threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("stage", "signum", "message"),
    [
        ("pass", signal.SIGINT, "interrupted."),
        ("pass", signal.SIGTERM, "interrupted."),
        ("found.begin(Path('runs/x'), 0); found.end()", signal.SIGINT, "interrupted. Begin anew with: marlkit resume"),
        (
            "found.begin(Path('runs/x'), 0); found.saved = 0",
            signal.SIGTERM,
            "not over after 0 s and is lost. Go on with",
        ),
    ],
)
def test_the_command_ends_by_itself_whatever_its_main_thread_does(stage: str, signum: signal.Signals, message: str) -> None:
    command = [sys.executable, "-c", OWNER.format(stage=stage)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, restore_signals=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + signum
    assert out == "children ended\n"
    assert message in err
    assert len(err.splitlines()) == 1


ORPHAN = """
import os, subprocess, sys
if len(sys.argv) == 1:
    env = os.environ | {"MARLKIT_LAUNCHER": str(os.getpid())}
    child = subprocess.Popen([sys.executable, __file__, "rank"], env=env, stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
    os._exit(0)
import threading
from marlkit import interrupts
interrupts.ORPHANED = 0.1
with interrupts.listening():
    print("ready", flush=True)
    threading.Event().wait()
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks in /proc whether the rank is there")
def test_a_rank_ends_when_the_one_that_started_it_is_gone(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    status = Path("/proc", done.stdout.strip(), "stat")
    assert eventually(lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z")
