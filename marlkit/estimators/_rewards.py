"""The common part of estimators of rewards: rewards in units of their running deviation."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Estimator
from marlkit.ranks import ALONE, Ranks
from marlkit.spec import TeamSpec

StandardisedReward = Literal["none", "scale", "shift"]


class RewardEstimator(Estimator):
    """Base of estimators that sum up rewards ``r``, ``r / sigma_i``, or ``(r - mu_i) / sigma_i`` (EPyMARL).

    ``mu_i`` and ``sigma_i`` are mean and deviation of agent i's rewards over all steps that were ever played, on all ranks
    (Papoudakis et al. 2021), merged as sums of squared deviations (Chan, Golub and LeVeque 1983). A reward that has never varied
    has the deviation 1. A shift pays for the length of an episode, or charges for it, and may so change which policy is the best;
    a scale does not, where agents share one reward. What is logged are the environment's own rewards.

    Args:
        spec: the team.
        standardise_reward: `scale` divides rewards by their running deviation; `shift` subtracts their running mean first, as
            EPyMARL does.
    """

    reward_mean: Tensor | None
    reward_variance: Tensor | None
    rewards_seen: Tensor | None

    def __init__(self, spec: TeamSpec, *, standardise_reward: StandardisedReward = "none") -> None:
        super().__init__()
        self.spec = spec
        self.shifts_reward = standardise_reward == "shift"
        kept = standardise_reward != "none"
        # Absent where nothing is kept, so that checkpoints hold what is used.
        self.register_buffer("reward_mean", torch.zeros(spec.n_agents, 1) if kept else None)
        self.register_buffer("reward_variance", torch.zeros(spec.n_agents, 1) if kept else None)
        self.register_buffer("rewards_seen", torch.zeros(()) if kept else None)

    @torch.no_grad()
    def observe(self, played: TensorDictBase, ranks: Ranks = ALONE) -> None:
        """Count the rewards of steps ``[B, T]`` that were just played."""
        if self.reward_mean is None:
            return
        assert self.reward_variance is not None
        assert self.rewards_seen is not None
        reward = played[keys.REWARD].flatten(0, 1)
        mean = reward.mean(0)
        ranks.mean_([mean])
        variance = (reward - mean).square().mean(0)
        ranks.mean_([variance])
        self.rewards_seen.add_(len(reward) * ranks.size)
        share = len(reward) * ranks.size / self.rewards_seen
        step = mean - self.reward_mean
        self.reward_variance.lerp_(variance, share).add_(share * (1 - share) * step.square())
        self.reward_mean.add_(share * step)

    def rewards(self, batch: TensorDictBase) -> Tensor:
        """The rewards of a batch ``[B, T]`` that returns are made of, ``[B, T, N, 1]``."""
        reward = batch[keys.REWARD]
        if self.reward_mean is None:
            return reward
        assert self.reward_variance is not None
        deviation = self.reward_variance.sqrt()
        # Rounding of the mean is no deviation.
        varies = deviation > 1e-6 * self.reward_mean.abs().clamp(min=1e-6)
        shifted = reward - self.reward_mean if self.shifts_reward else reward
        return shifted / torch.where(varies, deviation, torch.ones_like(deviation))
