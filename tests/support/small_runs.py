"""Shipped recipes made tiny, runs that fail on purpose, and the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.torture import same as same
from marlkit.recipe import load_recipe
from marlkit.run.checkpoint_io import load_checkpoint
from marlkit.run.checkpoints import LAST
from marlkit.run.metrics_file import read_metrics
from marlkit.training.learner import Learner

SMALL = [
    "env.num_envs=4", "env.max_steps=8", "actor.hidden=[8]", "actor.embedding=8", "critic.hidden=[8]", "critic.embedding=8",
    "data.steps=10", "data.batch_size=20", "data.updates=2", "data.capacity=100", "data.warm_up=40",
    "update.epochs=2", "update.minibatch_size=20", "update.step.epochs=2", "update.step.minibatch_size=20",
    "trainer.iterations=4", "trainer.evaluation_interval=2", "trainer.evaluation_episodes=2", "trainer.video=false",
    "trainer.checkpoint_seconds=0",
]  # fmt: skip
"""Overrides that make a recipe tiny; each recipe takes those that its components have."""
VARIANTS = [
    ("mappo", ["critic.value_norm=popart", "update.valued_agents=alive", "estimator.standardise_reward=shift",
               "update.ratio=dimension", "update.team_advantage=true"]),
    ("maddpg", ["critic.value_norm=popart", "estimator.standardise_reward=scale"]),
    ("happo", ["update.order=fixed", "actor.share=all"]),
    ("hatrpo", ["update.order=[2,0,1]", "actor.share=all", "critic.value_norm=popart", "critic.share=none"]),
]  # fmt: skip
"""Recipes with options that no shipped one has."""
GRU = ["actor.body=gru", "actor.sequence_length=5"]


def known(name: str, overrides: Sequence[str]) -> list[str]:
    """Those of ``overrides`` that set an option of a component of the recipe."""
    entries = load_recipe(name).entries
    split = [(text, *text.partition("=")[0].rpartition(".")[::2]) for text in overrides]
    return [text for text, path, option in split if path in entries and option in entries[path].options]


def small(name: str, *extra: str) -> list[str]:
    """Overrides that make a shipped recipe tiny."""
    return [*known(name, SMALL), *extra]


class KilledError(Exception):
    """Stands for the end of the process by a kill."""


def killed_at(iteration: int, monkeypatch: pytest.MonkeyPatch, death: type[BaseException] = KilledError) -> None:
    """Fail in the middle of an iteration, after collecting."""
    annotate = Learner.annotate

    def dying(self: Learner, batch: torch.Tensor) -> None:
        if self.iteration == iteration:
            raise death
        annotate(self, batch)

    monkeypatch.setattr(Learner, "annotate", dying)


def states(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return load_checkpoint(folder / "checkpoints" / LAST)


def without_times(folder: Path) -> dict[str, list[str]]:
    """Metrics and episodes of evaluations, number by number."""
    metrics = read_metrics(folder / "metrics.csv")
    found = {name: [repr(v) for v in values] for name, values in metrics.items() if not name.startswith("time/")}
    return found | {
        f"episodes.csv {name}": [*map(repr, values)] for name, values in read_metrics(folder / "episodes.csv").items()
    }
