"""The fast tanh against torch's in float64."""

from __future__ import annotations

import torch

from marlkit.nn.kernels.activation import tanh_

X = torch.cat([torch.linspace(-20, 20, 20001), torch.tensor([0.0, 1e-30, -1e-8, 1e30, -1e30, float("inf"), -float("inf")])])


def test_values_and_gradients_agree_with_torchs_in_double_precision() -> None:
    x, reference = X.clone().requires_grad_(), X.double().requires_grad_()
    ours, exact = tanh_(1 * x), torch.tanh(reference)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-7)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    (expected,) = torch.autograd.grad(exact.sum(), reference)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6)


def test_second_derivatives_agree() -> None:
    x, reference = X[:20001].clone().requires_grad_(), X[:20001].double().requires_grad_()
    (first,) = torch.autograd.grad(tanh_(1 * x).sum(), x, create_graph=True)
    (exact,) = torch.autograd.grad(torch.tanh(reference).sum(), reference, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected,) = torch.autograd.grad(exact.sum(), reference)
    torch.testing.assert_close(second.double(), expected, rtol=0, atol=2e-6)


def test_not_a_number_stays_one() -> None:
    assert tanh_(torch.tensor([float("nan")])).isnan().all()


def test_other_precisions_are_torchs_own() -> None:
    x = X.double()
    assert torch.equal(tanh_(x.clone()), torch.tanh(x))
