"""A run that was killed and resumed equals one that was not, bit for bit on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from small_runs import KilledError, killed_at, same, small, states, without_times

from marlkit import interrupts, run
from marlkit.errors import CheckpointError, Interrupted, RecipeError, RunError
from marlkit.interrupts import SIGNALS
from marlkit.recipe import load_recipe
from marlkit.run.checkpoint_io import load_checkpoint, save_checkpoint
from marlkit.run.checkpoints import LAST
from marlkit.run.metrics_file import read_metrics
from marlkit.run.versions import read_versions, warn_of_other_process
from marlkit.training.learner import Learner


def test_kill_9_at_any_moment_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    overrides = small("mappo", "trainer.iterations=100000", "trainer.evaluation_interval=0")
    command = [sys.executable, "-m", "marlkit", "train", "mappo", *overrides, "--root", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("mappo/*/checkpoints/last.ckpt")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = (tmp_path / "mappo").iterdir()
    done = states(folder)["marlkit"]["iteration"]
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("iterations: 100000", f"iterations: {done + 2}"))
    run.resume(folder, progress=False)
    assert states(folder)["marlkit"]["iteration"] == done + 2
    assert read_metrics(folder / "metrics.csv")["iteration"] == list(range(done + 2))


def test_an_interrupt_stays_an_interrupt_and_the_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, handler = load_recipe("mappo", small("mappo")), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        killed_at(2, patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run.train(recipe, tmp_path, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    (folder,) = (tmp_path / "mappo").iterdir()
    run.resume(folder, progress=False)
    assert states(folder)["marlkit"]["iteration"] == 4


class Signals(lightning.Callback):
    """Sends signals to this process in the second iteration, before it is saved."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.signals = signals

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            for signum in self.signals:
                os.kill(os.getpid(), signum)
            time.sleep(0.3)


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_saves_after_the_iteration_before_the_first_regular_checkpoint_too(
    signals: list[signal.Signals], tmp_path: Path
) -> None:
    recipe = load_recipe("mappo", small("mappo", "trainer.checkpoint_seconds=3600"))
    whole = run.train(recipe, tmp_path / "whole", progress=False)
    handlers = [signal.getsignal(signum) for signum in SIGNALS]
    with pytest.raises(Interrupted, match=r"interrupted after iteration 2. Go on with: marlkit resume") as stop:
        run.train(recipe, tmp_path / "cut", progress=False, callbacks=[Signals(*signals)])
    assert [signal.getsignal(signum) for signum in SIGNALS] == handlers
    (cut,) = (tmp_path / "cut" / "mappo").iterdir()
    assert (stop.value.folder, stop.value.code) == (cut, 128 + signals[0])
    assert str(stop.value).endswith(f" {cut}")
    assert states(cut)["marlkit"]["iteration"] == 2
    assert read_metrics(cut / "metrics.csv")["iteration"] == [0, 1]
    run.resume(cut, progress=False)
    for part in ("state_dict", "optimizer_states", "marlkit"):
        assert same(states(cut)[part], states(whole)[part]), part
    assert without_times(cut) == without_times(whole)


def test_a_signal_in_the_last_iteration_leaves_the_curve_to_resume(tmp_path: Path) -> None:
    recipe = load_recipe("mappo", small("mappo", "trainer.iterations=2"))
    with pytest.raises(Interrupted) as stop:
        run.train(recipe, tmp_path, progress=False, callbacks=[Signals(signal.SIGTERM)])
    assert stop.value.folder is not None
    assert not (stop.value.folder / "curve.png").exists()
    run.resume(stop.value.folder, progress=False)
    assert (stop.value.folder / "curve.png").exists()


