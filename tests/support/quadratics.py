"""Convex costs ``f_i(w) = (w - t_i)' A_i (w - t_i) / 2`` of some agents, whose optima NumPy computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZE = 4
"""Number of parameters."""


@dataclass(frozen=True)
class Quadratics:
    """``curvature`` is ``[N, P, P]``, ``target`` ``[N, P]``."""

    curvature: np.ndarray[Any, Any]
    target: np.ndarray[Any, Any]

    def costs(self, copies: Tensor) -> Tensor:
        """``f_i(w_i)``, ``[N]``."""
        away = copies - torch.from_numpy(self.target)
        return 0.5 * torch.einsum("np,npq,nq->n", away, torch.from_numpy(self.curvature), away)

    def gradients(self, copies: Tensor) -> Tensor:
        """``grad f_i(w_i)``, ``[N, P]``."""
        return torch.einsum("npq,nq->np", torch.from_numpy(self.curvature), copies - torch.from_numpy(self.target))

    def optimum(self, weights: Any) -> np.ndarray[Any, Any]:
        """The minimiser ``[P]`` of ``sum_i weights_i f_i``."""
        weighted = self.curvature * np.asarray(weights, dtype=float)[:, None, None]
        return np.linalg.solve(weighted.sum(0), sum(a @ t for a, t in zip(weighted, self.target, strict=True)))


def quadratics(n_agents: int = 8, seed: int = 0) -> Quadratics:
    """Random ones, eigenvalues of at least 0.5."""
    draw = np.random.default_rng(seed)
    roots = draw.normal(size=(n_agents, SIZE, SIZE))
    curvature = np.stack([root @ root.T / SIZE + 0.5 * np.eye(SIZE) for root in roots])
    return Quadratics(curvature, draw.normal(size=(n_agents, SIZE)))
