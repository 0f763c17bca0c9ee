"""Every recipe: a training that is recorded, killed and resumed equals one that is neither, bit for bit on a CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import GRU, VARIANTS, KilledError, killed_at, known, same, small, states, without_times
from torch import Tensor

from marlkit import run
from marlkit.recipe import load_recipe, shipped
from marlkit.training import assembly
from marlkit.training.learner import Learner

CHANGING = ["optimizer.lr_end=0.1", "update.entropy_coef_end=0.5", "update.step.entropy_coef_end=0.5"]
"""Numbers that differ from iteration to iteration."""
SAMPLED = ("coma", "f2a2_ddpg", "happo", "mappo")
"""Recipes whose GRU variants `make test` takes; the others are left to `make exhaustive`."""
FORAGING = ["env=foraging", "env.map=5x5-2p-1f", "env.max_steps=7"]
CASES = [pytest.param(name, [], id=f"{name}-mlp") for name in sorted(shipped())]
CASES += [pytest.param(name, GRU, id=f"{name}-gru", marks=[] if name in SAMPLED else pytest.mark.exhaustive)
          for name in sorted(shipped()) if known(name, GRU) == GRU]  # fmt: skip
CASES.append(pytest.param("mappo", FORAGING, id="mappo-foraging"))
CASES += [pytest.param(name, extra, id=f"{name}-options") for name, extra in VARIANTS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*expects the trait `separate_parameters`")
@pytest.mark.parametrize(("name", "extra"), CASES)
def test_recorded_killed_and_resumed_equals_plain_and_uninterrupted(
    name: str, extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, optimiser, environment, generators and all metrics but the times."""
    overrides, learners = small(name, *known(name, CHANGING), *extra), learners_of(monkeypatch)
    whole = run.train(load_recipe(name, [*overrides, "trainer.compile=none"]), tmp_path / "whole", progress=False)
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.filterwarnings("error", message=".*not recorded.*")
        killed_at(2, patch)
        with pytest.raises(KilledError):
            run.train(load_recipe(name, [*overrides, "trainer.compile=auto"]), tmp_path / "cut", progress=False)
    (cut,) = (tmp_path / "cut" / name).iterdir()
    assert states(cut)["marlkit"]["iteration"] == 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not recorded.*")
        run.resume(cut, progress=False)
    assert [records(learner) for learner in learners] == [False, True, True]
    ended, expected = states(cut), states(whole)
    for state in (ended, expected):
        state["marlkit"].pop("recipe")
    for part in ("state_dict", "optimizer_states", "marlkit"):
        assert same(ended[part], expected[part]), part
    assert without_times(cut) == without_times(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_recipe_learns_with_graphs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, learners = [*small(name), *known(name, CHANGING), "trainer.accelerator=cuda"], learners_of(monkeypatch)
    one, other = (
        states(run.train(load_recipe(name, [*overrides, f"trainer.compile={mode}"]), tmp_path / mode, progress=False))
        for mode in ("none", "graph")
    )
    assert records(learners[-1])
    for key, value in one["state_dict"].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, other["state_dict"][key], rtol=1e-2, atol=1e-3)


def learners_of(monkeypatch: pytest.MonkeyPatch) -> list[Learner]:
    """The learners of the trainings that follow, as they are built."""
    learners: list[Learner] = []
    build = assembly.build_learner

    def remembered(*given: Any, **named: Any) -> Learner:
        learners.append(build(*given, **named))
        return learners[-1]

    monkeypatch.setattr("marlkit.run.session.build_learner", remembered)
    return learners


def records(learner: Learner) -> bool:
    """Whether it has recorded a step."""
    return any(steps.recorded for steps in learner.step_recorder._known.values())