def test_an_iteration_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "LONGEST_ITERATION", 0.2)
    monkeypatch.setattr(interrupts, "UNWINDING", 1000.0)

    def long(self: Learner, batch: torch.Tensor) -> None:
        if self.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        annotate(self, batch)

    annotate = Learner.annotate
    monkeypatch.setattr(Learner, "annotate", long)
    monkeypatch.setattr(interrupts, "SIGNALS", (signal.SIGINT, signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match=r"stopped in iteration 2, which is lost. Go on with: marlkit resume"):
            run.train(load_recipe("mappo", small("mappo")), tmp_path, progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    (folder,) = (tmp_path / "mappo").iterdir()
    assert states(folder)["marlkit"]["iteration"] == 2


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"comet is not installed.*pip install comet-ml"):
        run.train(load_recipe("mappo", small("mappo", "trainer.logger=comet")), tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load_recipe("mappo", small("mappo", "trainer.iterations=1"))
    return run.train(recipe, tmp_path_factory.mktemp("runs"), progress=False)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        run.resume(tmp_path)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((finished / "recipe.yaml").read_text())
    with pytest.warns(UserWarning, match="was stopped before its first checkpoint, and begins anew"):
        run.resume(tmp_path, progress=False)
    again, before = states(tmp_path), states(finished)
    for part in ("state_dict", "optimizer_states"):
        assert same(again[part], before[part]), part


def test_a_run_whose_last_checkpoint_was_lost_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "checkpoints" / LAST).rename(copy / "checkpoints" / "best.ckpt")
    with pytest.raises(RunError, match=r"but best\.ckpt\. To go on from that one, copy it"):
        run.resume(copy)


def test_a_finished_run_whose_checkpoints_were_removed_keeps_its_metrics(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.csv").read_bytes()
    with pytest.raises(RunError, match="but no checkpoints any more"):
        run.resume(copy)
    assert (copy / "metrics.csv").read_bytes() == before


def test_pipes_in_a_run_do_not_hang_it(tmp_path: Path) -> None:
    for name in ("metrics.csv", "versions.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(RunError, match="it is no file"):
        read_metrics(tmp_path / "metrics.csv")
    with pytest.warns(UserWarning, match="it is no file"):
        assert read_versions(tmp_path / "versions.json") == {}


@pytest.mark.parametrize("place", ["file", "link", "folder for a file", "read-only"])
def test_checkpoints_that_cannot_be_written_are_refused_before_training(place: str, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    checkpoints = copy / "checkpoints"
    if place in ("file", "link"):
        shutil.rmtree(checkpoints)
        (copy / "curve.png").unlink(missing_ok=True)
        checkpoints.write_text("") if place == "file" else checkpoints.symlink_to(copy / "nowhere")
    elif place == "folder for a file":
        (checkpoints / "best.ckpt").unlink()
        (checkpoints / "best.ckpt").mkdir()
    elif os.geteuid() == 0:
        pytest.skip("the administrator may write anywhere")
    else:
        checkpoints.chmod(0o500)
    says = {"file": "not a folder", "link": "which is not there", "read-only": "Permission denied"}
    with pytest.raises(RunError, match=says.get(place, "is a folder, not a checkpoint file")):
        run.resume(copy)
    checkpoints.chmod(0o700) if place == "read-only" else None


def test_a_checkpoint_of_another_recipe_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    text = (finished / "recipe.yaml").read_text().replace("gamma: 0.99", "gamma: 0.9")
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "checkpoints" / LAST).write_bytes((finished / "checkpoints" / LAST).read_bytes())
    with pytest.raises(CheckpointError, match=r"another recipe.*gamma: 0.9"):
        run.resume(tmp_path)


def test_a_truncated_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text((finished / "recipe.yaml").read_text())
    whole = (finished / "checkpoints" / LAST).read_bytes()
    (tmp_path / "checkpoints" / LAST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        run.resume(tmp_path)


def test_a_checkpoint_of_other_shapes_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text((finished / "recipe.yaml").read_text())
    saved = dict(load_checkpoint(finished / "checkpoints" / LAST))
    saved["state_dict"] = {name: torch.zeros(3) for name in saved["state_dict"]}
    save_checkpoint(saved, tmp_path / "checkpoints" / LAST)
    with pytest.raises(CheckpointError, match="do not fit"):
        run.load_policy(tmp_path, checkpoint="last")


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = (finished / "checkpoints" / LAST).read_bytes()
    run.resume(finished, progress=False)
    assert (finished / "checkpoints" / LAST).read_bytes() == before


def test_metrics_are_on_the_disk_before_the_checkpoint_that_follows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    genuine = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor: int) -> None:
        order.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        genuine["fsync"](descriptor)

    def replace(source: str, target: Path) -> None:
        order.append(f"rename {Path(target).name}")
        genuine["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    given = small("mappo", "trainer.iterations=2", "trainer.evaluation_interval=0", "trainer.evaluation_episodes=1")
    run.train(load_recipe("mappo", given), tmp_path, progress=False)
    saved = [number for number, event in enumerate(order) if event == "rename last.ckpt"]
    assert len(saved) == 2
    for begin, end in zip([0, *saved], saved, strict=False):
        assert "flush metrics.csv" in order[begin:end]
    assert "flush episodes.csv" in order[saved[0] : saved[1]]  # the only evaluation comes after the last iteration
    assert "flush checkpoints" in order[saved[-1] :]


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run that has another iteration to train."""
    folder = tmp_path / "stopped"
    shutil.copytree(finished, folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("  iterations: 1\n", "  iterations: 2\n"))
    return folder


@pytest.mark.parametrize("content", [None, b"iteration,frames\n"])
def test_missing_metrics_are_named_when_a_run_goes_on(stopped: Path, content: bytes | None) -> None:
    (stopped / "metrics.csv").unlink() if content is None else (stopped / "metrics.csv").write_bytes(content)
    with pytest.warns(UserWarning, match=r"metrics\.csv: the rows of iterations 0 are missing"):
        run.resume(stopped, progress=False)
    assert read_metrics(stopped / "metrics.csv")["iteration"] == [1.0]


@pytest.mark.parametrize("content", [b"\x00\xff\xfe garbage", b"PK\x03\x04", b"a,b\n1,2\n", b"iteration,x\n0,1,2\n"])
def test_a_file_that_holds_no_metrics_is_refused_before_training(stopped: Path, content: bytes) -> None:
    (stopped / "metrics.csv").write_bytes(content)
    with pytest.raises(RunError, match=r"metrics\.csv"):
        run.resume(stopped, progress=False)
    assert (stopped / "metrics.csv").read_bytes() == content


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"not JSON", b"\xff\xfe", b"[" * 10**5, b""])
def test_versions_that_cannot_be_read_are_told_and_ignored(stopped: Path, content: bytes) -> None:
    (stopped / "versions.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"versions\.json: is ignored, because it notes no versions"):
        run.load_policy(stopped, "last")


@pytest.mark.parametrize(
    "noted", [{}, {"component_folders": 3}, {"component_folders": [1, None, "\x00", "x" * 5000]}, {"threads": []}]
)
def test_versions_of_another_kind_do_not_stop_a_resume(stopped: Path, noted: object) -> None:
    (stopped / "versions.json").write_text(json.dumps(noted))
    run.load_policy(stopped, "last")


def test_another_number_of_threads_is_told(stopped: Path) -> None:
    noted = json.loads((stopped / "versions.json").read_text())
    assert noted["threads"] == torch.get_num_threads()
    assert noted["device"] == "cpu"
    (stopped / "versions.json").write_text(json.dumps(noted | {"threads": 64, "torch": "1.0"}))
    with pytest.warns(UserWarning, match=r"trained with threads 64 \(now 1\), torch 1\.0 .*not bit for bit.*trainer\.threads"):
        run.resume(stopped, progress=False)


@pytest.mark.filterwarnings("error")
def test_the_same_number_of_threads_is_not_mentioned(stopped: Path) -> None:
    warn_of_other_process(stopped / "versions.json", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("before", "after"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("name", ["mappo", "maddpg"])
def test_a_run_moves_to_another_device(
    name: str, before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(name, small(name, f"trainer.accelerator={before}"))
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(KilledError):
            run.train(recipe, tmp_path, progress=False)
    (folder,) = (tmp_path / name).iterdir()
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(f"accelerator: {before}", f"accelerator: {after}"))
    with pytest.warns(UserWarning, match="device"):
        run.resume(folder, progress=False)
    assert states(folder)["marlkit"]["iteration"] == 4
