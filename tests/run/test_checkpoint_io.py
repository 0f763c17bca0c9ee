"""Checkpoints: exact, atomic under kill -9, never executed."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from marlkit.errors import CheckpointError
from marlkit.run.checkpoint_io import AtomicCheckpointIO, load_checkpoint, save_checkpoint


class Payload:
    """Creates the file ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def checkpoint(version: int = 1) -> dict[str, Any]:
    return {"state_dict": OrderedDict(weight=torch.full((20_000,), float(version))), "epoch": version}


def test_what_is_saved_loads_exactly(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "last.ckpt"
    plain = {"list": [1, 2.5, None], "tuple": (True, "a"), "bytes": b"\x00", "size": torch.Size([2])}
    save_checkpoint({**plain, "deep": {3: torch.arange(3)}}, path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.pop("deep")[3], torch.arange(3))
    assert loaded == plain
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def record(name: str, genuine: Callable[..., None]) -> Callable[..., None]:
        def recorded(*arguments: Any) -> None:
            order.append(name)
            genuine(*arguments)

        return recorded

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert order == ["fsync", "replace", "fsync"]


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(1), path)

    def half(_: Any, file: io.BufferedWriter) -> None:
        file.write(b"PK\x03\x04 half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(checkpoint(2), path)
    assert load_checkpoint(path)["epoch"] == 1
    save_checkpoint(checkpoint(3), path)
    assert load_checkpoint(path)["epoch"] == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_reported_and_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(1), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_checkpoint(checkpoint(2), path)
    assert load_checkpoint(path)["epoch"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def save_for_ever(path: Path, first: int) -> None:
    torch.set_num_threads(1)
    for version in count(first):
        save_checkpoint(checkpoint(version), path)


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, version = tmp_path / "last.ckpt", 0
    save_checkpoint(checkpoint(version), path)
    for attempt in range(15):
        writer = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path, version + 1))
        before = path.stat().st_ino
        writer.start()
        while path.stat().st_ino == before:
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        loaded = load_checkpoint(path, required=["state_dict", "epoch"])
        assert loaded["epoch"] > version
        version = loaded["epoch"]
        assert torch.equal(loaded["state_dict"]["weight"], torch.full((20_000,), float(version)))


@pytest.mark.parametrize("share", [0.0, 0.00002, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named_damaged(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: is damaged.*Use another checkpoint"):
        load_checkpoint(path)


def test_overwritten_bytes_are_named_damaged(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(checkpoint(), path)
    whole = bytearray(path.read_bytes())
    middle = whole.index(b"data.pkl") + 20
    whole[middle : middle + 30] = b"\xff" * 30
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: "):
        load_checkpoint(path)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, archive: bool) -> None:
    path, trace = tmp_path / "last.ckpt", tmp_path / "was_run"
    evil = {"state_dict": {}, "epoch": Payload(trace)}
    if archive:
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match=r"last\.ckpt: refused.*Nothing in it was run"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not trace.exists()
    torch_loads_it = torch.load(path, weights_only=False) if archive else pickle.loads(path.read_bytes())
    assert torch_loads_it is not None
    assert trace.exists(), "the payload would not have run anyway, so the test shows nothing"


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [np.float64(1.0)]}, r"checkpoint\['a'\]\[0\]` is a float64"),
        ({"a": Path("x")}, r"checkpoint\['a'\]` is a \w*Path"),
        ({Path("x"): 1}, r"is a \w*Path"),
    ],
)
def test_values_that_could_not_be_loaded_are_not_saved(tmp_path: Path, value: dict[Any, Any], where: str) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(CheckpointError, match=where):
        save_checkpoint(value, path)
    assert not path.exists()


def test_missing_keys_a_folder_and_a_missing_file_give_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises(CheckpointError, match="it lacks state_dict, recipe"):
        load_checkpoint(path, required=["state_dict", "epoch", "recipe"])
    torch.save(torch.zeros(2), path)
    with pytest.raises(CheckpointError, match="holds a Tensor, not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        load_checkpoint(tmp_path / "best.ckpt")
    path.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="not an archive"):
        load_checkpoint(path)


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


def quiet_trainer(folder: Path, epochs: int) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, plugins=[AtomicCheckpointIO(required=["state_dict"])],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_lightning_trainer_saves_and_resumes_through_it(tmp_path: Path) -> None:
    data: DataLoader[torch.Tensor] = DataLoader(torch.ones(4, 1))  # type: ignore[arg-type]
    first = Tiny()
    trainer = quiet_trainer(tmp_path, 2)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = Tiny()
    resumed = quiet_trainer(tmp_path, 2)
    resumed.fit(second, data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed.global_step == trainer.global_step == 8
    assert torch.equal(first.layer.weight, second.layer.weight)
