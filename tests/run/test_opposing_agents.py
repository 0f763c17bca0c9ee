"""A run whose agents are opposed: what is logged, drawn, saved as the best and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vmas")

import torch
from matplotlib.figure import Figure
from small_runs import KilledError, killed_at, small, without_times

from marlkit import run
from marlkit.errors import RecipeError
from marlkit.ranks import Ranks
from marlkit.recipe import load_recipe
from marlkit.run import curve
from marlkit.run.checkpoints import Checkpoints
from marlkit.run.metrics_file import returns_of
from marlkit.spec import Discrete, TeamSpec
from marlkit.training.assembly import choose_monitor

TAG = small("mappo", "env.scenario=simple_tag", "env.scenario_options={num_adversaries: 2}")
GROUP = "evaluation/group_return/adversaries"
OPPOSED = TeamSpec(2, 2, Discrete(2), names=("wolf", "sheep"), groups=("wolves", "prey"))
TEAM = TeamSpec(2, 2, Discrete(2))


@pytest.mark.filterwarnings("ignore:the agents are opposed")
def test_a_run_of_opposed_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(curve, "_save", lambda figure, png: drawn.append(figure))
    recipe = load_recipe("mappo", TAG)
    with pytest.warns(
        UserWarning, match=f"best.ckpt is the latest one. To choose by a group's return set trainer.monitor={GROUP}"
    ):
        folder = run.train(recipe, tmp_path, progress=False)
    metrics = without_times(folder)
    assert GROUP in metrics
    assert "episode/agent_return/adversary_1" in metrics
    assert not {"episode/return", "evaluation/return", "episode/reward"} & set(metrics)
    labels = [line.get_label() for line in drawn[0].axes[0].lines]
    assert labels == [
        *("adversaries: training episodes", "good_agents: training episodes"),
        *("adversaries: evaluation, deterministic", "good_agents: evaluation, deterministic"),
    ]
    assert len({line.get_color() for line in drawn[0].axes[0].lines}) == 4
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["marlkit"]["iteration"] == 4, "the latest evaluation"
    assert GROUP in run.evaluate(folder)

    killed_at(3, monkeypatch)
    with pytest.raises(KilledError):
        run.train(recipe, tmp_path / "killed", progress=False)
    monkeypatch.undo()
    (killed,) = (tmp_path / "killed" / "mappo").iterdir()
    with pytest.warns(UserWarning, match="latest one"):
        run.resume(killed, progress=False)
    assert without_times(killed) == metrics, "per-agent sums of running episodes are resumed exactly"


@pytest.mark.parametrize(
    ("spec", "wanted", "found"),
    [
        (TEAM, "null", "evaluation/return"),
        (TEAM, "evaluation/agent_return/agent_1", "evaluation/agent_return/agent_1"),
        (OPPOSED, "null", None),
        (OPPOSED, "evaluation/group_return/prey", "evaluation/group_return/prey"),
        (OPPOSED, "evaluation/agent_return/wolf", "evaluation/agent_return/wolf"),
    ],
)
def test_choice_of_the_metric(spec: TeamSpec, wanted: str, found: str | None) -> None:
    assert choose_monitor(load_recipe("mappo", [f"trainer.monitor={wanted}"]), spec) == found


@pytest.mark.parametrize(("spec", "wanted"), [(OPPOSED, "evaluation/return"), (TEAM, "evaluation/group_return/prey")])
def test_a_metric_that_no_evaluation_has_is_refused(spec: TeamSpec, wanted: str) -> None:
    with pytest.raises(RecipeError, match=f"no evaluation of these agents has the metric `{wanted}`") as caught:
        choose_monitor(load_recipe("mappo", [f"trainer.monitor={wanted}"]), spec)
    assert "There are: evaluation/" in caught.value.problems[0].remedy


class Saver:
    """Stands for Lightning's Trainer: notes what is saved."""

    def __init__(self) -> None:
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.should_stop, self.current_epoch, self.max_epochs = False, 0, 100
        self.saved: list[str] = []

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        self.saved.append(path.name)


def learner(iteration: int, evaluated: bool) -> Any:
    from marlkit.training.learner import Learner

    class Fake(Learner):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.iteration = iteration
            self.ranks = Ranks(0)

        def is_evaluated(self) -> bool:
            return evaluated

    return Fake()


def test_the_largest_value_of_the_metric_is_the_best(tmp_path: Path) -> None:
    saver: Any = Saver()
    checkpoints = Checkpoints(tmp_path, seconds=1e9, monitor="evaluation/group_return/prey")
    for value, other in ((1.0, 5.0), (3.0, 0.0), (2.0, 9.0)):
        saver.callback_metrics["evaluation/group_return/prey"] = torch.tensor(value)
        saver.callback_metrics["evaluation/return"] = torch.tensor(other)
        checkpoints.on_train_epoch_end(saver, learner(1, True))
        saver.saved.append(str(value))
    assert saver.saved == ["best.ckpt", "1.0", "best.ckpt", "3.0", "2.0"]
    again, another = (Checkpoints(tmp_path, seconds=1e9, monitor=name) for name in (checkpoints.monitor, "evaluation/return"))
    for each in (again, another):
        each.load_state_dict(checkpoints.state_dict())
    assert (again.best, another.best) == (3.0, float("-inf"))
    old = Checkpoints(tmp_path, seconds=1e9)
    old.load_state_dict({"best": 4.0})
    assert old.best == 4.0


def test_without_a_metric_every_evaluation_is_saved(tmp_path: Path) -> None:
    saver: Any = Saver()
    checkpoints = Checkpoints(tmp_path, seconds=1e9, monitor=None)
    for iteration, evaluated in ((1, False), (2, True), (3, False), (4, True)):
        checkpoints.on_train_epoch_end(saver, learner(iteration, evaluated))
        saver.saved.append(str(iteration))
    assert saver.saved == ["1", "best.ckpt", "2", "3", "best.ckpt", "4"]


def test_returns_of_groups_stand_for_the_teams() -> None:
    metrics = ["episode/return", "episode/group_return/wolves", "episode/group_return/prey", "evaluation/return"]
    assert returns_of("episode/return", metrics) == {"wolves": metrics[1], "prey": metrics[2]}
    assert returns_of("evaluation/return", metrics) == {"": "evaluation/return"}
    assert returns_of("episode/return", []) == {}
