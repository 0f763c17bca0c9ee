"""Conjugate gradients, products with a Hessian and the search back, against dense algebra and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marlkit.functional.trust_region import (
    Found,
    conjugate_gradient,
    flatten,
    hessian_product,
    search_back,
    step_to_edge,
    unflatten,
)


def random_matrix(size: int, seed: int) -> Tensor:
    """Symmetric, positive definite, condition below a hundred."""
    draw = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw))
    return basis @ torch.diag(0.1 + 5 * torch.rand(size, dtype=torch.float64, generator=draw)) @ basis.T


class Counted:
    """A matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.count = 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.count += 1
        return self.matrix @ vector


def test_flat_and_back() -> None:
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(5.0), torch.tensor([6.0])]
    flat = flatten(tensors)
    assert flat.tolist() == [1, 2, 3, 4, 5, 6]
    for one, other in zip(unflatten(flat * 2, tensors), tensors, strict=True):
        assert torch.equal(one, 2 * other)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(RuntimeError):
        unflatten(torch.zeros(4), [torch.zeros(3)])


@pytest.mark.parametrize("size", range(1, 11))
def test_ten_iterations_solve_ten_equations(size: int) -> None:
    """TR-2."""
    matrix = random_matrix(size, seed=size)
    right = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + size))
    x = conjugate_gradient(lambda v: matrix @ v, right, iterations=10, tolerance=1e-28)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, right), rtol=1e-9, atol=1e-10)


def test_one_iteration_for_each_eigenvalue() -> None:
    basis, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    matrix = Counted(basis @ torch.diag(torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64).repeat(17)[:50]) @ basis.T)
    right = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = conjugate_gradient(matrix, right, iterations=10)
    assert matrix.count == 3
    torch.testing.assert_close(x, torch.linalg.solve(matrix.matrix, right), rtol=0, atol=1e-10)


def test_no_more_products_than_allowed_and_better_with_each() -> None:
    matrix = random_matrix(30, seed=3)
    right = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    exact = torch.linalg.solve(matrix, right)
    errors = []
    for iterations in range(1, 6):
        counted = Counted(matrix)
        difference = conjugate_gradient(counted, right, iterations=iterations) - exact
        assert counted.count == iterations
        errors.append((difference @ matrix @ difference).item())
    assert errors == sorted(errors, reverse=True)


def test_solution_scales_with_the_right_hand_side() -> None:
    matrix = random_matrix(20, seed=5)
    right = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    x, small = (conjugate_gradient(lambda v: matrix @ v, scale * right, iterations=10) for scale in (1.0, 1e-9))
    torch.testing.assert_close(small * 1e9, x, rtol=1e-12, atol=0)


def test_nothing_to_solve_gives_zero() -> None:
    counted = Counted(random_matrix(4, seed=7))
    assert torch.equal(conjugate_gradient(counted, torch.zeros(4, dtype=torch.float64), iterations=10), torch.zeros(4).double())
    assert counted.count == 0


def test_a_direction_without_positive_curvature_ends_the_iteration() -> None:
    right = torch.ones(3, dtype=torch.float64)
    assert torch.equal(conjugate_gradient(lambda v: -v, right, iterations=10), torch.zeros(3).double())
    assert torch.equal(conjugate_gradient(lambda v: v * math.nan, right, iterations=10), torch.zeros(3).double())
    flat = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    assert torch.isfinite(conjugate_gradient(lambda v: flat @ v, right, iterations=10)).all()


def test_product_with_the_hessian_of_a_polynomial() -> None:
    """``f(x, y, z, u) = x^2 y + 3 x y + 5 z``: its Hessian written out, and the damping, for parameters of any shape."""
    x, y, z, unused = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([2.0], [[3.0]], 7.0, [1.0, 1.0]))
    scalar = (x * x * y + 3 * x * y).sum() + 5 * z
    product = hessian_product(scalar, [x, y, z, unused], damping=0.5)
    dense = torch.tensor([[2 * 3.0, 2 * 2.0 + 3.0], [2 * 2.0 + 3.0, 0.0]], dtype=torch.float64)
    hessian = torch.zeros(5, 5, dtype=torch.float64)
    hessian[:2, :2] = dense
    hessian += 0.5 * torch.eye(5, dtype=torch.float64)
    columns = torch.stack([product(unit) for unit in torch.eye(5, dtype=torch.float64)], -1)
    torch.testing.assert_close(columns, hessian, rtol=0, atol=1e-12)


def test_step_ends_at_the_edge_of_the_quadratic_model() -> None:
    matrix = random_matrix(6, seed=8)
    direction = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    step = step_to_edge(direction, lambda v: matrix @ v, limit=0.03)
    assert (0.5 * step @ matrix @ step).item() == pytest.approx(0.03, rel=1e-12)
    assert (step / direction).std().item() == pytest.approx(0, abs=1e-12)
    assert (step / direction)[0] > 0


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_no_step_without_a_positive_curvature(factor: float) -> None:
    assert torch.equal(step_to_edge(torch.ones(3), lambda v: factor * v, limit=0.01), torch.zeros(3))


@pytest.mark.parametrize(
    ("trials", "expected", "found"),
    [
        ([(0.01, 1.0)], 1.0, Found(1.0, 0.01, 1.0)),
        ([(0.011, 1.0), (0.009, 0.9)], 1.0, Found(0.5, 0.009, 0.9)),  # too far, then near enough
        ([(0.01, 0.49), (0.005, 0.24), (0.001, 0.126)], 1.0, Found(0.25, 0.001, 0.126)),  # half of what was promised there
        ([(0.01, 0.5)], 1.0, Found(1.0, 0.01, 0.5)),
        ([(0.001, -0.1)] * 3, 1.0, Found(0.0, 0.0, 0.0)),
        ([(0.001, 0.0)] * 3, 1e-300, Found(0.0, 0.0, 0.0)),  # no gain
        ([(math.nan, 1.0), (0.001, math.nan), (0.002, 0.2)], 1.0, Found(0.25, 0.002, 0.2)),
        ([], 0.0, Found(0.0, 0.0, 0.0)),
        ([], -1.0, Found(0.0, 0.0, 0.0)),
        ([], math.nan, Found(0.0, 0.0, 0.0)),
    ],
)
def test_search_back_by_hand(trials: list[tuple[float, float]], expected: float, found: Found) -> None:
    tried: list[float] = []

    def trial(fraction: float) -> tuple[float, float]:
        tried.append(fraction)
        return trials[len(tried) - 1]

    assert search_back(trial, expected, limit=0.01, accept_ratio=0.5, trials=3, factor=0.5) == found
    assert tried == [0.5**j for j in range(len(trials))]


@pytest.mark.parametrize("gain", [0.0, -1e-9])
def test_a_step_without_gain_is_never_accepted(gain: float) -> None:
    found = search_back(lambda fraction: (0.0, gain), 1.0, limit=0.01, accept_ratio=0.0, trials=3, factor=0.5)
    assert found.fraction == 0
