"""RMSProp (Hinton 2012), with momentum as PERLA uses it on MuJoCo."""

from __future__ import annotations

import torch
from torch import nn

from marlkit.component import Optimizer
from marlkit.options import NonNegativeFloat, PositiveFloat, Probability
from marlkit.spec import TeamSpec


class RmspropOptimizer(Optimizer):
    """One RMSProp with a parameter group per component; a parameter without gradient is not moved.

    Args:
        spec: the team.
        lr: learning rate; 5e-5 to 1e-3.
        critic_lr: learning rate of the critic; `null`: the same.
        lr_end: share of the learning rates left at the end of the training, reached linearly; 1 keeps them, 0 anneals to zero.
        eps: added to the denominator.
        decay: of the average of squared gradients.
        momentum: 0 for none; 0.9 in PERLA's MuJoCo runs.
    """

    def __init__(
        self,
        spec: TeamSpec,
        *,
        lr: PositiveFloat = 5e-4,
        critic_lr: PositiveFloat | None = None,
        lr_end: Probability = 1.0,
        eps: PositiveFloat = 1e-5,
        decay: Probability = 0.99,
        momentum: NonNegativeFloat = 0.0,
    ) -> None:
        self.spec = spec
        self.lr = lr
        self.critic_lr = critic_lr
        self.lr_end = lr_end
        self.eps = eps
        self.decay = decay
        self.momentum = momentum

    def build(self, parameters: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
        """Torch's RMSprop."""
        return torch.optim.RMSprop(self.groups(parameters), alpha=self.decay, eps=self.eps, momentum=self.momentum)
