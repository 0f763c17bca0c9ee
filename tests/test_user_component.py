"""A critic in a user's file: trained, checked, resumed and, if it is broken, refused by name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import marlkit
from marlkit.cli import main
from marlkit.run.metrics_file import read_metrics
from marlkit.testing import check_component, spec_examples

ROOT = Path(marlkit.__file__).parents[1]

CRITIC = '''\
"""A critic of a user."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract
from marlkit.errors import OptionError
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import PositiveInt
from marlkit.spec import TeamSpec


class NeighbourCritic(Critic):
    """Values an agent's observation and the mean over the team.

    Args:
        spec: the team.
        width: units of the hidden layer.
        value_norm: regress on running-normalised targets.
    """

    contract = Contract(reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec, *, width: PositiveInt = 16, value_norm: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=value_norm)
        inputs = 2 * spec.observation
        self.network = torch.nn.Sequential(torch.nn.Linear(inputs, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def predict(self, batch: TensorDictBase) -> Tensor:
        """The value in normalised units."""
        seen = batch[keys.OBSERVATION]
        mean = seen.mean(-2, keepdim=True).expand_as(seen)
        return self.network(torch.cat([seen, mean], -1))
'''

RECIPE = """\
env: {type: vmas, scenario: balance, num_envs: 4, max_steps: 5, scenario_options: {n_agents: 2}}
actor: {type: stochastic, hidden: [4]}
critic:
  type: MODULE.NeighbourCritic
  width: 8
data: {type: rollout, steps: 6}
estimator: gae
update: {type: ppo_clip, epochs: 1, minibatch_size: 12}
trainer: {type: lightning, iterations: 2, video: false, evaluation_episodes: 2}
"""
# Each test has a module name of its own, because Python imports a module once.


def write(folder: Path, module: str, critic: str = CRITIC, recipe: str = RECIPE) -> Path:
    """The critic, and a recipe beside it that names it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(critic)
    file = folder / "team.yaml"
    file.write_text(recipe.replace("MODULE", module))
    return file


def the_run(root: Path) -> Path:
    (folder,) = (root / "team").iterdir()
    return folder


@pytest.fixture(autouse=True)
def _search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the folders of components from the search path again."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_trained_by_the_command_in_its_folder(tmp_path: Path) -> None:
    write(tmp_path, "users_critic_a")
    command = [sys.executable, "-m", "marlkit", "train", "team.yaml", "--trust", "--no-progress"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = the_run(tmp_path / "runs")
    assert done.stdout.strip() == str(folder.relative_to(tmp_path))
    assert "Traceback" not in done.stderr
    metrics = read_metrics(folder / "metrics.csv")
    assert metrics["iteration"] == [0, 1]
    assert all(value > 0 for value in metrics["critic/grad_norm"]), "it is trained"
    completed = (folder / "recipe.yaml").read_text()
    assert "type: users_critic_a.NeighbourCritic\n  width: 8\n  value_norm: true\n" in completed


def test_found_beside_its_recipe_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "project", "users_critic_b")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["check", "--run", "--trust", str(file)]) == 0
    assert main(["train", str(file), "--root", str(tmp_path), "--no-progress"]) == 0
    folder = the_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("iterations: 2", "iterations: 3"))
    assert main(["resume", str(folder), "--no-progress"]) == 0
    assert main(["evaluate", str(folder)]) == 0
    assert read_metrics(folder / "metrics.csv")["iteration"] == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_swapped_into_a_shipped_recipe_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "users_critic_c")
    monkeypatch.chdir(tmp_path)
    small = ["env.num_envs=4", "data.steps=6", "update.minibatch_size=12", "trainer.iterations=1", "trainer.video=false"]
    assert main(["train", "mappo", "critic=users_critic_c.NeighbourCritic", *small, "--no-progress"]) == 0
    assert "does not take `hidden`: dropped" in capsys.readouterr().err


@pytest.mark.parametrize("spec", spec_examples(), ids=lambda spec: f"{spec.n_agents}x{type(spec.action).__name__}")
def test_passes_the_tests_that_every_component_passes(spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"users_critic_d{spec.n_agents}{spec.observation}{spec.action_features}{spec.discrete}"
    write(tmp_path, module)
    monkeypatch.syspath_prepend(tmp_path)
    check_component(importlib.import_module(module).NeighbourCritic(spec, width=4))


BROKEN = {
    "its shapes do not fit": (
        "inputs = 2 * spec.observation",
        "inputs = 3 * spec.observation",
        ["dry run: critic (NeighbourCritic) failed: RuntimeError", "mat1 and mat2"],
    ),
    "it writes another shape": (
        "return self.network(torch.cat([seen, mean], -1))",
        "return self.network(torch.cat([seen, mean], -1)).mean(-2)",
        ["dry run: critic (NeighbourCritic) wrote `agents.state_value` as float32 [1]", "[N 1] = [2, 1]"],
    ),
    "it writes another key than it declares": (
        "writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE",
        "writes=(keys.STATE_VALUE, keys.ACTION_VALUE), predicts=keys.STATE_VALUE",
        ["dry run: critic (NeighbourCritic) failed: KeyError", "action_value"],
    ),
    "it reads a key that no component writes": (
        "batch[keys.OBSERVATION]",
        "batch[keys.ACTION_VALUES]",
        ["dry run: critic (NeighbourCritic) failed: KeyError", "action_values"],
    ),
    "its prediction is detached": (
        "return self.network(torch.cat([seen, mean], -1))",
        "return self.network(torch.cat([seen, mean], -1)).detach()",
        ["dry run: no gradient reaches critic (NeighbourCritic)", "detached"],
    ),
    "its constructor fails": (
        "inputs = 2 * spec.observation",
        "inputs = 2 * spec.observations",
        ["team.yaml:4: critic.type", "`NeighbourCritic` cannot be built: AttributeError", "observations"],
    ),
    "its constructor refuses an option": (
        "        self.spec = spec\n",
        "        self.spec = spec\n        if width < 10:\n            raise OptionError('width', 'must be at least 10')\n",
        ["team.yaml:5: critic.width", "must be at least 10"],
    ),
    "its module fails": (
        "\n\nclass NeighbourCritic",
        "\n\nLIMIT = 1 / 0\n\n\nclass NeighbourCritic",
        ["cannot be imported: ZeroDivisionError"],
    ),
    "its module needs what is not installed": (
        "import torch\n",
        "import torch\nimport no_such_package\n",
        ["cannot be imported: ", "no_such_package"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_ones_are_refused_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, says = BROKEN[name]
    assert old in CRITIC
    module = "users_critic_e" + str(list(BROKEN).index(name))
    file = write(tmp_path, module, CRITIC.replace(old, new))
    assert main(["train", str(file), "--root", str(tmp_path / "runs"), "--no-progress", "--trust"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    for part in says:
        assert part in said
    assert not (tmp_path / "runs").exists()


def test_a_mistake_that_can_be_seen_without_running_it_is_found_without_running_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "users_critic_f", recipe=RECIPE.replace("width: 8", "widths: 8"))
    assert main(["check", str(file)]) == 2
    said = capsys.readouterr().err
    assert "team.yaml:5: critic.widths" in said
    assert "Did you mean `width`?" in said
    assert "users_critic_f" not in sys.modules
