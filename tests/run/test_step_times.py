"""Times of the steps: shares during training, a table at the end."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from marlkit import run
from marlkit.recipe import load_recipe
from marlkit.run.step_times import StepTimes, shares

TINY = [
    "env.num_envs=4", "data.steps=8", "env.max_steps=8", "actor.hidden=[8]", "critic.hidden=[8]", "update.minibatch_size=16",
    "update.epochs=1", "trainer.iterations=2", "trainer.evaluation_episodes=2", "trainer.video=false",
]  # fmt: skip


def metrics(frames_per_second: float, **seconds: float) -> dict[str, torch.Tensor]:
    found = {f"time/{step}": value for step, value in seconds.items()} | {"time/frames_per_second": frames_per_second}
    return {name: torch.tensor(value) for name, value in found.items()}


def table(iterations: list[tuple[float, dict[str, torch.Tensor]]], *, zero: bool = True, fails: bool = False) -> list[list[str]]:
    """The words of each printed row, of iterations that each end so many seconds after the one before."""
    output, moment = io.StringIO(), [10.0]
    times = StepTimes(console=Console(file=output, force_terminal=False, width=100), clock=lambda: moment[0])
    trainer: Any = SimpleNamespace(is_global_zero=zero, callback_metrics={})
    module: Any = None
    times.on_train_start(trainer, module)
    for seconds, logged in iterations:
        moment[0] += seconds
        trainer.callback_metrics = logged
        times.on_train_epoch_end(trainer, module)
    if fails:
        times.on_exception(trainer, module, KeyboardInterrupt())
    else:
        times.on_train_end(trainer, module)
    return [line.split() for line in output.getvalue().splitlines()][2:]


ITERATIONS = [
    (99.0, metrics(1.0, collect=50.0, annotate=1.0, estimate=1.0, update=40.0)),
    (4.0, metrics(200.0, collect=1.0, annotate=0.5, estimate=0.0, update=1.5)),
    (6.0, metrics(120.0, collect=1.0, annotate=0.5, estimate=0.0, update=3.5)),
]
"""A warm-up, and two of 600 frames with a second between the steps."""
ROWS = [
    ["collect", "1.0000", "20.0%", "600"],
    ["annotate", "0.5000", "10.0%", "1,200"],
    ["estimate", "0.0000", "0.0%"],
    ["update", "2.5000", "50.0%", "240"],
    ["between", "1.0000", "20.0%", "600"],
    ["whole", "5.0000", "100.0%", "120"],
]


@pytest.mark.parametrize("fails", [False, True])
def test_the_table_averages_all_iterations_but_the_first(fails: bool) -> None:
    assert table(ITERATIONS, fails=fails) == ROWS


def test_a_single_iteration_counts() -> None:
    rows = table(ITERATIONS[1:2])
    assert rows[0] == ["collect", "1.0000", "25.0%", "600"]
    assert rows[-1] == ["whole", "4.0000", "100.0%", "150"]


def test_a_step_that_some_iterations_lack_took_no_time_in_them() -> None:
    rows = table([ITERATIONS[0], (1.0, metrics(100.0, collect=1.0)), (3.0, metrics(50.0, collect=1.0, update=1.0))])
    assert rows[:2] == [["collect", "1.0000", "50.0%", "100"], ["update", "0.5000", "25.0%", "200"]]


def test_nothing_is_printed_before_the_first_iteration_and_by_other_ranks() -> None:
    assert table([]) == []
    assert table(ITERATIONS, zero=False) == []


def test_shares_are_of_the_steps_alone() -> None:
    assert shares(metrics(5.0, collect=1.0, annotate=0.0, update=3.0)) == "collect 25%  annotate 0%  update 75%"
    assert shares({}) == ""


def test_training_with_a_profile_ends_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.train(load_recipe("mappo", TINY), tmp_path, progress=False, profile=True)
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert words[-7:] == ["─" * len(words[-7]), "collect", "annotate", "estimate", "update", "between", "whole"]
    run.train(load_recipe("mappo", TINY), tmp_path, progress=False)
    assert "annotate" not in capsys.readouterr().out
