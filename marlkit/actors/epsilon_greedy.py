"""The epsilon-greedy actor: agents act by action values of their own (Watkins 1989; Mnih et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors._independent import ObservingActor
from marlkit.contract import Contract, When
from marlkit.functional.schedule import linear
from marlkit.nn.distributions import EpsilonGreedyTeam, TeamDistribution
from marlkit.nn.networks import group_of_agents
from marlkit.options import Activation, Hidden, Initialisation, Part, PositiveFloat, PositiveInt, Probability, Share
from marlkit.spec import TeamSpec


class EpsilonGreedyActor(ObservingActor):
    """``Q_i(o_i)[b]`` of every own action ``b``: the available one of the highest value, or at times any (discrete actions).

    The actor owns the values. :meth:`distribution` writes them as ``ACTION_VALUES`` with their gradient, and the loss of a critic
    that reads them, such as `factorised`, trains the actor; it has no loss of its own. The distribution is that of the behaviour,
    ``(1 - e) [b = argmax Q_i] + e / n`` over the ``n`` available actions, so that stored log-probabilities are defined; it has no
    gradient. Of equal values the first is taken. Values are bootstrapped with the greedy action.

    Args:
        spec: the team.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart (without it they act alike on equal observations).
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the observation and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        body: `mlp`, or `gru` for values of the whole episode so far (Hausknecht and Stone 2015).
        sequence_length: steps over which a `gru` is trained; replay draws sequences of so many steps.
        output_gain: gain of the last layer's initialisation, unless it is `uniform`; 0.01 starts with values near zero.
        uniform_share: ``e``, share of actions that are chosen uniformly among the available ones.
        uniform_share_end: its value in the end, reached linearly; `null`: unchanged. 0.05 in QMIX.
        uniform_share_until: part of the training after which it has reached that value.
    """

    contract = Contract(
        reads=(keys.OBSERVATION, keys.ACTION_MASK, When("body=gru", (keys.IS_FIRST, keys.HIDDEN))),
        writes=(
            *(keys.ACTION, keys.LOG_PROB, keys.LOGITS, keys.ACTION_VALUES),
            When("body=gru", (keys.following(keys.HIDDEN),)),
        ),
        traits=("greedy", "independent_agents", When("share=none", ("separate_parameters",))),
        needs={"env": ("discrete",)},
    )

    uniform_share: Tensor

    def __init__(
        self,
        spec: TeamSpec,
        *,
        hidden: Hidden = [64, 64],  # noqa: B006
        share: Share = "all",
        agent_id: bool = True,
        activation: Activation = "tanh",
        layer_norm: bool = False,
        initialisation: Initialisation = "orthogonal",
        body: Literal["mlp", "gru"] = "mlp",
        sequence_length: PositiveInt = 10,
        output_gain: PositiveFloat = 0.01,
        uniform_share: Probability = 1.0,
        uniform_share_end: Probability | None = 0.05,
        uniform_share_until: Part = 0.5,
    ) -> None:
        super().__init__()
        self.spec = spec
        groups = group_of_agents(share, spec.n_agents)
        self.prepare_network(
            self.count_outputs("parameter"),
            groups,
            hidden=hidden,
            agent_id=agent_id,
            activation=activation,
            layer_norm=layer_norm,
            initialisation=initialisation,
            body=body,
            sequence_length=sequence_length,
            output_gain=output_gain,
        )
        self.prepare_policy(groups, initial_std=1.0, uniform_share=0.0, uniform_share_end=None)
        self.uniform_shares = (uniform_share, uniform_share_end)
        self.uniform_share_until = uniform_share_until
        # A buffer, so that a copy of the policy and a checkpoint explore as the policy did; also where it is zero.
        self.register_buffer("uniform_share", torch.tensor(float(uniform_share)))

    def policy(self, outputs: Tensor, batch: TensorDictBase, agents: Sequence[int] | None) -> TeamDistribution:
        """The behaviour with these action values ``[*, n, A]`` of all agents, which are written, or of ``agents``."""
        if agents is None:
            batch.set(keys.ACTION_VALUES, outputs)
        return EpsilonGreedyTeam(outputs, self.available(batch, agents), self.uniform_share)

    def bootstrap(self, batch: TensorDictBase) -> TensorDictBase:
        """Choose the greedy actions, batch ``[*]``."""
        return self(batch, deterministic=True)

    def schedule(self, progress: float) -> None:
        """Let the share of uniformly chosen actions go linearly from its start to its end."""
        self.uniform_share.fill_(linear(*self.uniform_shares, min(1.0, progress / self.uniform_share_until)))
