"""A user's Lightning callbacks: the metrics that they receive, early stopping, and their saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

import marlkit
from marlkit.errors import CheckpointError, OptionError
from marlkit.recipe import Recipe
from marlkit.run.checkpoint_io import load_checkpoint
from marlkit.run.checkpoints import LAST
from marlkit.run.metrics_file import read_metrics
from marlkit.training.learner import Learner


def tiny(*overrides: str) -> Recipe:
    common = [
        "env={type: matrix_game, num_envs: 8}", "data.steps=4", "actor.hidden=[4]", "critic.hidden=[4]", "update.epochs=1",
        "update.minibatch_size=32", "trainer.iterations=5", "trainer.evaluation_interval=1", "trainer.evaluation_episodes=2",
        "trainer.video=false",
    ]  # fmt: skip
    return marlkit.load_recipe("mappo", [*common, *overrides])


class Diary(Callback):
    """Stores the metrics of every iteration, and counts the iterations."""

    def __init__(self) -> None:
        self.notes: list[dict[str, float]] = []
        self.count: Any = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        self.notes.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def saved(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoints" / LAST)


def flat(state: Any) -> list[Any]:
    """All numbers of a part of a checkpoint, in order."""
    if isinstance(state, torch.Tensor):
        return state.flatten().tolist()
    if isinstance(state, (dict, list, tuple)):
        return [number for part in (state.values() if isinstance(state, dict) else state) for number in flat(part)]
    return [state]


@pytest.mark.parametrize("given", [Callback(), [3], None, "early stopping"])
def test_callbacks_that_are_no_list_of_callbacks_are_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`callbacks`: must be a list of callbacks"):
        marlkit.train("mappo", tmp_path, progress=False, callbacks=given)
    assert not list(tmp_path.iterdir())


def test_a_callback_sees_every_metric_of_every_iteration(tmp_path: Path) -> None:
    diary = Diary()
    folder = marlkit.train(tiny("trainer.evaluation_interval=2"), tmp_path, progress=False, callbacks=[diary])
    rows = read_metrics(folder / "metrics.csv")
    assert len(diary.notes) == 5
    for number, note in enumerate(diary.notes):
        row = {name: values[number] for name, values in rows.items() if name != "iteration"}
        # The latest evaluation stays in sight until there is another.
        assert {name: value for name, value in row.items() if value == value}.items() <= note.items()
    assert "evaluation/return" not in diary.notes[0]
    assert diary.notes[2]["evaluation/return"] == diary.notes[1]["evaluation/return"]


def test_early_stopping_leaves_a_complete_run_that_can_resume(tmp_path: Path) -> None:
    enough = EarlyStopping("evaluation/return", mode="max", stopping_threshold=-100.0)
    folder = marlkit.train(tiny(), tmp_path, progress=False, callbacks=[enough])
    assert saved(folder)["marlkit"]["iteration"] == 1
    assert {"curve.png", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    marlkit.resume(folder, progress=False)
    assert saved(folder)["marlkit"]["iteration"] == 5
    whole = marlkit.train(tiny(), tmp_path, progress=False)
    for part in ("state_dict", "optimizer_states"):
        assert flat(saved(folder)[part]) == flat(saved(whole)[part])


def test_the_state_of_a_callback_is_saved_as_of_the_end_of_the_iteration(tmp_path: Path) -> None:
    enough = EarlyStopping("frames", mode="max", stopping_threshold=3 * 32 - 1)
    folder = marlkit.train(tiny(), tmp_path, progress=False, callbacks=[Diary(), enough])
    assert saved(folder)["callbacks"]["Diary"] == {"count": 3}
    again = Diary()
    marlkit.resume(folder, progress=False, callbacks=[again])
    assert (again.count, len(again.notes)) == (5, 2)


def test_a_resumed_callback_sees_what_the_one_before_it_saw(tmp_path: Path) -> None:
    """The latest evaluation, too, which was in an iteration before the stop."""
    every = "trainer.evaluation_interval=4"
    whole, first, second = Diary(), Diary(), Diary()
    marlkit.train(tiny(every, "trainer.iterations=7"), tmp_path, progress=False, callbacks=[whole])
    enough = EarlyStopping("frames", mode="max", stopping_threshold=5 * 32 - 1)
    folder = marlkit.train(tiny(every, "trainer.iterations=7"), tmp_path, progress=False, callbacks=[first, enough])
    marlkit.resume(folder, progress=False, callbacks=[second])
    assert (len(first.notes), len(second.notes)) == (5, 2)
    for seen, expected in zip(first.notes + second.notes, whole.notes, strict=True):
        assert seen.keys() >= expected.keys() - {name for name in expected if name.startswith("time/")}
        assert all(seen[name] == value for name, value in expected.items() if not name.startswith("time/"))
    assert "evaluation/return" in second.notes[0]


def test_a_callback_whose_state_is_more_than_plain_data_is_named(tmp_path: Path) -> None:
    diary = Diary()
    diary.state_dict = lambda: {"count": object()}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"not saved: `checkpoint\['callbacks'\]\['Diary'\]\['count'\]` is a object"):
        marlkit.train(tiny(), tmp_path, progress=False, callbacks=[diary])
