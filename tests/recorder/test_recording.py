"""Recorded functions do what the functions do, or are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from replays import agree, numbers, replayed, same
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from marlkit.errors import MarlkitError
from marlkit.recorder.recording import Graph, NotRecordable, record

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# --- what is recorded --------------------------------------------------------------------------------------------------------


def test_results_follow_the_inputs_and_keep_their_structure() -> None:
    def function(x: Tensor) -> dict[str, Any]:
        return {"sum": x.sum(), "parts": (x[:, 0], [x * 2, "word"]), "none": None, "largest": x.max(1)}

    agree(function, numbers(4, 3), [])


def test_varying_memory_is_read_where_it_is_and_written_to() -> None:
    state, rate = torch.ones(3), torch.tensor(0.5)

    def function(x: Tensor) -> Tensor:
        state.mul_(rate).add_(x)
        return state.clone()

    recording = record(function, [torch.ones(3)], [state, rate])
    assert recording.first.tolist() == [1.5] * 3
    rate.fill_(2.0)
    assert recording.replay(torch.full((3,), 4.0)).tolist() == [7.0] * 3
    assert state.tolist() == [7.0] * 3


def test_views_written_through_change_what_they_look_at() -> None:
    state = torch.zeros(4, 3)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.zeros(4, 3)
        made[:, 1] = x[:, 0]
        column = made.t()[1]
        column += 1
        made.view(-1)[::5].mul_(2)
        state[1:3] = made[1:3]
        return made, column.unsqueeze(0).expand(2, 4)

    agree(function, numbers(4, 3), [state])


def test_memory_seen_as_another_type() -> None:
    given = torch.arange(4.0)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        bits = (x * 1).view(torch.int32)
        return bits + 1, given.view(torch.int32) + bits[:, :1], torch.view_as_complex(x * 2).abs()

    agree(function, numbers(4, 2), [])


def test_python_values_become_tensors_anew_at_each_replay() -> None:
    def function(x: Tensor) -> Tensor:
        count = torch.tensor([1.0, 2.0])
        count += 1
        count[0] += x[0]
        return count * x

    agree(function, numbers(2), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_numbers_beside_tensors_count_as_they_did(dtype: torch.dtype) -> None:
    """Single precision rounds 0.1 once, to its own nearest; bfloat16 takes it in single precision; integers become floats."""

    def function(x: Tensor) -> list[Tensor]:
        y = x.clone()
        y += 3
        return [x * 0.1, x + 1e-9, x - 0.3, x / 7, torch.add(x, 2, alpha=3), x * True, y, 2 - x]

    values = (torch.arange(-8, 8).reshape(4, 4) / (1 if dtype == torch.int64 else 3)).to(dtype)
    recording = record(function, [values], [])
    for found, expected in zip(recording.replay(values + 1), function(values + 1), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("structure", [dict, lambda pairs: {"all": dict(pairs)}, lambda pairs: [dict(pairs), 5]])
def test_dicts_of_results_keep_their_order_and_their_depth(structure: Any) -> None:
    def function(x: Tensor) -> Any:
        return structure([("z", x + 1), (("a", "b"), x * 2), ("m", x)])

    recording = record(function, [torch.zeros(2)], [])
    found, expected = recording.replay(torch.ones(2)), function(torch.ones(2))
    assert str(found) == str(expected)


def test_memory_that_the_function_writes_to_is_state_even_if_nobody_said_so() -> None:
    counter = torch.zeros(1)

    def function(x: Tensor) -> Tensor:
        counter.add_(1)
        return x * counter

    recording = record(function, [torch.ones(1)], [])
    assert [recording.replay(torch.ones(1)).item() for _ in range(3)] == [2.0, 3.0, 4.0]


def test_random_numbers_are_drawn_in_the_same_order() -> None:
    def function(x: Tensor) -> Tensor:
        first = torch.rand(3)
        torch.randn(5)  # used by nobody, but the generator moves on
        return x + first + torch.empty(3).normal_() + torch.randint(0, 5, (3,))

    recording = record(function, [torch.zeros(3)], [], undo=True)
    for each in numbers(3):
        state = torch.get_rng_state()
        expected, after = function(*each), torch.get_rng_state()
        torch.set_rng_state(state)
        assert torch.equal(recording.replay(*each), expected)
        assert torch.equal(torch.get_rng_state(), after)


def test_a_generator_of_ones_own_is_followed() -> None:
    generator = torch.Generator().manual_seed(3)
    undone = record(lambda: torch.rand(2, generator=generator) + torch.rand(2, generator=generator), [], [], undo=True)
    recording = record(lambda: torch.rand(2, generator=generator), [], [])
    found = [recording.first, recording.replay(), recording.replay()]
    generator.manual_seed(3)
    assert [draw.tolist() for draw in found] == [torch.rand(2, generator=generator).tolist() for _ in range(3)]
    assert undone.operations == 3
    assert [named.initial_seed() for named in recording.program.generators] == [3]


def test_undoing_puts_back_memory_and_generators() -> None:
    state = torch.ones(3)
    before = torch.get_rng_state()
    recording = record(lambda x: state.add_(torch.rand(3)).mul_(x), [torch.ones(3)], [state], undo=True)
    assert state.tolist() == [1.0] * 3
    assert torch.equal(torch.get_rng_state(), before)
    assert recording.first is None


def test_the_first_replay_after_undoing_is_the_first_call() -> None:
    state = torch.zeros(2)
    recording = record(lambda x: state.add_(x).clone(), [torch.ones(2)], [state], undo=True)
    assert recording.replay(torch.ones(2)).tolist() == [1.0, 1.0]


# --- what is refused ---------------------------------------------------------------------------------------------------------

CONSTANT = torch.tensor([0.0, 1.0])


def _asks(x: Tensor) -> Tensor:
    return x + 1 if x.any() else x


def _asks_random(x: Tensor) -> Tensor:
    return x + 1 if torch.rand(()) > 0.5 else x


def _asks_written(x: Tensor) -> Tensor:
    made = torch.zeros(2)
    made[0] = x[0]
    return made.t().view(2, 1) * int(made[1].item())


def _asks_randomised(x: Tensor) -> Tensor:
    return x * torch.zeros(2).uniform_().sum().item()


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "branch": (_asks, "hands a value to Python"),
    "branch on a draw": (_asks_random, "hands a value to Python"),
    "number through a view": (_asks_written, "hands a value to Python"),
    "number of a random fill": (_asks_randomised, "hands a value to Python"),
    "equality": (lambda x: torch.equal(x, CONSTANT), "hands a value to Python"),
    "list": (lambda x: torch.tensor(x.tolist()), "hands values to Python"),
    "array": (lambda x: torch.from_numpy(x.numpy() * 1), "hands values to Python"),
    "selection": (lambda x: x[x > 0], "shape depends on values"),
    "places": (lambda x: x.nonzero(), "shape depends on values"),
    "distinct": (lambda x: x.unique(), "shape depends on values"),
    "repeats": (lambda x: torch.repeat_interleave(CONSTANT, (x > 0).long()), "shape depends on values"),
    "resized": (lambda x: (x * 1).resize_(1), "changes a tensor in a way"),
    "write to input": (lambda x: x.add_(1), "writes to an input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_decides_in_python_is_refused_with_the_place(name: str) -> None:
    function, words = REFUSED[name]
    with pytest.raises(NotRecordable, match=words) as caught:
        record(function, [torch.tensor([1.0, -2.0])], [])
    assert "input" in name or "test_recording.py:" in str(caught.value)


def test_setting_data_is_refused() -> None:
    holder = torch.zeros(2)

    def function(x: Tensor) -> None:
        holder.data = x + 1

    with pytest.raises(NotRecordable, match=r"`\.data`"):
        record(function, [torch.ones(2)], [])


def test_a_decision_on_what_turns_out_to_be_state_is_refused() -> None:
    counter = torch.zeros(1)

    def function(x: Tensor) -> Tensor:
        late = bool(counter > 3)
        counter.add_(1)
        return x + late

    with pytest.raises(NotRecordable, match="hands a value to Python"):
        record(function, [torch.ones(1)], [])


def test_inputs_that_share_memory_are_refused() -> None:
    x = torch.ones(2)
    with pytest.raises(NotRecordable, match="share memory"):
        record(lambda a, b: a + b, [x, x], [])
    with pytest.raises(NotRecordable, match="share memory"):
        record(lambda a: a + x, [x], [x])


def test_inputs_that_nobody_reads_are_not_touched() -> None:
    recording = record(lambda x, y: x.t() + 1, [torch.ones(2, 3), torch.ones(2, 3)], [], undo=True)
    gaps = torch.ones(3, 2).t()
    assert replayed(recording, torch.ones(2, 3), gaps).names.count("clone") == 0
    assert replayed(recording, gaps, gaps).names.count("clone") == 1
    same(recording.replay(gaps, gaps), torch.full((3, 2), 2.0))


def test_decisions_on_constants_are_allowed() -> None:
    def function(x: Tensor) -> Tensor:
        places = CONSTANT.nonzero().squeeze(1)
        chosen = torch.tensor([3.0, 4.0])[CONSTANT > 0.5]
        return x[places] * chosen if CONSTANT.any() and torch.tensor([1.0]).tolist() else x

    agree(function, numbers(2), [])


def test_other_inputs_than_recorded_are_refused() -> None:
    recording = record(lambda x: x + 1, [torch.ones(2)], [])
    for other in (torch.ones(3), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(MarlkitError, match=r"takes float32\[2\] on cpu, and not float"):
            recording.replay(other)
    with pytest.raises(MarlkitError, match="and not nothing"):
        recording.replay()
    assert recording.replay(torch.ones(4)[::2]).tolist() == [2.0, 2.0]
    assert recording.replay(torch.arange(4.0)[2:]).tolist() == [3.0, 4.0]


# --- what is left out --------------------------------------------------------------------------------------------------------


def test_what_depends_on_constants_alone_is_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        table = torch.zeros(2, 2)
        table[0] = CONSTANT.exp()
        table += torch.tensor([1.0, 2.0])
        return x * table.sum(0)

    recording = agree(function, numbers(2), [])
    assert replayed(recording, torch.ones(2)).names == ["mul"]


@pytest.mark.parametrize("late", [False, True])
def test_a_constant_that_is_written_to_later_is_not_computed_once(late: bool) -> None:
    def function(x: Tensor) -> Tensor:
        table = CONSTANT + 1
        if not late:
            table[0] += x[0]  # by what varies
        first = table * x
        table.mul_(2)  # after its first reader
        return first + table

    agree(function, numbers(2), [])


def test_a_constant_that_is_returned_is_new_at_each_replay() -> None:
    recording = record(lambda x: (CONSTANT * 2, torch.zeros(2), x + 1), [torch.ones(2)], [])
    for _ in range(2):
        doubled, zeros, _ = recording.replay(torch.ones(2))
        assert (doubled.tolist(), zeros.tolist()) == ([0.0, 2.0], [0.0, 0.0])
        doubled.add_(1)
        zeros.add_(1)


def test_what_nobody_uses_is_left_out_and_what_has_effects_is_not() -> None:
    state = torch.zeros(2)

    def function(x: Tensor) -> Tensor:
        unused = x.exp()
        unused.add_(1).mul_(x)
        state.add_(x)
        result = x * 2
        (result.sum() + 1).sqrt()
        return result

    recording = agree(function, numbers(2), [state])
    assert sorted(replayed(recording, torch.ones(2)).names) == ["add_", "mul"]


def test_views_of_lasting_memory_are_taken_once_and_chains_of_others_collapse() -> None:
    state = torch.zeros(4, 3)

    def function(x: Tensor) -> Tensor:
        doubled = x * 2
        return state[:, 1].unsqueeze(0)[0, 1:] + doubled.t()[0].view(2, 2)[1].flip(0).sum()

    recording = agree(function, numbers(4, 3), [state])
    assert replayed(recording, torch.ones(4, 3)).names == ["mul", "as_strided", "flip", "sum", "add"]


def test_memory_is_freed_after_its_last_use() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(20):
            x = (x + 1)[:, :2].repeat(1, 2)
        return x

    seen = replayed(agree(function, numbers(2, 4), []), torch.ones(2, 4))
    assert len(seen.names) == 60
    assert seen.most <= 2


def test_recording_keeps_no_intermediate_alive() -> None:
    references = []

    def function(x: Tensor) -> Tensor:
        middle = x.exp()
        references.append(StorageWeakRef(middle.untyped_storage()))
        return middle.sum()

    recording = record(function, [torch.ones(3)], [])
    assert references[0].expired()
    assert recording.operations == 2


# --- training ----------------------------------------------------------------------------------------------------------------


class Cubed(torch.autograd.Function):
    """x^3 with a backward pass of its own."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return gradient * 3 * x**2


