"""Some trials of the torture, and that it notices what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks import torture
from benchmarks.torture import BLOWS, ITERATIONS, SIZES, Trial, known, run_trial, trial
from marlkit import run
from marlkit.recipe import load_recipe, shipped
from marlkit.run.checkpoint_io import load_checkpoint, save_checkpoint

BY_NAME = {blow.name: blow for blow in BLOWS}

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")


@pytest.fixture(autouse=True)
def _a_terminal_sends_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "blow", "moment"),
    [("mappo", "kill all", (4, 0.02)), ("maddpg", "interrupt all", (2, 0.0)), ("happo", "full disk", (5, 0.01))],
)
def test_a_run_that_is_struck_ends_as_one_that_is_not(recipe: str, blow: str, moment: tuple[int, float], tmp_path: Path) -> None:
    whole = run.train(load_recipe(recipe, known(recipe, SIZES)), tmp_path / "whole", progress=False)
    made = Trial(0, recipe, 1, [BY_NAME[blow]], [moment], random.Random(0))
    run_trial(made, tmp_path / "struck", whole)
    assert made.wrong == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.train(load_recipe("mappo", known("mappo", SIZES)), tmp_path_factory.mktemp("runs"), progress=False)


def test_what_differs_and_what_is_left_is_noticed(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "mappo" / "now"
    shutil.copytree(whole, other)
    assert [*torture._differences(other, whole), *torture._left_over(other)] == []
    lines = (other / "metrics.csv").read_text().splitlines()
    (other / "metrics.csv").write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    saved = load_checkpoint(other / "checkpoints" / "last.ckpt")
    saved["marlkit"]["frames"] += 1
    save_checkpoint(saved, other / "checkpoints" / "last.ckpt")
    (other / "checkpoints" / ".best.ckpt.host-1.partial").touch()
    found = [*torture._differences(other, whole), *torture._left_over(other)]
    assert "last.ckpt: `marlkit` differs" in found
    assert f"metrics.csv: holds the iterations {[float(i) for i in range(ITERATIONS) if i != 2]}" in found
    assert ".best.ckpt.host-1.partial is left" in found


def test_trials_follow_from_their_number_and_reach_everything() -> None:
    trials = [trial(0, number) for number in range(100)]
    assert [(made.blows, made.moments) for made in trials] == [
        (made.blows, made.moments) for made in map(trial, [0] * 100, range(100))
    ]
    assert {made.recipe for made in trials} == set(shipped())
    assert {(blow.name, made.ranks > 1) for made in trials for blow in made.blows} >= {(name, True) for name in BY_NAME}
    assert all(blow.all_ranks for made in trials for blow in made.blows if made.ranks == 1)


def test_the_counts_that_are_kept_are_of_a_whole_run_without_failures() -> None:
    found = json.loads((Path(torture.__file__).parent / "results" / "torture.json").read_text())
    assert found["trials"] == found["equal"] == sum(found["trials_by_recipe"].values()) >= 100
    assert found["failures"] == []
    assert found["longest_end_s"] < torture.LIMIT
    assert not found["commit"].endswith("-dirty")
