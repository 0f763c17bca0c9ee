"""The learning evidence: what the README says is what the committed results give, and they are made by the present command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from benchmarks import learning
from marlkit import load_recipe
from marlkit.run.metrics_file import FRAMES, read_metrics

SUMMARY: dict[str, Any] = json.loads((learning.RESULTS / "summary.json").read_text())
JOBS = [(task, recipe) for task in learning.TASKS for recipe in learning.recipes_of(task)]


def curves(task: str, recipe: str) -> list[Path]:
    return sorted((learning.RESULTS / task).glob(f"{recipe}-seed*.csv"))


def test_the_readme_says_what_the_results_give() -> None:
    text = learning.README.read_text(encoding="utf-8")
    assert text.partition(learning.BEGIN)[2].partition(learning.END)[0] == learning.section(SUMMARY)


@pytest.mark.parametrize(("task", "recipe"), JOBS)
def test_the_summary_is_that_of_the_curves(task: str, recipe: str) -> None:
    assert SUMMARY[task]["recipes"][recipe] == learning.figures(curves(task, recipe))


@pytest.mark.parametrize(("task", "recipe"), JOBS)
def test_all_have_equal_budgets_and_tell_how_they_were_made(task: str, recipe: str) -> None:
    overrides = learning.overrides_of(task, recipe)
    load_recipe(recipe, overrides)
    for curve in curves(task, recipe):
        frames = read_metrics(curve)[FRAMES]
        assert (len(frames), frames[-1]) == (learning.EVALUATIONS, learning.FRAMES_EACH)
        notes = json.loads(curve.with_suffix(".json").read_text())
        assert re.fullmatch("[0-9a-f]{40}", notes["commit"]), "made with changes that were not committed"
        assert notes["overrides"] == overrides


def test_the_main_job_is_the_training_of_mappo_on_balance() -> None:
    job, shipped = (
        OmegaConf.to_container(load_recipe("mappo", overrides).config)
        for overrides in (learning.overrides_of("balance", "mappo"), [])
    )
    assert isinstance(job, dict)
    assert isinstance(shipped, dict)
    job["trainer"]["evaluation_interval"] = shipped["trainer"]["evaluation_interval"]
    assert job == shipped
    found = SUMMARY["balance"]["recipes"]["mappo"]
    said = f"reaches **{found['mean']}** (interquartile mean of {found['seeds']} seeds, 95 % bootstrap interval "
    assert said + f"{found['interval'][0]} to {found['interval'][1]})" in " ".join(learning.README.read_text().split())


def test_a_result_of_other_code_or_options_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    (tmp_path / "balance").mkdir()
    head = learning._git("rev-parse", "HEAD").stdout.strip()
    if not head:
        pytest.skip("not in a checkout")
    notes = learning._notes("balance", "mappo", 0)
    assert not learning._is_present("balance", "mappo", 0)
    made = {"commit": head, "overrides": learning.overrides_of("balance", "mappo")}
    changed = bool(learning._git("status", "--porcelain", "--", *learning.CODE).stdout)
    for replaced, present in (({}, not changed), ({"commit": "0" * 40}, False), ({"overrides": []}, False)):
        notes.write_text(json.dumps(made | replaced))
        assert learning._is_present("balance", "mappo", 0) == present


def test_nothing_is_trained_with_changes_that_are_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dirty:
        stdout = " M marlkit/keys.py"

    monkeypatch.setattr(learning, "_git", lambda *words: Dirty())
    learning._refuse_uncommitted([])
    with pytest.raises(SystemExit, match="Commit them first"):
        learning._refuse_uncommitted([("balance", "mappo", 0)])
