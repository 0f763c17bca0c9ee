"""Every episode of every evaluation is kept, also over a stop, and what is lost is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import small

from marlkit import run
from marlkit.recipe import load_recipe
from marlkit.run.episodes_file import EpisodesFile
from marlkit.run.metrics_file import read_metrics
from marlkit.spec import Discrete, TeamSpec
from marlkit.training.evaluation import Episodes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load_recipe("mappo", small("mappo", "env.scenario=navigation", "trainer.evaluation_episodes=3"))
    return run.train(recipe, tmp_path_factory.mktemp("runs"), progress=False)


def test_a_row_per_evaluation_holds_what_each_episode_adds_to_its_metrics(finished: Path) -> None:
    episodes, metrics = read_metrics(finished / "episodes.csv"), read_metrics(finished / "metrics.csv")
    assert episodes["iteration"] == [1, 3]
    assert episodes["frames"] == [metrics["frames"][1], metrics["frames"][3]]
    means = [name for name in metrics if name.startswith("evaluation/") and "_std" not in name]
    assert {name.rpartition("/")[0] for name in episodes if "/" in name} == set(means)
    for name in means:
        each = np.array([episodes[f"{name}/{number}"] for number in range(3)])
        np.testing.assert_allclose(each.mean(0), [metrics[name][1], metrics[name][3]], rtol=1e-5)


def test_opposed_agents_have_the_returns_of_their_groups() -> None:
    spec = TeamSpec(3, 2, Discrete(2), groups=("hunters", "hunters", "prey"), names=("a", "b", "c d"))
    agents = torch.tensor([[1.0, 3.0, -5.0], [2.0, 2.0, 0.5]])
    found = Episodes(agents.mean(-1), torch.tensor([4, 6]), torch.tensor([True, False]), agents, spec).by_metric()
    assert {name: values.tolist() for name, values in found.items()} == {
        "evaluation/group_return/hunters": [2.0, 2.0],
        "evaluation/group_return/prey": [-5.0, 0.5],
        "evaluation/agent_return/a": [1.0, 2.0],
        "evaluation/agent_return/b": [3.0, 2.0],
        "evaluation/agent_return/c_d": [-5.0, 0.5],
        "evaluation/length": [4.0, 6.0],
        "evaluation/terminated": [1.0, 0.0],
    }


def longer(finished: Path, folder: Path) -> Path:
    """A copy of the run that has two more iterations to train."""
    shutil.copytree(finished, folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("  iterations: 4\n", "  iterations: 6\n"))
    return folder


def test_a_run_that_goes_on_continues_its_episodes(finished: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = longer(finished, tmp_path / "run")
    run.resume(folder, progress=False)
    assert not [str(warning.message) for warning in recwarn if "episodes.csv" in str(warning.message)]
    assert read_metrics(folder / "episodes.csv")["iteration"] == [1, 3, 5]


def test_evaluations_that_are_played_again_are_not_missed(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("iteration,evaluation/length\n0,\n1,8.0\n2,\n3,8.0\n")
    (tmp_path / "episodes.csv").write_text("iteration,evaluation/length/0\n1,8.0\n")
    found = EpisodesFile(tmp_path / "episodes.csv", first_iteration=3).begin()
    assert (found.missing, found.dropped) == ("", "")


def test_an_evaluation_whose_episodes_are_lost_is_named(finished: Path, tmp_path: Path) -> None:
    folder = longer(finished, tmp_path / "run")
    lines = (folder / "episodes.csv").read_text().splitlines(keepends=True)
    (folder / "episodes.csv").write_text("".join([lines[0], lines[2]]))
    with pytest.warns(UserWarning, match=r"episodes\.csv: the rows of iterations 1 are missing"):
        run.resume(folder, progress=False)
    assert read_metrics(folder / "episodes.csv")["iteration"] == [3, 5]
