"""The mean of the last hidden layer against a double loop over rows and samples in plain autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from marlkit import keys
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.nn.kernels.activation import IN_PLACE
from marlkit.nn.kernels.sample_mean import Sampling, boxes, mean_hidden
from marlkit.nn.networks import ACTIVATIONS
from marlkit.spec import Continuous, TeamSpec
from marlkit.testing import fake_batch

REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, x.clamp(max=0).exp() - 1),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}
ROWS, AGENTS, SAMPLES = 3, 3, 5


def leaves(groups: int, widths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """``entered``, ``W_a``, weights, biases."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(groups, ROWS, AGENTS // groups, widths[0]), (groups, widths[0], 4)]
    shapes += [(groups, after, before) for before, after in itertools.pairwise(widths)]
    shapes += [(groups, after) for after in widths[1:]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def looped(samples: Tensor, f: Callable[[Tensor], Tensor], entered: Tensor, from_sample: Tensor, *layers: Tensor) -> Tensor:
    """One row, agent and sample at a time."""
    groups, rows, together, _ = entered.shape
    weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    means = []
    for group, row, member in itertools.product(range(groups), range(rows), range(together)):
        total: Any = 0
        for sample in samples[row]:
            hidden = f(entered[group, row, member] + from_sample[group] @ sample[group * together + member])
            for weight, bias in zip(weights, biases, strict=True):
                hidden = f(weight[group] @ hidden + bias[group])
            total = total + hidden
        means.append(total / len(samples[row]))
    return torch.stack(means).view(groups, rows, together, -1)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("groups", [1, AGENTS])
@pytest.mark.parametrize("chunk", [1, 12, 35])
@pytest.mark.parametrize("widths", [(6,), (6, 4), (4, 6, 5)])
def test_values_and_gradients_equal_a_double_loop(name: str, groups: int, chunk: int, widths: tuple[int, ...]) -> None:
    samples = torch.randn(ROWS, SAMPLES, AGENTS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(lambda rows, some: samples[rows, some], SAMPLES, chunk, IN_PLACE[name])
    ours, theirs = leaves(groups, widths, torch.float64), leaves(groups, widths, torch.float64)
    split = 2 + len(widths) - 1
    mean = mean_hidden(sampling, ours[0], ours[1], ours[2:split], ours[split:])
    expected = looped(samples, REFERENCE[name], *theirs)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
    weight = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(mean, ours, weight)
    for ours_, theirs_ in zip(gradients, torch.autograd.grad(expected, theirs, weight), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", IN_PLACE)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    samples = torch.randn(ROWS, SAMPLES, AGENTS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(lambda rows, some: samples[rows, some], SAMPLES, 20, IN_PLACE[name])
    inputs = leaves(AGENTS, (3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda e, a, w, b: mean_hidden(sampling, e, a, [w], [b]), inputs)


def test_the_fast_tanh_in_single_precision_agrees_with_the_loop() -> None:
    samples = torch.randn(ROWS, SAMPLES, AGENTS, 4, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(lambda rows, some: samples[rows, some], SAMPLES, 20, IN_PLACE["tanh"])
    ours, theirs = leaves(1, (6, 4), torch.float32), leaves(1, (6, 4), torch.float32)
    mean = mean_hidden(sampling, ours[0], ours[1], [ours[2]], [ours[3]])
    expected = looped(samples, torch.tanh, *theirs)
    torch.testing.assert_close(mean, expected, rtol=0, atol=2e-6)
    for ours_, theirs_ in zip(torch.autograd.grad(mean.sum(), ours), torch.autograd.grad(expected.sum(), theirs), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=0, atol=5e-5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("chunk", [3, 6, 30])
def test_the_rows_of_a_chunk_are_shared_out_among_threads(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Chunks of an even and of an odd number of evaluations give what one thread gives."""
    parts: set[int] = set()
    product = torch.bmm

    def seen(left: Tensor, right: Tensor, **given: Any) -> Tensor:
        parts.add(len(left))
        return product(left, right, **given)

    monkeypatch.setattr(torch, "bmm", seen)
    samples = torch.randn(ROWS, SAMPLES, AGENTS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(lambda rows, some: samples[rows, some], SAMPLES, chunk, IN_PLACE["tanh"])
    inputs = leaves(1, (6, 4), torch.float64)
    mean = mean_hidden(sampling, inputs[0], inputs[1], [inputs[2]], [inputs[3]])
    expected = looped(samples, torch.tanh, *inputs)
    for ours, theirs in zip(torch.autograd.grad(mean.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (2 in parts) == (chunk != 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 12, 100])
def test_boxes_cover_every_cell_once(size: int) -> None:
    table = torch.zeros(5, 3, dtype=torch.int64)
    for rows, columns in boxes(5, 3, size):
        table[rows, columns] += 1
        assert 0 < table[rows, columns].numel() <= size
    assert (table == 1).all()


SPEC = TeamSpec(3, 4, Continuous(2), action_sizes=(2, 1, 2))


def critic_and_batch(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    options = {"current": "sampled", "hidden": [8, 6], "samples": 9, "value_norm": False, **options}
    net = MarginalisedCritic(SPEC, **options).double()
    batch = fake_batch(SPEC, [4], [keys.STATE, keys.OBSERVATION, *net.reads])
    return net, batch.apply(lambda x: x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("share", ["all", "none", [[0, 2], [1]]], ids=["all", "none", "groups"])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"hidden": [8]}, {"view": "own"}], ids=str)
def test_the_critic_has_the_same_values_and_gradients_either_way(activation: str, share: Any, options: Any) -> None:
    """A hook on a layer makes the critic evaluate layer by layer, in plain autograd."""
    results = []
    for hooked in (False, True):
        net, batch = critic_and_batch(activation=activation, share=share, chunk=13, **options)
        calls: list[int] = []
        if hooked:
            net.network.layers[1].register_forward_hook(lambda _m, _i, output, seen=calls: seen.append(output[..., 0].numel()))
        values = net.predict(batch)
        (values - 1).square().mean().backward()
        assert bool(calls) == hooked
        results.append([values.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_critic_equals_its_layers_written_out(name: str) -> None:
    net, batch = critic_and_batch(activation=name, chunk=7)
    samples = net._continuous_samples(batch, 0, 9)
    assert (samples.unflatten(-1, (3, 2))[:, :, range(3), range(3)] == 0).all()
    assert (samples.unflatten(-1, (3, 2))[..., 1, 1] == 0).all()
    f, (first, second, last) = REFERENCE[name], net.network.layers
    identity = net.network.identity
    entered = F.linear(batch[keys.STATE], first.weights[0], first.biases[0])[:, None, None] + identity
    hidden = f(entered + samples @ net.action_layer.weights[0].T)
    values = f(hidden @ second.weights[0].T + second.biases[0]) @ last.weights[0].T + last.biases[0]
    torch.testing.assert_close(net.predict(batch), values.mean(1), rtol=0, atol=1e-12)


class _Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return made


def test_memory_does_not_grow_with_samples() -> None:
    largest = []
    for samples in (40, 1600):
        net, batch = critic_and_batch(samples=samples, chunk=60, hidden=[32, 32])
        with _Largest() as seen:
            net.predict(batch).sum().backward()
        largest.append(seen.elements)
    assert largest[0] == largest[1]
