"""What a recorded function computes twice is computed once, where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from replays import agree, numbers, replayed
from torch import Tensor

from marlkit.recorder import shared_results as shared_results
from marlkit.recorder.recording import record


def operations(function: Callable[[Tensor], object], *, varying: list[Tensor] | None = None) -> list[str]:
    """Names of what a replay runs; on three inputs it does what the function does, bit for bit."""
    inputs = numbers(4, 3)
    return replayed(agree(function, inputs, varying or []), *inputs[0]).names


def test_the_same_from_the_same_is_computed_once_however_long_the_chain() -> None:
    assert operations(lambda x: ((x + 1) * 2).sum() - ((x + 1) * 2).prod()) == ["add", "mul", "sum", "prod", "sub"]


def test_a_repeated_list_of_results_is_made_once() -> None:
    def function(x: Tensor) -> Tensor:
        parts = [torch._foreach_mul(list(x.unbind()), 2.0) for _ in range(2)]
        return parts[0][1] - parts[1][2]

    assert operations(function).count("_foreach_mul") == 1


def test_other_views_of_a_repeated_result_look_at_the_first() -> None:
    assert operations(lambda x: (x + 1)[:3] @ (x + 1).t()[:, 1:]).count("add") == 1
    assert operations(lambda x: (x + 1)[:3] @ (x + 1)[:3].t()).count("add") == 1
    assert operations(lambda x: (x + 1)[:3] / (x + 1)[1:]).count("add") == 1


def test_a_result_that_is_seen_as_another_type_is_nobody_elses() -> None:
    assert operations(lambda x: (x + 1).sum() - (x + 1).view(torch.int32).sum()).count("add") == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x * 2.0, lambda x: x * 3.0),
        (lambda x: x.long() * 2, lambda x: x.long() * 2.0),
        (lambda x: 1 / x.masked_fill(x > 0, 0.0), lambda x: 1 / x.masked_fill(x > 0, -0.0)),
        (lambda x: x.sum(0), lambda x: x[:3].sum(0)),
        (lambda x: x.sum(dim=[0]), lambda x: x.sum(dim=[0], dtype=torch.float64)),
        (torch.sin, torch.cos),
    ],
    ids=["numbers", "types of numbers", "signs of zero", "parts of a tensor", "options", "operations"],
)
def test_what_only_looks_alike_stays_apart(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
    operations(lambda x: [first(x).double().sum(), second(x).double().sum()])


def test_what_is_read_may_have_changed_in_between() -> None:
    state = torch.ones(3)

    def function(x: Tensor) -> Tensor:
        before = state * 2
        state.add_(x[0])
        return before - state * 2

    assert operations(function, varying=[state]).count("mul") == 2


@pytest.mark.parametrize("which", [0, 1])
def test_a_result_that_is_written_to_is_nobody_elses(which: int) -> None:
    def function(x: Tensor) -> Tensor:
        results = [x + 1, x + 1]
        results[which].mul_(3)
        return results[0] - results[1]

    assert operations(function).count("add") == 2


def test_operations_that_also_write_are_all_done() -> None:
    mean, variance = torch.zeros(3), torch.ones(3)

    def normalised(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._native_batch_norm_legit(x, None, None, mean, variance, True, 0.5, 0.0)[0]
        return result

    operations(lambda x: normalised(x) - normalised(x), varying=[mean, variance])


def test_results_that_leave_the_function_have_memory_of_their_own() -> None:
    recording = record(lambda x: (x + 1, x + 1), numbers(4)[0], [], undo=True)
    one, other = recording.replay(torch.zeros(4))
    one.fill_(7.0)
    assert other.tolist() == [1.0] * 4


def test_random_numbers_are_drawn_as_often_as_ever() -> None:
    recording = record(lambda x: torch.rand_like(x) - torch.rand_like(x), numbers(4)[0], [], undo=True)
    assert recording.replay(torch.zeros(4)).abs().min() > 0


def test_large_results_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes them twice may do so to spare memory."""

    def function(x: Tensor) -> Tensor:
        return (x + 1).sum() - (x + 1).prod()

    assert operations(function).count("add") == 1
    monkeypatch.setattr(shared_results, "SHARED_ELEMENTS", 11)
    assert operations(function).count("add") == 2
    monkeypatch.setattr(shared_results, "SHARED_ELEMENTS", 12)
    assert operations(function).count("add") == 1


# --- what only has the shape of what varies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        torch.ones_like,
        torch.zeros_like,
        lambda x: torch.full_like(x, 2.0),
        lambda x: x.new_full((4, 3), 2.0),
        lambda x: x.new_zeros(3),
        lambda x: x.new_ones(3),
    ],
)
def test_what_has_only_the_shape_of_a_tensor_is_a_constant(make: Callable[[Tensor], Tensor]) -> None:
    assert operations(lambda x: x - (make(x) + 1)) == ["sub"]


def test_zeros_that_are_written_to_are_new_zeros_at_each_replay() -> None:
    names = operations(lambda x: torch.zeros_like(x).add_(x) + torch.zeros_like(x))
    assert names.count("zeros_like") == 1


def test_the_shape_is_that_of_something_that_nobody_else_asks_for() -> None:
    assert operations(lambda x: torch.zeros_like(x * 2).add_(x)).count("add_") == 1
