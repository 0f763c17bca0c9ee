"""Files that cannot be written: each failure names the file and a remedy, and keeps what was there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import small, states
from tensorboard.summary.writer.record_writer import RecordWriter

from marlkit import run
from marlkit.cli import main
from marlkit.errors import CheckpointError, OptionError, WriteError
from marlkit.recipe import load_recipe
from marlkit.run.checkpoint_io import save_checkpoint
from marlkit.run.files import refuse_unwritable, write_whole
from marlkit.run.metrics_file import read_metrics
from marlkit.run.tensorboard import _let_writers_end_in_silence

FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load_recipe("mappo", small("mappo", "trainer.iterations=1"))
    return run.train(recipe, tmp_path_factory.mktemp("runs"), progress=False)


def full_disk(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Let every write to a file of this ending fail, under whatever name it is written first."""
    genuine = Path.write_bytes

    def write(path: Path, content: Any) -> int:
        if ending in path.name:
            genuine(path, content[: len(content) // 2])
            raise FULL
        return genuine(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "curve.png"
    write_whole(path, b"old")
    full_disk(monkeypatch, ".png")
    with pytest.raises(WriteError, match=r"curve\.png: cannot be written \(No space left on device\)\. Free some space"):
        write_whole(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/team.gif", r"Not a directory.*A part of the path is a file|File exists"),
        (f"{'x' * 300}.gif", r"File name too long.*shorter name"),
        ("folder", r"Is a directory.*It is a folder"),
        ("a" * 240 + ".gif", ""),
        ("new/folder/team.gif", ""),
    ],
)
def test_an_output_is_tried_before_anything_is_played(name: str, message: str, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    if not message:
        refuse_unwritable(tmp_path / name)
        write_whole(tmp_path / name, b"")
        return
    with pytest.raises(WriteError, match=message):
        run.play(finished, path=tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_read_only_folder_is_named(finished: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match="Permission denied"):
        run.play(finished, path=tmp_path / "team.gif")


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e-300])
def test_an_impossible_speed_is_refused_before_anything_is_played(finished: Path, fps: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("marlkit.run.use.frames_of_episode", lambda *_, **__: pytest.fail("played"))
    with pytest.raises(OptionError, match="option `fps`: must be a number of pictures per second"):
        run.play(finished, fps=fps)


def test_the_command_line_says_what_cannot_be_written(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["play", str(finished), "--output", str(tmp_path / "file" / "team.gif")]) == 1
    assert "team.gif: cannot be written" in capsys.readouterr().err
    assert main(["play", str(finished), "--fps", "0"]) == 2
    assert "option `fps`" in capsys.readouterr().err
    assert main(["train", "mappo", *small("mappo"), "--root", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["curve.png", "team.gif"])
def test_a_full_disk_at_a_picture_is_only_told(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, ending)
    recipe = load_recipe("mappo", small("mappo", "trainer.iterations=1", "trainer.video=true"))
    with pytest.warns(UserWarning, match=rf"{ending} was not drawn: .*No space left.*The training is complete and saved"):
        folder = run.train(recipe, tmp_path, progress=False)
    assert states(folder)["marlkit"]["iteration"] == 1
    assert not (folder / ending).exists()


@pytest.mark.parametrize("ending", ["recipe.yaml", "versions.json"])
def test_a_full_disk_at_the_start_is_named(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, ending)
    with pytest.raises(WriteError, match=rf"{ending}: cannot be written \(No space left on device\)"):
        run.train(load_recipe("mappo", small("mappo")), tmp_path, progress=False)


def test_a_checkpoint_that_cannot_be_written_is_both_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError) as caught:
        save_checkpoint({"a": 1}, tmp_path / "file" / "last.ckpt")
    assert isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize("blocks", [4, 40])
def test_files_that_may_not_grow_end_a_training_with_one_message(blocks: int, tmp_path: Path) -> None:
    given = " ".join(f"'{text}'" for text in small("mappo", "trainer.iterations=60", "trainer.evaluation_interval=0"))
    command = f"ulimit -f {blocks}; {sys.executable} -m marlkit train mappo {given} --root {tmp_path} --no-progress"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("error: ") == 1
    assert "Files may not grow so large here" in ended.stderr or "cannot be written" in ended.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_takes_no_more_events_ends_them_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The writer's thread fails, every later call answers with its error, and closing the file fails too."""
    written: list[bytes] = []

    def full_after(first: int, genuine: Callable[..., None]) -> Callable[..., None]:
        def write(writer: RecordWriter, *data: bytes) -> None:
            written.extend(data)
            if len(written) > first:
                raise FULL
            genuine(writer, *data)

        return write

    monkeypatch.setattr(RecordWriter, "write", full_after(5, RecordWriter.write))
    monkeypatch.setattr(RecordWriter, "flush", full_after(5, RecordWriter.flush))
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    _let_writers_end_in_silence.cache_clear()
    with pytest.warns(UserWarning, match="nothing more can be written") as told:
        folder = run.train(load_recipe("mappo", small("mappo")), tmp_path, progress=False)
    assert sum("nothing more" in str(each.message) for each in told) == 1
    assert len(read_metrics(folder / "metrics.csv")["iteration"]) == 4
    assert "Traceback" not in capfd.readouterr().err


def test_events_that_cannot_be_begun_are_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(RecordWriter, "flush", full)
    with pytest.raises(WriteError, match="tensorboard/: cannot be written"):
        run.train(load_recipe("mappo", small("mappo")), tmp_path, progress=False)
