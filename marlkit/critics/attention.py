"""The attention critic: Q of each own action, given what the agent attends to of the others (MAAC, Iqbal and Sha 2019)."""

from __future__ import annotations

import math
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.contract import Contract
from marlkit.critics._twins import twin_of
from marlkit.critics._vector import VectorCritic
from marlkit.errors import OptionError
from marlkit.functional.attention import attended, weights_of_others
from marlkit.nn.actions import action_features
from marlkit.nn.networks import ACTIVATIONS, GAINS, TeamLinear, TeamNetwork, group_of_agents
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import Activation, Hidden, Initialisation, Share, ValueNorm, Width
from marlkit.spec import TeamSpec


class AttentionCritic(VectorCritic):
    """``Q_i[b] = f_i(c_i, x_i)[b]`` for every own action ``b``; its mean under ``pi_i`` is the state value.

    ``c_i = f(senc_i(o_i))`` and ``e_j = f(enc_j(o_j, a_j))``, ``f`` being the activation. Each head attends to the others,
    ``x_i = concat_h sum_{j != i} w_ij f(V^h e_j)`` with ``w_ij = softmax_j(W_q^h c_i . W_k^h e_j / sqrt(d))``. The own action is
    no input, so that the mean over it is exact and needs no further pass. ``W_q``, ``W_k`` and ``V`` are common to all agents
    whatever ``share`` says. An agent that is alone has ``x_i = 0``.

    Args:
        spec: the team.
        hidden: widths of the encoders' layers; the last is the size of the embeddings and of the layer above the attention.
        heads: number of attention heads; divides the size of the embeddings.
        share: which agents use the same encoders and head: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart.
        activation: non-linearity of the hidden layers and of the values attended to.
        layer_norm: normalise the observation and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        twins: have two networks, each regressed, and value by the smaller of theirs (Fujimoto et al. 2018).
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).

    Raises:
        OptionError: ``hidden`` is empty, or its last width is no multiple of ``heads``.
    """

    contract = Contract(
        reads=(keys.OBSERVATION, keys.JOINT_ACTION, keys.ACTION, keys.LOGITS),
        writes=(keys.ACTION_VALUES, keys.ACTION_VALUE, keys.STATE_VALUE),
        traits=("action_values",),
        needs={"env": ("discrete",), "actor": ("independent_agents",)},
        predicts=keys.ACTION_VALUE,
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        hidden: Hidden = [64, 64],  # noqa: B006
        heads: Width = 4,
        share: Share = "all",
        agent_id: bool = True,
        activation: Activation = "leaky_relu",
        layer_norm: bool = False,
        initialisation: Initialisation = "orthogonal",
        twins: bool = False,
        value_norm: ValueNorm = True,
    ) -> None:
        super().__init__()
        if not hidden or hidden[-1] % heads:
            raise OptionError("hidden", f"needs a last width that the {heads} heads divide (the embeddings'), got {list(hidden)}")
        self.spec = spec
        self.heads = heads
        self.activation = ACTIVATIONS[activation]
        self.normaliser = ValueNormaliser(enabled=value_norm)
        groups, size = group_of_agents(share, spec.n_agents), hidden[-1]
        gain = GAINS.get(activation, math.sqrt(2))
        network = partial(TeamNetwork, groups=groups, activation=activation, layer_norm=layer_norm, initialisation=initialisation)
        linear = partial(TeamLinear, initialisation=initialisation)
        encoder = partial(network, spec.observation, size, hidden=hidden[:-1], output_gain=gain, agent_id=agent_id)
        self.own_encoder, self.encoder = encoder(), encoder(further_inputs=spec.action_features)
        self.action_layer = linear(spec.action_features, hidden[0], groups, gain=1.0, bias=False, further_inputs=spec.observation)
        self.query, self.key = (linear(size, size, (0,), gain=1.0, bias=False) for _ in range(2))
        self.value = linear(size, size, (0,), gain=gain)
        self.head = network(2 * size, spec.action_features, hidden=[size], output_gain=1.0, agent_id=False)
        self.twin = twin_of(self) if twins else None

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.head.rescale(scale, shift)
        if self.twin is not None:
            self.twin.rescale(scale, shift)

    def action_values(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` in normalised units, ``[K, *, N, A]``; K is 2 with twins."""
        observation = batch[keys.OBSERVATION]
        joint = action_features(batch[keys.JOINT_ACTION], self.spec, observation.dtype)
        own = self.activation(self.own_encoder(observation))
        # [*, V, N, H]: what an agent sees enters once, whatever the number of views of what it did.
        entered = self.encoder.enter(observation).unsqueeze(-3) + self.action_layer(joint)
        others = self.activation(self.encoder.leave(entered))
        query, key, value = (
            features.unflatten(-1, (self.heads, -1))
            for features in (self.query(own), self.key(others), self.activation(self.value(others)))
        )
        values = self.head(torch.cat([own, attended(weights_of_others(query, key), value)], -1)).unsqueeze(0)
        return values if self.twin is None else torch.cat([values, self.twin.action_values(batch)])
