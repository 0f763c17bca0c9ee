"""The learning evidence: equal budgets, and results that are made again once code or options have changed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks import learning, training
from marlkit import load_recipe
from marlkit.run.metrics_file import read_metrics

JOBS = [(task, recipe) for task in learning.TASKS for recipe in learning.recipes_of(task)]


@pytest.mark.parametrize(("task", "recipe"), JOBS)
def test_every_training_is_a_recipe_that_fits_and_has_the_common_budget(task: str, recipe: str) -> None:
    config = load_recipe(recipe, learning.overrides_of(task, recipe)).config
    assert config.trainer.iterations * config.env.num_envs * config.data.steps == learning.FRAMES_EACH
    assert config.trainer.iterations == learning.EVALUATIONS * config.trainer.evaluation_interval


def test_mappo_on_balance_is_the_main_job_but_for_its_length() -> None:
    job, shipped = (
        OmegaConf.to_container(load_recipe("mappo", overrides).config)
        for overrides in (learning.overrides_of("balance", "mappo"), [])
    )
    assert isinstance(job, dict)
    assert isinstance(shipped, dict)
    for length in ("iterations", "evaluation_interval"):
        job["trainer"][length] = shipped["trainer"][length]
    assert job == shipped


def test_a_result_of_other_code_or_options_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    (tmp_path / "balance").mkdir()
    command = ["git", "-C", str(training.ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not head:
        pytest.skip("not in a checkout")
    notes = learning._notes("balance", "mappo", 0)
    assert not learning._is_present("balance", "mappo", 0)
    made = {"commit": head, "overrides": learning.overrides_of("balance", "mappo")}
    changed = training.uncommitted(*training.CODE)
    for replaced, present in (({}, not changed), ({"commit": "0" * 40}, False), ({"overrides": []}, False)):
        notes.write_text(json.dumps(made | replaced))
        assert learning._is_present("balance", "mappo", 0) == present


def test_nothing_is_trained_with_changes_that_are_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "uncommitted", lambda *paths: True)
    learning._refuse_uncommitted([])
    with pytest.raises(SystemExit, match="Commit them first"):
        learning._refuse_uncommitted([("balance", "mappo", 0)])


def test_figures_and_curves_are_over_the_seeds(tmp_path: Path) -> None:
    files = []
    for seed, last in enumerate((4.0, 5.0, 6.0, 7.0, -50.0)):
        files.append(tmp_path / f"{seed}.csv")
        files[-1].write_text(f"iteration,frames,evaluation/return\n0,100,{seed}.0\n1,200,{last}\n")
    found = learning.figures(files)
    assert found["seeds"] == 5
    assert found["mean"] == 5.0
    assert found["interval"][0] < 5.0 < found["interval"][1]
    frames, curve = training.curve_of(files)
    assert frames.tolist() == [100, 200]
    assert curve.value.tolist() == [2.0, 5.0]


# --- the results that are committed ---------------------------------------------------------------------------------------


def test_the_readme_says_what_the_curves_say() -> None:
    summary = json.loads((learning.RESULTS / "summary.json").read_text())
    text = learning.README.read_text(encoding="utf-8")
    assert text.partition(learning.BEGIN)[2].partition(learning.END)[0] == learning.section(summary)
    for task, found in summary.items():
        assert set(found["recipes"]) == set(learning.recipes_of(task))
        for recipe, told in found["recipes"].items():
            notes = sorted((learning.RESULTS / task).glob(f"{recipe}-seed*.json"))
            assert told == learning.figures([note.with_suffix(".csv") for note in notes])


@pytest.mark.parametrize(("task", "recipe"), JOBS)
def test_every_result_has_the_common_budget_and_a_commit(task: str, recipe: str) -> None:
    notes = sorted((learning.RESULTS / task).glob(f"{recipe}-seed*.json"))
    assert len(notes) == 5
    for note in notes:
        told = json.loads(note.read_text())
        assert told["overrides"] == learning.overrides_of(task, recipe)
        assert len(told["commit"]) == 40
        curve = read_metrics(note.with_suffix(".csv"))
        assert len(curve["frames"]) == learning.EVALUATIONS
        assert curve["frames"][-1] == learning.FRAMES_EACH
