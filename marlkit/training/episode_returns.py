"""Returns of the episodes that end while training plays."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.ranks import ALONE, Ranks
from marlkit.spec import TeamSpec
from marlkit.training.returns import has_agent_returns, return_metrics


class EpisodeReturns:
    """Undiscounted returns of the episodes that ended during a rollout: the mean over the team, and each agent's.

    Args:
        spec: the team; ``None`` tells the mean over the agents alone.
    """

    def __init__(self, spec: TeamSpec | None = None) -> None:
        self.spec = spec
        self.running: Tensor | None = None
        self.steps: Tensor | None = None

    @torch.no_grad()
    def take(self, batch: TensorDictBase, ranks: Ranks = ALONE) -> dict[str, float]:
        """Add a rollout ``[B, T]``; mean return and length of the episodes that ended, on any rank (nothing if none did)."""
        reward = self._rewards(batch[keys.REWARD])
        done = batch[keys.DONE].squeeze(-1)
        running = torch.zeros_like(reward[..., 0]) if self.running is None else self.running
        steps = torch.zeros_like(running[0]) if self.steps is None else self.steps
        total = torch.zeros(len(reward), device=reward.device)
        length, count = (torch.zeros((), device=reward.device) for _ in range(2))
        some_end = done.any(0).tolist()
        for now, ended, any_ends in zip(reward.unbind(-1), done.unbind(1), some_end, strict=True):
            running, steps = running + now, steps + 1
            if not any_ends:
                continue
            total += running.masked_fill(~ended, 0).sum(-1)
            length += steps.masked_fill(~ended, 0).sum()
            count += ended.sum()
            running, steps = running.masked_fill(ended, 0), steps.masked_fill(ended, 0)
        self.running, self.steps = running, steps
        rewarded = reward[0].mean()
        ranks.mean_([total, length, count, rewarded])
        logged = {"episode/count": count.item() * ranks.size}
        if self.spec is None or not self.spec.opposing:
            logged["episode/reward"] = rewarded.item()
        if count > 0:
            logged |= self._returns(total / count) | {"episode/length": (length / count).item()}
        return logged

    def _rewards(self, reward: Tensor) -> Tensor:
        """The mean over the agents, and where they may differ each agent's: rows ``[1, B, T]`` or ``[1 + N, B, T]``."""
        mean = reward.mean(-2).squeeze(-1).unsqueeze(0)
        if self.spec is None or not has_agent_returns(self.spec):
            return mean
        return torch.cat([mean, reward.squeeze(-1).movedim(-1, 0)])

    def _returns(self, means: Tensor) -> dict[str, float]:
        if self.spec is None:
            return {"episode/return": means[0].item()}
        return return_metrics("episode", self.spec, means[0].item(), means[1:] if len(means) > 1 else None)

    def state_dict(self) -> dict[str, Tensor | None]:
        """Sums of rewards of the running episodes, the mean ``[B]`` and each agent's ``[N, B]``, and their steps ``[B]``."""
        if self.running is None:
            return {"running": None, "agents": None, "steps": None}
        return {"running": self.running[0], "agents": self.running[1:], "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Continue from :meth:`state_dict`.

        A state without ``agents`` ``[N, B]`` leaves the agents' returns out for the episodes that are running.
        """
        running, self.steps = state["running"], state["steps"]
        if running is None:
            self.running = None
            return
        agents = state.get("agents")
        if agents is None and self.spec is not None and has_agent_returns(self.spec):
            agents = running.new_full((self.spec.n_agents, *running.shape), torch.nan)
        self.running = running.unsqueeze(0) if agents is None else torch.cat([running.unsqueeze(0), agents])
