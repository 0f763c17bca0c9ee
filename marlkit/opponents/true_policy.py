"""Opponents known exactly: during training agents exchange their current policies (PERLA, Mguni et al.)."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from marlkit import keys
from marlkit.component import Opponents
from marlkit.contract import Contract, When
from marlkit.keys import Key
from marlkit.spec import TeamSpec


class TruePolicyOpponents(Opponents):
    """Every agent believes what is true: the others' policies as the actor just wrote them.

    The beliefs are common to all agents (view axis of size 1). A seed per row fixes the samples that a critic draws from them, so
    that every pass over a row within an iteration sees the same samples without anybody storing them.

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
        """Copy the actor's choices and parameters to the beliefs, and draw the seeds of the samples."""
        pairs: dict[Key, Key] = {keys.LOGITS: keys.OPPONENT_LOGITS, keys.LOC: keys.OPPONENT_LOC, keys.SCALE: keys.OPPONENT_SCALE}
        action = batch[keys.ACTION].detach()
        batch.set(keys.JOINT_ACTION, action.unsqueeze(batch.batch_dims))
        for key in self.reads:
            if key in pairs:
                batch.set(pairs[key], batch[key].detach().unsqueeze(-3))
        return batch.set(keys.SAMPLE_SEED, torch.randint(2**62, (*batch.batch_size, 1), device=action.device))
