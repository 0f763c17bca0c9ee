"""Components of a user that change in Python while they are trained: recorded or not, the numbers are the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import same, small, states, without_times
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import run
from marlkit.actors.stochastic import StochasticActor
from marlkit.data.replay import ReplayData
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.learning import Afterwards, Learning, Metrics
from marlkit.optim._actor_critic import Taken
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.recipe import load_recipe
from marlkit.recorder.guards import Guards
from marlkit.targets.soft import SoftTargets


class OnceUpdate(PpoClipUpdate):
    """Its policy learns in the first iteration only."""

    weight = 1.0

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        metrics = super().update(batch, learning)
        self.weight = 0.0
        return metrics

    def policy_loss(self, log_prob: Tensor, taken: Taken) -> tuple[Tensor, Metrics]:
        loss, metrics = super().policy_loss(log_prob, taken)
        return self.weight * loss, metrics


class FadingActor(StochasticActor):
    """Its actions shrink as training goes on."""

    size = 1.0

    def schedule(self, progress: float) -> None:
        self.size = 1.0 - progress / 2

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        return super().forward(batch.set(("agents", "observation"), batch["agents", "observation"] * self.size), deterministic)


class DecayingAdam(AdamOptimizer):
    """Its weight decay changes with its rates."""

    def schedule(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        for group in optimizer.param_groups:
            group["weight_decay"] = progress


class SlowingTargets(SoftTargets):
    """They follow ever more slowly."""

    def approach(self, name: str, afterwards: Afterwards) -> None:
        self.tau *= 0.9
        super().approach(name, afterwards)


class FartherEstimator(OneStepEstimator):
    """Its discount grows with each batch."""

    def returns(self, *given: Tensor) -> Tensor:
        found = super().returns(*given)
        self.gamma = 1 - 0.9 * (1 - self.gamma)
        return found


class OwnReplay(ReplayData):
    """One of a user's, that runs between the steps of an iteration."""


HERE = "test_changing_components"
CASES = [
    ("mappo", (f"update.type={HERE}.OnceUpdate", f"actor.type={HERE}.FadingActor", f"optimizer.type={HERE}.DecayingAdam"), 0),
    ("maddpg", (f"targets.type={HERE}.SlowingTargets", f"estimator.type={HERE}.FartherEstimator"), 2),
]


@pytest.mark.parametrize(("recipe", "own", "refused"), CASES, ids=["between steps", "in steps"])
def test_what_changes_in_python_is_taken_in(recipe: str, own: tuple[str, ...], refused: int, tmp_path: Path) -> None:
    found: list[Any] = []
    for mode in ("none", "auto"):
        options = [*small(recipe), *own, "trainer.iterations=3", "trainer.evaluation_interval=0", f"trainer.compile={mode}"]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            folder = run.train(load_recipe(recipe, options), tmp_path / mode, progress=False)
        found.append((states(folder)["state_dict"], without_times(folder)))
    assert same(found[0], found[1])
    assert len([warning for warning in told if "is not recorded" in str(warning.message)]) == refused


@pytest.mark.parametrize(
    ("own", "each_time"),
    [
        ((), False),
        ((f"data.type={HERE}.OwnReplay",), True),
        ((f"optimizer.type={HERE}.DecayingAdam",), True),
        ((f"estimator.type={HERE}.FartherEstimator",), True),
    ],
    ids=["none", "data", "optimizer", "estimator"],
)
def test_only_code_of_a_user_is_distrusted_within_an_iteration(
    own: tuple[str, ...], each_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all components are marlkit's own, what Python holds is compared once per iteration and recorded step."""
    iterations, steps, looks = 6, 4, 0
    hold = Guards.hold

    def counting(guards: Guards) -> bool:
        nonlocal looks
        looks += 1
        return hold(guards)

    monkeypatch.setattr(Guards, "hold", counting)
    options = [
        *small("maddpg"),
        *own,
        f"trainer.iterations={iterations}",
        "trainer.evaluation_interval=0",
        "trainer.compile=record",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train(load_recipe("maddpg", options), tmp_path, progress=False)
    assert looks > iterations * steps if each_time else 0 < looks <= iterations * steps
