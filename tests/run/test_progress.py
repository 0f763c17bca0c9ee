"""The progress bar: on a terminal, in a log file, after a resume and on other ranks."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from marlkit.run.progress import IterationProgress


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def train(progress: IterationProgress, clock: Clock, iterations: range, total: int, seconds: float, zero: bool = True) -> None:
    trainer: Any = SimpleNamespace(current_epoch=iterations.start, max_epochs=total, is_global_zero=zero)
    module: Any = None
    progress.setup(trainer, module, "fit")
    progress.on_train_start(trainer, module)
    for iteration in iterations:
        clock.seconds += seconds
        trainer.current_epoch = iteration
        metrics = {
            "episode/return": iteration * 1.0,
            "time/frames_per_second": 61_234.4,
            "time/collect": 0.5,
            "time/update": 1.5,
        } | ({"evaluation/return": iteration + 0.5} if iteration >= 2 else {})
        trainer.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
        progress.on_train_epoch_end(trainer, module)
    progress.on_train_end(trainer, module)


def lines(iterations: range, total: int, seconds: float, **options: Any) -> list[str]:
    output, clock = io.StringIO(), Clock()
    zero = options.pop("zero", True)
    progress = IterationProgress(console=Console(file=output, force_terminal=False), clock=clock, **options)
    train(progress, clock, iterations, total, seconds, zero)
    return output.getvalue().splitlines()


def test_without_a_terminal_a_line_is_written_at_intervals_and_at_the_end() -> None:
    assert lines(range(5), 5, seconds=20.0, seconds_between_lines=30.0) == [
        "iteration 2/5  return 1  61,234 frames/s  elapsed 0:00:40  left 0:01:00",
        "iteration 4/5  return 3  evaluation 3.5  61,234 frames/s  elapsed 0:01:20  left 0:00:20",
        "iteration 5/5  return 4  evaluation 4.5  61,234 frames/s  elapsed 0:01:40  left 0:00:00",
    ]


def test_the_shares_of_the_steps_are_shown_on_request() -> None:
    (line,) = lines(range(1), 1, seconds=2.0, profile=True)
    assert "61,234 frames/s  collect 25%  update 75%  elapsed" in line


def test_after_a_resume_the_time_left_counts_the_new_iterations_only() -> None:
    (first, *_) = lines(range(90, 95), 100, seconds=60.0)
    assert first.startswith("iteration 91/100")
    assert first.endswith("elapsed 0:01:00  left 0:09:00")


def test_training_without_an_end_shows_no_time_left() -> None:
    assert lines(range(1), -1, seconds=40.0) == ["iteration 1  return 0  61,234 frames/s  elapsed 0:00:40"]


def test_a_return_that_is_not_yet_known_is_left_out() -> None:
    output, clock = io.StringIO(), Clock()
    progress = IterationProgress(console=Console(file=output, force_terminal=False), clock=clock)
    metrics = {"episode/return": torch.tensor(float("nan"))}
    trainer: Any = SimpleNamespace(current_epoch=0, max_epochs=1, callback_metrics=metrics)
    module: Any = None
    progress.on_train_start(trainer, module)
    progress.on_train_epoch_end(trainer, module)
    assert "return" not in output.getvalue()


def test_other_ranks_are_silent() -> None:
    assert lines(range(5), 5, seconds=60.0, zero=False) == []


def test_on_a_terminal_one_bar_runs_over_all_iterations() -> None:
    output, clock = io.StringIO(), Clock()
    progress = IterationProgress(console=Console(file=output, force_terminal=True, width=120), clock=clock)
    train(progress, clock, range(10, 20), 20, seconds=1.0)
    last = [line for line in output.getvalue().splitlines() if "training" in line][-1]
    assert "20/20" in last
    assert "return 19" in last
    assert "evaluation 19.5" in last
    assert "61,234 frames/s" in last


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.trainer.callback_metrics["episode/return"] = torch.tensor(12.0)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_lightning_uses_it_instead_of_its_own_bar(tmp_path: Path) -> None:
    output = io.StringIO()
    progress = IterationProgress(console=Console(file=output, force_terminal=False, width=120), seconds_between_lines=0.0)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[progress], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Tiny(), DataLoader(torch.ones(2, 1)))  # type: ignore[arg-type]
    shown = output.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in shown] == [["iteration 1/2", "return 12"], ["iteration 2/2", "return 12"]]
    assert trainer.progress_bar_callback is progress
