"""Opponents known exactly: during training agents exchange their current policies (PERLA, Jafferjee et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase

from marlkit import keys
from marlkit.component import Opponents
from marlkit.contract import Contract, When
from marlkit.keys import Key
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
    """

    contract = Contract(
        reads=(keys.ACTION, When("discrete", (keys.LOGITS,)), When("continuous", (keys.LOC, keys.SCALE))),
        writes=(
            keys.JOINT_ACTION,
            keys.SAMPLE_SEED,
            When("discrete", (keys.OPPONENT_LOGITS,)),
            When("continuous", (keys.OPPONENT_LOC, keys.OPPONENT_SCALE)),
        ),
        traits=("true_policies",),
    )

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, batch: TensorDictBase, played: bool = True) -> TensorDictBase:
        """On a batch ``[*]``, copy the actor's actions and parameters to the beliefs, and draw the seeds of the samples."""
        wanted = self.writes if self.wanted is None else self.wanted
        for belief in wanted:
            if belief in SOURCES:
                batch.set(belief, batch[SOURCES[belief]].detach().unsqueeze(batch.batch_dims))
        if keys.SAMPLE_SEED in wanted:
            device = batch[keys.ACTION].device
            batch.set(keys.SAMPLE_SEED, torch.randint(2**62, (*batch.batch_size, 1), device=device))
        return batch

    def reads_for(self, beliefs: Sequence[Key]) -> tuple[Key, ...]:
        """The keys that ``beliefs`` are copied from, and the action."""
        sources = [SOURCES[belief] for belief in beliefs if belief in SOURCES]
        return tuple(dict.fromkeys([keys.ACTION, *sources])) if beliefs else ()
