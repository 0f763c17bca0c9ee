"""Returns of the episodes that end while training plays."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.ranks import ALONE, Ranks


class EpisodeReturns:
    """Undiscounted returns of the episodes that ended during a rollout, averaged over the team's agents."""

    def __init__(self) -> None:
        self.running: Tensor | None = None
        self.steps: Tensor | None = None

    @torch.no_grad()
    def take(self, batch: TensorDictBase, ranks: Ranks = ALONE) -> dict[str, float]:
        """Add a rollout ``[B, T]``; mean return and length of the episodes that ended, on any rank (nothing if none did)."""
        reward = batch[keys.REWARD].mean(-2).squeeze(-1)
        done = batch[keys.DONE].squeeze(-1)
        running = torch.zeros_like(reward[:, 0]) if self.running is None else self.running
        steps = torch.zeros_like(running) if self.steps is None else self.steps
        total, length, count = (torch.zeros((), device=reward.device) for _ in range(3))
        some_end = done.any(0).tolist()
        for now, ended, any_ends in zip(reward.unbind(1), done.unbind(1), some_end, strict=True):
            running, steps = running + now, steps + 1
            if not any_ends:
                continue
            total += running.masked_fill(~ended, 0).sum()
            length += steps.masked_fill(~ended, 0).sum()
            count += ended.sum()
            running, steps = running.masked_fill(ended, 0), steps.masked_fill(ended, 0)
        self.running, self.steps = running, steps
        rewarded = reward.mean()
        ranks.mean_([total, length, count, rewarded])
        logged = {"episode/count": count.item() * ranks.size, "episode/reward": rewarded.item()}
        if count > 0:
            logged |= {"episode/return": (total / count).item(), "episode/length": (length / count).item()}
        return logged

    def state_dict(self) -> dict[str, Tensor | None]:
        """Sums of rewards and numbers of steps of the running episodes, ``[B]``."""
        return {"running": self.running, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Continue from :meth:`state_dict`, ``[B]``."""
        self.running, self.steps = state["running"], state["steps"]