class Training:
    """A network, its optimiser, and one step of both."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))
        self.lr = torch.tensor(1e-2)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=self.lr, fused=True)
        self.step(torch.randn(16, 4), torch.randn(16, 2))

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.optimiser.zero_grad(set_to_none=True)
        loss = (Cubed.apply(self.network(x) - y) ** 2).mean()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 0.1, foreach=True)
        self.optimiser.step()
        return {"loss": loss.detach(), "norm": norm}

    @property
    def varying(self) -> list[Tensor]:
        states = [tensor for state in self.optimiser.state.values() for tensor in state.values()]
        return [*self.network.parameters(), *states, self.lr]


def test_replayed_training_is_training() -> None:
    eager, replaying = Training(), Training()
    inputs = [torch.randn(16, 4), torch.randn(16, 2)]
    recording = record(replaying.step, inputs, replaying.varying, undo=True)
    start = [tensor.clone() for tensor in eager.varying]
    for step in range(6):
        if step == 3:
            eager.lr.fill_(1e-3)
            replaying.lr.fill_(1e-3)
        inputs = [torch.randn(16, 4), torch.randn(16, 2)]
        expected, found = eager.step(*inputs), recording.replay(*inputs)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert all(map(torch.equal, eager.varying, replaying.varying))
    assert not any(map(torch.equal, start, eager.varying))


def test_a_recorded_step_counts_as_one() -> None:
    eager, recorded = Training(), Training()
    inputs = [torch.randn(16, 4), torch.randn(16, 2)]
    recording = record(recorded.step, inputs, recorded.varying)
    assert torch.equal(eager.step(*inputs)["loss"], recording.first["loss"])
    assert all(map(torch.equal, eager.varying, recorded.varying))


def test_what_was_cast_is_not_cast_again() -> None:
    weight, x = torch.randn(3, 3), torch.randn(3, 3)
    plain = record(lambda x: x @ weight, [x], [])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = record(lambda x: x @ weight, [x], [])
        assert torch.equal(plain.replay(x), plain.first)
    assert cast.first.dtype == torch.bfloat16
    assert torch.equal(cast.replay(x), cast.first)


# --- graphs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_graph_wants_a_cuda_device() -> None:
    with pytest.raises(NotRecordable, match=r"`aten\.add\.Tensor` works on what varies on the device `cpu`"):
        Graph(record(lambda x: x + 1, [torch.ones(2)], [], undo=True), [torch.ones(2)])


@gpu
@pytest.mark.gpu
def test_a_graph_trains_like_the_function() -> None:
    device = torch.device("cuda")

    def built() -> Training:
        with torch.device(device):
            return Training()

    eager, graphed = built(), built()
    inputs = [torch.randn(16, 4, device=device), torch.randn(16, 2, device=device)]
    before = [tensor.clone() for tensor in graphed.varying]
    graph = Graph(record(graphed.step, inputs, graphed.varying, undo=True), inputs)
    assert all(map(torch.equal, before, graphed.varying))
    for _ in range(4):
        inputs = [torch.randn(16, 4, device=device), torch.randn(16, 2, device=device)]
        torch.testing.assert_close(graph.replay(*inputs), eager.step(*inputs))
        torch.testing.assert_close(graphed.varying, eager.varying)


@gpu
@pytest.mark.gpu
def test_a_graph_draws_like_the_function() -> None:
    device = torch.device("cuda")

    def function(x: Tensor) -> Tensor:
        return x + torch.rand(3, device=device)

    graph = Graph(record(function, [torch.zeros(3, device=device)], [], undo=True), [torch.zeros(3, device=device)])
    torch.manual_seed(4)
    found = [graph.replay(torch.ones(3, device=device)).tolist() for _ in range(3)]
    torch.manual_seed(4)
    assert found == [function(torch.ones(3, device=device)).tolist() for _ in range(3)]


@gpu
@pytest.mark.gpu
def test_a_graph_of_work_outside_the_gpu_is_refused() -> None:
    outside, inputs = torch.ones(1), [torch.ones(1, device="cuda")]
    recording = record(lambda x: x * outside.add_(1).cuda(), inputs, [outside], undo=True)
    with pytest.raises(NotRecordable, match="on the device `cpu`"):
        Graph(recording, inputs)
