"""From run folders to figures, tables, the page and marl-eval's data."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import small
from synthetic_runs import write_run

import marlkit
from marlkit import run
from marlkit.cli import main
from marlkit.comparison import Comparison
from marlkit.comparison.absolute import absolute_metric
from marlkit.errors import RunError
from marlkit.recipe import load_recipe
from marlkit.run.use import EVALUATION_SEED

NAVIGATION = "env.scenario=navigation"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of two recipes on two tasks; MAPPO is better on both."""
    root = tmp_path_factory.mktemp("runs")
    for overrides, height in (([], 10.0), ([NAVIGATION], 1.0)):
        for name, gain in (("mappo", 1.0), ("ippo", 0.5)):
            for seed in range(3):
                top = height * (gain + 0.1 * seed)
                write_run(root, name, overrides, seed=seed, returns={2: 0.0, 4: top})
    return root


@pytest.fixture(scope="module")
def compared(root: Path) -> Comparison:
    return marlkit.compare([root], absolute=False)


@pytest.fixture(scope="module")
def written(compared: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compared.write(tmp_path_factory.mktemp("out")).parent


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def test_the_figures_of_each_task_and_of_all_lie_in_a_folder(written: Path) -> None:
    kinds = {"curves", "scores", "improvement", "profile"}
    for task in ("balance", "navigation", "all-tasks"):
        expected = kinds - ({"curves"} if task == "all-tasks" else set())
        assert {path.name for path in (written / task).iterdir()} == {
            f"{kind}.{end}" for kind in expected for end in ("png", "svg")
        }
    with Image.open(written / "balance" / "curves.png") as picture:
        assert picture.width == 1080


def test_scores_and_improvements_are_those_of_the_runs(written: Path) -> None:
    scores = {(row["task"], row["group"], row["score"]): row for row in rows(written / "scores.csv")}
    row = scores["balance", "mappo", "last evaluation"]
    assert float(row["interquartile_mean"]) == pytest.approx(11.0)
    assert float(row["low"]) >= 10.0
    assert float(row["high"]) <= 12.0
    # From 0, the lowest evaluation, to 12 and 1.2, the highest: both tasks have the same scores.
    assert float(scores["all tasks", "ippo", "normalised"]["interquartile_mean"]) == pytest.approx(0.5)
    better = rows(written / "improvements.csv")
    assert [(row["task"], row["x"], row["y"], row["probability_that_x_is_higher"]) for row in better] == [
        (task, "ippo", "mappo", "0.0") for task in ("balance", "navigation", "all tasks")
    ]
    curves = [row for row in rows(written / "curves.csv") if row["task"] == "balance" and row["group"] == "mappo"]
    assert [(row["frames"], float(row["interquartile_mean"])) for row in curves] == [("2000", 0.0), ("4000", pytest.approx(11.0))]


def test_the_page_needs_nothing_else(written: Path) -> None:
    page = (written / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 11
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds, one metric of which has a name that HTML and Markdown would take for their own."""
    root = tmp_path_factory.mktemp("pair")
    folders = [write_run(root, seed=seed, returns={1: 1.0 + seed, 2: 2.0}) for seed in (0, 1)]
    for folder in folders:
        text = (folder / "metrics.csv").read_text()
        (folder / "metrics.csv").write_text(text.replace("episode/return", "<i>|x"))
    return folders


def test_names_are_escaped_and_the_same_runs_give_the_same_files(pair: list[Path], tmp_path: Path) -> None:
    page, again = (marlkit.compare(pair, metric="<i>|x").write(tmp_path / name) for name in ("once", "twice"))
    assert "<i>" not in page.read_text()
    assert "&lt;i&gt;|x" in page.read_text()
    for file in page.parent.rglob("*"):
        if file.is_file() and file.suffix != ".png":
            assert (again.parent / file.relative_to(page.parent)).read_bytes() == file.read_bytes(), file


# --- marl-eval ----------------------------------------------------------------------------------------------------------------


def refuse_other_structure(data: dict[str, Any]) -> None:
    """What marl-eval asks of its data: ``DiagnoseData.check_data`` and ``create_matrices_for_rliable`` of its version 0.0.4."""
    for tasks in data.values():
        algorithms = [sorted(task) for task in tasks.values()]
        assert all(names == algorithms[0] for names in algorithms)
        assert not any("," in name for name in algorithms[0])
        runs = [group for task in tasks.values() for group in task.values()]
        assert all(list(group) == list(runs[0]) for group in runs)
        steps = [one for group in runs for one in group.values()]
        assert all(list(one) == list(steps[0]) for one in steps)
        assert list(steps[0])[-1] == "absolute_metrics"
        metrics = {tuple(sorted(name for name in step if name != "step_count")) for one in steps for step in one.values()}
        assert len(metrics) == 1
        for one in steps:
            for name, step in one.items():
                assert isinstance(step.get("step_count"), int) == (name != "absolute_metrics")
                assert all(isinstance(step[metric], list) and step[metric] for metric in next(iter(metrics)))


def test_every_episode_is_in_the_data_of_marl_eval(written: Path) -> None:
    data = json.loads((written / "marl-eval.json").read_text())
    assert list(data) == ["vmas"]
    assert data["vmas"]["balance"]["mappo"]["seed_1"] == {
        "step_1": {"step_count": 2000, "return": [-1.0, 1.0]},
        "step_2": {"step_count": 4000, "return": [10.0, 12.0]},
    }


def test_why_marl_eval_will_not_read_them_is_told(compared: Comparison, tmp_path: Path) -> None:
    assert [note for note in compared.notes if "absolute metric" in note]
    for name, seeds in (("mappo", (0, 1)), ("ippo", (0, 1, 2))):
        for seed in seeds:
            write_run(tmp_path, name, seed=seed, returns={1: 1.0})
    notes = marlkit.compare([tmp_path], absolute=False).notes
    assert any("marl-eval will not read" in note and "same seeds" in note for note in notes)


# --- the absolute metric ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("trained")
    return [run.train(load_recipe("ippo", small("ippo", f"seed={seed}")), root, progress=False) for seed in (0, 1)]


def test_the_absolute_metric_is_of_the_best_policy_over_ten_times_the_episodes(trained: list[Path]) -> None:
    found = absolute_metric(trained[0])
    assert found.checkpoint == "best.ckpt"
    returns = found.episodes["evaluation/return"]
    assert len(returns) == 20
    again = run.evaluate(trained[0], episodes=20, seed=2_000_000, checkpoint="best")
    assert sum(returns) / 20 == pytest.approx(again["evaluation/return"], rel=1e-5)
    # It was chosen by other episodes.
    chosen_by = run.evaluate(trained[0], episodes=20, seed=EVALUATION_SEED, checkpoint="best")
    assert chosen_by["evaluation/return"] != again["evaluation/return"]


def test_a_comparison_with_the_absolute_metric_is_what_marl_eval_reads(trained: list[Path], tmp_path: Path) -> None:
    compared = marlkit.compare(trained)
    assert compared.notes == ()
    data = json.loads((compared.write(tmp_path).parent / "marl-eval.json").read_text())
    refuse_other_structure(data)
    one = data["vmas"]["balance"]["ippo"]["seed_0"]
    assert [len(one[step]["return"]) for step in ("step_1", "step_2", "absolute_metrics")] == [2, 2, 20]
    result = compared.results[0]
    assert result.absolute is not None
    assert result.best is result.absolute


def test_other_checkpoints_are_told_or_refused(trained: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in trained]
    (copies[0] / "checkpoints" / "best.ckpt").unlink()
    notes = marlkit.compare(copies).notes
    assert notes == (f"{copies[0]}: has no best.ckpt; its absolute metric is of last.ckpt, after 160 frames.",)
    (copies[0] / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(RunError, match=r"there is no such checkpoint yet.*--no-absolute"):
        marlkit.compare(copies)
    (copies[0] / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(RunError, match=r"last\.ckpt: is damaged.*--no-absolute"):
        marlkit.compare(copies)


def test_a_metric_that_is_no_mean_over_episodes_has_none(trained: list[Path]) -> None:
    found = marlkit.compare(trained, metric="evaluation/return_std")
    assert found.results[0].absolute is None
    assert "`evaluation/return_std` is no mean over episodes" in found.notes[0]


def test_a_best_policy_beyond_the_budget_is_not_used(trained: list[Path]) -> None:
    late = [folder for folder in trained if absolute_metric(folder).frames > 80]
    found = marlkit.compare(trained, frames=80)
    assert (found.results[0].absolute is None) == bool(late)
    assert any("was found after 80 frames" in note for note in found.notes) == bool(late)


# --- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_notes_and_the_page(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = write_run(tmp_path, seed=9, returns={2: 0.0}, iterations=4)
    code = main(["compare", *map(str, pair), str(stopped), "--no-absolute", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert code == 0
    assert out.splitlines()[-1] == str(tmp_path / "out" / "index.html")
    assert "balance: evaluation/return, interquartile mean and 95 % interval" in out
    assert re.search(r"mappo +2 +2\.00 \[2\.00, 2\.00\]", out)
    assert f"note: left out: {stopped}: has 2 of 4 iterations" in err


def test_the_command_refuses_a_folder_that_it_cannot_write_first(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert main(["compare", *map(str, pair), "--no-absolute", "--out", str(tmp_path / "out")]) == 1
    assert "cannot be written" in capsys.readouterr().err
