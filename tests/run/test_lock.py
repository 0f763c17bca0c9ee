"""One process at a time trains in a run folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import small

from marlkit import run
from marlkit.errors import RunError
from marlkit.recipe import load_recipe
from marlkit.run import lock
from marlkit.run.files import partial_path
from marlkit.run.lock import LOCK, run_lock

HOLDS = """
import sys, time
from pathlib import Path
from marlkit.run.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``tmp_path``."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_first_ones_id(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"is being trained by process {holder.pid}\. .*kill {holder.pid}"), run_lock(tmp_path):
        raise AssertionError


def test_a_killed_process_leaves_no_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    with run_lock(tmp_path):
        pass


def test_one_process_does_not_train_twice_in_a_folder(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(RunError, match="by this very process"), run_lock(tmp_path):
            raise AssertionError
        # The refused one has not taken it away.
        with pytest.raises(RunError, match="by this very process"), run_lock(tmp_path):
            raise AssertionError


def test_the_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path):
        raise KeyboardInterrupt
    with run_lock(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match=r"nothing can be written there"), run_lock(tmp_path):
            raise AssertionError
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_lock_that_is_no_file_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / LOCK)
    with pytest.raises(RunError, match=r"\.lock: is no file, .* Remove it"), run_lock(tmp_path):
        raise AssertionError


def test_partial_files_have_names_of_their_process_and_the_next_holder_removes_them(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    mine = partial_path(tmp_path / "checkpoints" / "last.ckpt")
    assert str(os.getpid()) in mine.name
    left = [tmp_path / ".metrics.csv.host-1.partial", tmp_path / "checkpoints" / ".last.ckpt.host-1.partial"]
    for path in left:
        path.touch()
    with run_lock(tmp_path):
        assert not any(path.exists() for path in left)


class WithoutLocks:
    """The system's locks on a file system that has none."""

    LOCK_EX = LOCK_NB = LOCK_UN = 0

    @staticmethod
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["no locks", "no module"])
def _no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", WithoutLocks if request.param == "no locks" else None)


def held_by(folder: Path, process: int, host: str, began: str) -> None:
    (folder / LOCK).write_text(json.dumps({"process": process, "host": host, "began": began}))


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_of_the_system_a_living_holder_is_refused(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"process {holder.pid}\."), run_lock(tmp_path):
        raise AssertionError


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_of_the_system_a_dead_holder_is_overridden(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with run_lock(tmp_path), pytest.raises(RunError, match="by this very process"), run_lock(tmp_path):
        raise AssertionError
    with run_lock(tmp_path):
        pass


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads there when a process began")
@pytest.mark.usefixtures("_no_locks")
def test_without_locks_of_the_system_a_number_that_was_given_out_again_is_no_holder(tmp_path: Path) -> None:
    held_by(tmp_path, os.getpid(), socket.gethostname(), "1")
    with run_lock(tmp_path):
        pass


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_of_the_system_another_machine_is_named(tmp_path: Path) -> None:
    held_by(tmp_path, 12, "elsewhere", "1")
    with pytest.raises(RunError, match=r"process 12 on elsewhere\."), run_lock(tmp_path):
        raise AssertionError


@pytest.mark.usefixtures("_no_locks")
@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"process": "x"}'])
def test_without_locks_of_the_system_what_says_nothing_holds_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    with run_lock(tmp_path):
        pass


def test_a_run_that_is_being_trained_is_not_resumed(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Before anything of it is looked at: the checkpoint may be replaced meanwhile."""
    (tmp_path / "recipe.yaml").write_text(load_recipe("mappo", small("mappo")).to_yaml())
    with pytest.raises(RunError, match=rf"is being trained by process {holder.pid}\."):
        run.resume(tmp_path, progress=False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_training_holds_its_folder(tmp_path: Path) -> None:
    import lightning

    class Second(lightning.Callback):
        message = ""

        def on_train_epoch_end(self, *_: Any) -> None:
            (folder,) = (tmp_path / "mappo").iterdir()
            with pytest.raises(RunError, match="is being trained") as refused:
                run.resume(folder, progress=False)
            self.message = str(refused.value)

    second = Second()
    folder = run.train(load_recipe("mappo", small("mappo", "trainer.iterations=1")), tmp_path, progress=False, callbacks=[second])
    assert str(folder) in second.message
    run.resume(folder, progress=False)
