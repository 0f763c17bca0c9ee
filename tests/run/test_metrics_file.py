"""The metrics file: exact numbers, late columns, resuming, and kills at any moment."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from marlkit.errors import RunError, WriteError
from marlkit.run.metrics_file import read_metrics
from marlkit.run.metrics_logger import MetricsFile


def write(path: Path, rows: dict[int, dict[str, float]], first_iteration: int = 0) -> None:
    logger = MetricsFile(path, first_iteration)
    for iteration, row in rows.items():
        logger.log_metrics(row, iteration)
    logger.finalize("success")


def test_one_row_per_iteration_in_order_of_first_appearance(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, {0: {"frames": 60, "loss": 0.5}, 1: {"loss": 0.25, "frames": 120}})
    assert path.read_text() == "iteration,frames,loss\n0,60,0.5\n1,120,0.25\n"


def test_a_row_is_in_the_file_before_the_next_one_is_logged(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"loss": 2.0}, 1)
    assert read_metrics(tmp_path / "metrics.csv") == {"iteration": [0.0, 1.0], "loss": [1.0, 2.0]}


def test_numbers_read_back_exactly(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, -math.pi, math.inf, float(np.float32(0.1))]
    path = tmp_path / "metrics.csv"
    write(path, {i: {"x": value} for i, value in enumerate(values)})
    assert read_metrics(path)["x"] == values


def test_tensors_numpy_scalars_and_truth_values_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, {0: {"a": torch.tensor(1.5), "b": np.float64(2.5), "c": True}})  # type: ignore[dict-item]
    assert read_metrics(path) == {"iteration": [0.0], "a": [1.5], "b": [2.5], "c": [1.0]}


def test_columns_that_appear_later_extend_the_header_and_leave_cells_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, {0: {"loss": 1.0}, 1: {"loss": 2.0, "evaluation/return": 7.0}, 2: {"loss": 3.0}})
    assert path.read_text() == "iteration,loss,evaluation/return\n0,1.0,\n1,2.0,7.0\n2,3.0,\n"
    assert [math.isnan(value) for value in read_metrics(path)["evaluation/return"]] == [True, False, True]


def test_calls_for_the_same_iteration_share_a_row(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 1.0, "evaluation/return": 0.0}, 0)
    logger.log_metrics({"loss": 2.0}, 1)
    logger.log_metrics({"evaluation/return": 9.0}, 1)
    logger.log_metrics({"loss": 3.0}, 2)
    assert (tmp_path / "metrics.csv").read_text() == "iteration,loss,evaluation/return\n0,1.0,0.0\n1,2.0,9.0\n2,3.0,\n"


def test_resuming_drops_the_resumed_iteration_and_all_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, {i: {"x": float(i)} for i in range(5)})
    write(path, {3: {"x": 30.0}, 4: {"x": 40.0, "y": 1.0}}, first_iteration=3)
    assert path.read_text() == "iteration,x,y\n0,0.0,\n1,1.0,\n2,2.0,\n3,30.0,\n4,40.0,1.0\n"


def test_a_new_training_replaces_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, {i: {"x": 1.0} for i in range(5)})
    write(path, {0: {"y": 2.0}})
    assert read_metrics(path)["iteration"] == [0.0]


@pytest.mark.parametrize("kept", range(len("2,0.125,4.5\n")))
def test_a_half_written_last_row_is_skipped(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.csv"
    whole = "iteration,a,b\n0,1.0,2.0\n1,3.0,4.0\n"
    path.write_text(whole + "2,0.125,4.5\n"[:kept])
    assert read_metrics(path)["a"] == [1.0, 3.0]
    write(path, {2: {"a": 5.0, "b": 6.0}}, first_iteration=2)
    assert path.read_text() == whole + "2,5.0,6.0\n"


def log_for_ever(path: Path, first: int) -> None:
    logger = MetricsFile(path, first)
    for iteration in count(first):
        logger.log_metrics({"x": iteration / 7, f"late{iteration // 40}": 1.0}, iteration)
        if iteration % 5 == 0:
            logger.log_metrics({"x": iteration / 7, "evaluation/return": float(iteration)}, iteration)


def test_kill_at_any_moment_leaves_whole_rows(tmp_path: Path) -> None:
    path, first = tmp_path / "metrics.csv", 0
    for attempt in range(12):
        writer = multiprocessing.get_context("fork").Process(target=log_for_ever, args=(path, first))
        before = path.stat().st_ino if path.exists() else None
        writer.start()
        while not path.exists() or path.stat().st_ino == before or len(path.read_text().splitlines()) < first + 3:
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        metrics = read_metrics(path)
        assert metrics["iteration"] == list(range(len(metrics["iteration"])))
        assert metrics["x"] == [i / 7 for i in range(len(metrics["x"]))]
        first = len(metrics["iteration"]) // 2
    assert first > 0


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    write(tmp_path / "metrics.csv", {0: {"x": 1.0}})
    assert list(tmp_path.iterdir()) == []


def test_a_row_needs_its_iteration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass `step`"):
        MetricsFile(tmp_path / "metrics.csv").log_metrics({"x": 1.0})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first column must be `iteration`"),
        (b"frames,loss\n1,2\n", "first column must be `iteration`"),
        (b"iteration,loss\n0,1.0\n1,fast\n", "metrics.csv:3"),
        (b"iteration,loss\n0,1.0,2.0\n", "metrics.csv:2"),
        (b"iteration,loss\nzero,1.0\n", "metrics.csv:2"),
        (b"\xff\xfe\x00", "no metrics can be read"),
    ],
)
def test_another_file_gives_a_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_metrics(path)


def test_a_missing_file_gives_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no metrics can be read"):
        read_metrics(tmp_path / "metrics.csv")


def test_nothing_is_kept_in_memory_but_the_last_row(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path / "metrics.csv")
    sizes = []
    for iteration in range(300):
        logger.log_metrics({"x": float(iteration), **({"late": 1.0} if iteration == 250 else {})}, iteration)
        sizes.append(sum(len(value) for value in vars(logger).values() if isinstance(value, (list, dict, set))))
    assert max(sizes) <= 6
    assert read_metrics(tmp_path / "metrics.csv")["x"] == list(range(300))


def test_a_row_is_appended_and_only_a_new_metric_copies_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    logger.log_metrics({"x": 1.0}, 0)
    node = path.stat().st_ino
    for iteration in range(1, 20):
        logger.log_metrics({"x": 1.0}, iteration)
    assert path.stat().st_ino == node
    logger.log_metrics({"x": 1.0, "late": 2.0}, 20)
    assert path.stat().st_ino != node
    assert math.isnan(read_metrics(path)["late"][19])


def test_metrics_of_an_earlier_iteration_find_its_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write(path, {0: {"x": 1.0}, 2: {"x": 3.0}})
    logger = MetricsFile(path, first_iteration=3)
    logger.log_metrics({"x": 4.0}, 3)
    logger.log_metrics({"late": 9.0}, 0)
    logger.log_metrics({"x": 2.0}, 1)
    logger.log_metrics({"x": 5.0}, 4)
    assert path.read_text() == "iteration,x,late\n0,1.0,9.0\n1,2.0,\n2,3.0,\n3,4.0,\n4,5.0,\n"


ROWS = {i: {"x": float(i)} for i in range(10)}


@pytest.mark.parametrize(
    ("text", "missing", "repeated", "dropped"),
    [
        ("".join(f"{i},{i}.0\n" for i in range(10)), "", "", "8 to 9"),
        ("".join(f"{i},{i}.0\n" for i in (0, 1, 4, 5, 7)), "2 to 3, 6", "", ""),
        ("0,0.0\n", "1 to 7", "", ""),
        ("", "0 to 7", "", ""),
        ("".join(f"{i},{i}.0\n" for i in (0, 2, 1, 3, 4, 4, 5, 6, 7)), "", "1, 4", ""),
        (None, "0 to 7", "", ""),
    ],
)
def test_what_is_lost_before_a_resume_is_told(
    tmp_path: Path, text: str | None, missing: str, repeated: str, dropped: str
) -> None:
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text("iteration,x\n" + text)
    logger = MetricsFile(path, first_iteration=8)
    found = logger.begin()
    assert (found.missing, found.repeated, found.dropped) == (missing, repeated, dropped)
    logger.log_metrics({"x": 8.0}, 8)
    iterations = read_metrics(path)["iteration"]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] == 8


def test_a_repeated_iteration_keeps_its_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("iteration,x\n0,0.0\n1,1.0\n1,5.0\n")
    MetricsFile(path, first_iteration=2).begin()
    assert read_metrics(path)["x"] == [0.0, 5.0]


def test_a_full_disk_is_told_and_the_next_writer_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    logger.log_metrics({"x": 1.0}, 0)

    def full(file: object, data: bytes) -> None:
        path.write_bytes(path.read_bytes() + data[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("marlkit.run.metrics_logger._write_all", full)
        with pytest.raises(WriteError, match=r"metrics\.csv: cannot be written \(No space left on device\)"):
            logger.log_metrics({"x": 2.0}, 1)
    logger.finalize("failed")
    write(path, {1: {"x": 3.0}}, first_iteration=1)
    assert read_metrics(path)["x"] == [1.0, 3.0]
