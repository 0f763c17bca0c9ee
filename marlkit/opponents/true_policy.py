"""Opponents known exactly: during training agents exchange their current policies (PERLA, Jafferjee et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Opponents
from marlkit.contract import Contract, When
from marlkit.keys import Key
from marlkit.nn.actions import in_own_view
from marlkit.nn.distributions import stored_distribution
from marlkit.spec import TeamSpec

SOURCES: dict[Key, Key] = {
    keys.JOINT_ACTION: keys.ACTION,
    keys.OPPONENT_LOGITS: keys.LOGITS,
    keys.OPPONENT_LOC: keys.LOC,
    keys.OPPONENT_SCALE: keys.SCALE,
}
"""The key that each belief is a copy of."""


class TruePolicyOpponents(Opponents):
    """Every agent's beliefs are the others' true policies, as the actor wrote them.

    The beliefs are common to all agents (view axis of size 1). A seed per row fixes the samples that a critic draws from them, so
    that every pass over a row within an iteration uses the same samples without storing them.

    Args:
        spec: the team.
        noise: of actions in states where none was taken: `chosen`, what the actors add to theirs there (nothing, or the targets'
            noise), so that each agent sees what the others choose; `behaviour`, drawn anew from the policies that play.
    """

    contract = Contract(
        reads=(
            keys.ACTION,
            When("discrete", (keys.LOGITS,)),
            When("continuous", (keys.LOC, keys.SCALE)),
            When("continuous & noise=behaviour", (keys.ACTION_DIMS,)),
        ),
        writes=(
            keys.JOINT_ACTION,
            keys.SAMPLE_SEED,
            When("discrete", (keys.OPPONENT_LOGITS,)),
            When("continuous", (keys.OPPONENT_LOC, keys.OPPONENT_SCALE)),
        ),
        traits=("true_policies",),
    )

    def __init__(self, spec: TeamSpec, *, noise: Literal["chosen", "behaviour"] = "chosen") -> None:
        super().__init__()
        self.spec = spec
        self.noise = noise

    def forward(self, batch: TensorDictBase, played: bool = True) -> TensorDictBase:
        """On a batch ``[*]``, copy the actor's actions and parameters to the beliefs, and draw the seeds of the samples."""
        wanted = self.writes if self.wanted is None else self.wanted
        for belief in wanted:
            if belief in SOURCES:
                batch.set(belief, batch[SOURCES[belief]].detach().unsqueeze(batch.batch_dims))
        if not played and self.noise == "behaviour" and keys.JOINT_ACTION in wanted:
            batch.set(keys.JOINT_ACTION, self._drawn(batch))
        if keys.SAMPLE_SEED in wanted:
            device = batch[keys.ACTION].device
            batch.set(keys.SAMPLE_SEED, torch.randint(2**62, (*batch.batch_size, 1), device=device))
        return batch

    @torch.no_grad()
    def _drawn(self, batch: TensorDictBase) -> Tensor:
        """Own actions as chosen, the others' drawn from their policies, ``[*, N, N]`` or ``[*, N, N, D]``."""
        own, drawn = batch[keys.ACTION], stored_distribution(batch, discrete=self.spec.discrete).sample()
        if self.spec.discrete:
            return in_own_view(drawn.unsqueeze(-1).unsqueeze(-3), own.unsqueeze(-1)).squeeze(-1)
        return in_own_view(torch.where(batch[keys.ACTION_DIMS], drawn, own).unsqueeze(-3), own)

    def reads_for(self, beliefs: Sequence[Key]) -> tuple[Key, ...]:
        """The keys that ``beliefs`` are copied from, and the action; all where joint actions are drawn from the policies."""
        if keys.JOINT_ACTION in beliefs and self.noise == "behaviour":
            return tuple(self.reads)
        sources = [SOURCES[belief] for belief in beliefs if belief in SOURCES]
        return tuple(dict.fromkeys([keys.ACTION, *sources])) if beliefs else ()
