"""Steps that are replayed do what steps do that are run operation by operation, bit for bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import rng
from marlkit.options import CompileMode
from marlkit.recorder.steps import SPARE, StepRecorder

CUDA = pytest.mark.gpu


class Line(nn.Module):
    """``w x``, fitted to nothing in particular by steps of its own."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.register_buffer("seen", torch.zeros(()))
        self.steps = 0

    def step(self, rows: TensorDictBase) -> dict[str, Tensor]:
        self.seen += rows["x"].sum()
        loss = (self.w * rows["x"]).square().mean() + 0.1 * torch.rand(()) * self.w.sum()
        (gradient,) = torch.autograd.grad(loss, [self.w])
        with torch.no_grad():
            self.w.sub_(gradient, alpha=0.1)
        return {"loss": loss.detach()}


def step_recorder(line: Line, mode: CompileMode = "record") -> StepRecorder:
    return StepRecorder(mode, line)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each recording that is made; a step that counts its calls would not be recorded."""
    made: list[int] = []
    record = StepRecorder._record

    def counting(recorder: StepRecorder, step: Any, rows: dict[Any, Tensor], batch_size: torch.Size) -> Any:
        made.append(batch_size[0])
        return record(recorder, step, rows, batch_size)

    monkeypatch.setattr(StepRecorder, "_record", counting)
    return made


def batches(count: int) -> Iterator[TensorDict]:
    for i in range(count):
        yield TensorDict({"x": torch.randn(3, 2, generator=torch.Generator().manual_seed(i))}, batch_size=[3])


def taken(
    mode: CompileMode, step: Callable[[Line], Callable[[TensorDictBase], dict[str, Tensor]]] = lambda line: line.step
) -> list[Any]:
    torch.manual_seed(0)
    line = Line()
    run_step = step_recorder(line, mode)
    results = [run_step("step", step(line), rows)["loss"] for rows in batches(6)]
    return [*results, line.w.detach(), line.seen, torch.rand(())]


def test_replays_do_what_the_steps_do() -> None:
    for plain, replayed in zip(taken("none"), taken("record"), strict=True):
        assert torch.equal(plain, replayed)


def test_the_step_itself_is_called_less_and_less_often() -> None:
    """In the first call, to be recorded, and to be compared with replays number 1 and 10."""
    line, called = Line(), Mock()  # whose attributes are a library's, and not looked at
    run_step = step_recorder(line)

    def step(rows: TensorDictBase) -> dict[str, Tensor]:
        called()
        return line.step(rows)

    counts = []
    for rows in batches(20):
        before = called.call_count
        run_step("step", step, rows)
        counts.append(called.call_count - before)
    assert [number for number, count in enumerate(counts, start=1) if count] == [1, 2, 3, 12]
    assert sum(counts) == 4


def test_other_names_and_other_shapes_are_other_steps(recordings: list[int]) -> None:
    line = Line()
    run_step = step_recorder(line)
    for rows in batches(4):
        run_step("one", line.step, rows)
        run_step("one", line.step, rows[:2])
        run_step("two", line.step, rows)
    assert sorted(recordings) == [2, 3, 3]


@pytest.mark.parametrize("learns", [True, False])
def test_steps_that_change_parameters_are_recorded_anew_where_the_optimizers_numbers_change(
    learns: bool, recordings: list[int]
) -> None:
    line = Line()
    optimizer = torch.optim.SGD(line.parameters(), lr=1.0)
    run_step = StepRecorder("record", line, lambda: [optimizer])

    def step(rows: TensorDictBase) -> dict[str, Tensor]:
        if learns:
            torch.autograd.backward(line.w.sum())
            optimizer.step()
            optimizer.zero_grad()
        return {"w": line.w.detach() * rows["x"].sum()}

    expected = line.w.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, rows in enumerate(batches(2 * SPARE + 4)):
            optimizer.param_groups[0]["lr"] = 1.0 + number
            expected -= optimizer.param_groups[0]["lr"] if learns else 0.0
            assert torch.equal(run_step("step", step, rows)["w"], expected * rows["x"].sum())
    assert len(recordings) == (2 * SPARE + 3 if learns else 1)
    assert len(run_step._known) == 1


@pytest.mark.parametrize("mode", ["none", "record"])
def test_what_is_put_off_is_done_after_each_step(mode: Any) -> None:
    line, done = Line(), []
    run_step = step_recorder(line, mode=mode)

    def step(rows: TensorDictBase) -> dict[str, Tensor]:
        run_step.afterwards(lambda: done.append(float(line.seen)))
        return repeat_within(rows) | line.step(rows)

    def repeat_within(rows: TensorDictBase) -> dict[str, Tensor]:
        with run_step._deferring([]):
            run_step.afterwards(lambda: done.append(float("nan")))
        return {}

    expected = 0.0
    for count, rows in enumerate(batches(5), start=1):
        run_step("step", step, rows)
        expected += float(rows["x"].sum())
        assert len(done) == count
        assert done[-1] == pytest.approx(expected, abs=1e-5)


def refused(step: Callable[[Line, TensorDictBase], dict[str, Tensor]], match: str) -> None:
    """The step is run as it is, every time, and says once why."""
    line, plain = Line(), Line()
    run_step = step_recorder(line)
    rng.seed_all(0)
    expected = [step(plain, rows) for rows in batches(4)]
    rng.seed_all(0)
    with pytest.warns(UserWarning, match=match) as caught:
        found = [run_step("step", lambda rows: step(line, rows), rows) for rows in batches(4)]
    assert len(caught) == 1
    assert all(torch.equal(a["loss"], b["loss"]) for a, b in zip(expected, found, strict=True))
    assert torch.equal(line.w, plain.w)
    assert (line.steps, float(line.seen)) == (plain.steps, float(plain.seen))


def test_a_step_that_counts_in_python_is_not_recorded() -> None:
    def step(line: Line, rows: TensorDictBase) -> dict[str, Tensor]:
        line.steps += 1
        return line.step(rows)

    refused(step, "`Line.steps`, which Python holds")


def test_a_refused_recording_leaves_no_trace() -> None:
    line = Line()
    run_step = step_recorder(line)

    def step(rows: TensorDictBase) -> dict[str, Tensor]:
        line.steps += 1
        return {"x": rows["x"].sum() if rows["x"].sum() > 0 else rows["x"].mean()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in batches(5):
            run_step("step", step, rows)
    assert line.steps == 5


def test_a_step_that_binds_a_buffer_anew_is_not_recorded() -> None:
    def step(line: Line, rows: TensorDictBase) -> dict[str, Tensor]:
        line.seen = line.seen + rows["x"].sum()
        return {"loss": line.seen}

    refused(step, "`Line.seen`, which Python holds")


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_a_step_that_draws_elsewhere_than_from_torch_is_not_recorded(draw: Callable[[], float]) -> None:
    def step(line: Line, rows: TensorDictBase) -> dict[str, Tensor]:
        return {"loss": rows["x"].sum() * draw()}

    refused(step, "random numbers from numpy or Python")


def test_a_step_that_depends_on_values_is_not_recorded() -> None:
    def step(line: Line, rows: TensorDictBase) -> dict[str, Tensor]:
        results = line.step(rows)
        return results if rows["x"].sum() > 0 else {"loss": -results["loss"]}

    refused(step, "hands a value to Python")


def test_a_step_that_brings_tensors_along_is_not_recorded() -> None:
    """They would stay what they were; those that it makes itself, and literals, do not matter."""
    brought = torch.ones(3, 2)
    refused(lambda line, rows: {"loss": line.step(rows)["loss"] + (rows["x"] * brought).sum()}, r"shape \[3, 2\]")
    line = Line()
    run_step = step_recorder(line)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in batches(3):
            run_step("step", lambda some: {"loss": line.step(some)["loss"] + torch.tensor(2.0) * some["x"].sum().clone()}, rows)
