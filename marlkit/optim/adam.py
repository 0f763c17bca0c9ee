"""Adam (Kingma and Ba 2015)."""

from __future__ import annotations

import torch
from torch import nn

from marlkit.component import Optimizer
from marlkit.options import NonNegativeFloat, PositiveFloat, Probability
from marlkit.spec import TeamSpec


class AdamOptimizer(Optimizer):
    """One Adam with a parameter group per component; a parameter without gradient is not moved.

    Args:
        spec: the team.
        lr: learning rate; 5e-5 to 1e-3.
        critic_lr: learning rate of the critic; `null`: the same.
        lr_end: share of the learning rates left at the end of the training, reached linearly; 1 keeps them, 0 anneals to zero.
        eps: added to the denominator; 1e-5 in the PPO reference implementations.
        weight_decay: L2 penalty.
    """

    def __init__(
        self,
        spec: TeamSpec,
        *,
        lr: PositiveFloat = 5e-4,
        critic_lr: PositiveFloat | None = None,
        lr_end: Probability = 1.0,
        eps: PositiveFloat = 1e-5,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        self.spec = spec
        self.lr = lr
        self.critic_lr = critic_lr
        self.lr_end = lr_end
        self.eps = eps
        self.weight_decay = weight_decay

    def build(self, parameters: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
        """A fused Adam: one kernel for all parameters of a group."""
        groups = self.groups(parameters)
        if self.lr_end != 1:
            # What changes stands in a tensor, so that a recorded step takes it in. A GPU's kernel reads single precision.
            for group in groups:
                device = group["params"][0].device
                precision = torch.float64 if device.type == "cpu" else torch.float32
                group["lr"] = torch.tensor(group["lr"], dtype=precision, device=device)
        return torch.optim.Adam(groups, eps=self.eps, weight_decay=self.weight_decay, fused=True)
