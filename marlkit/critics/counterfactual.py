"""The counterfactual critic: Q of each own action while the others' executed actions are held (COMA, Foerster et al. 2018)."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn import functional as F

from marlkit import keys
from marlkit.contract import Contract, When
from marlkit.critics._twins import twin_of
from marlkit.critics._vector import VectorCritic
from marlkit.functional.counterfactual import others_features
from marlkit.nn.actions import action_features
from marlkit.nn.networks import TeamLinear, TeamNetwork, group_of_agents
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import Activation, Hidden, Initialisation, Share, ValueNorm
from marlkit.spec import TeamSpec


class CounterfactualCritic(VectorCritic):
    """``Q_i(s, (b, a_-i))`` for every own action ``b``; its mean under ``pi_i`` is the state value, COMA's baseline.

    The first layer is split: the state's share is computed once for all agents that share a network, the others' actions' share
    per agent. The state must not contain the agent's own action of the same step, or the baseline would depend on it.

    Args:
        spec: the team.
        own_observation: whether row i also sees agent i's own observation, for states that do not hold it.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart.
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the state, the own observation and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        twins: have two networks, each regressed, and value by the smaller of theirs (Fujimoto et al. 2018).
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
    """

    contract = Contract(
        reads=(
            keys.STATE,
            When("own_observation=true", (keys.OBSERVATION,)),
            keys.JOINT_ACTION,
            keys.ACTION,
            When("discrete", (keys.LOGITS,)),
        ),
        writes=(keys.ACTION_VALUES, keys.ACTION_VALUE, keys.STATE_VALUE),
        traits=(
            "action_values",
            When("share=none", ("separate_parameters",)),
        ),
        needs={"env": ("discrete",), "actor": ("independent_agents",)},
        predicts=keys.ACTION_VALUE,
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        own_observation: bool = False,
        hidden: Hidden = [64, 64],  # noqa: B006
        share: Share = "all",
        agent_id: bool = True,
        activation: Activation = "tanh",
        layer_norm: bool = False,
        initialisation: Initialisation = "orthogonal",
        twins: bool = False,
        value_norm: ValueNorm = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layer_norm = layer_norm
        self.normaliser = ValueNormaliser(enabled=value_norm)
        groups = group_of_agents(share, spec.n_agents)
        self.single_group = max(groups) == 0
        actions, observation = spec.n_agents * spec.action_features, spec.observation if own_observation else 0
        inputs = spec.state_size + actions + observation
        self.network = TeamNetwork(
            spec.state_size,
            spec.action_features,
            hidden=hidden,
            groups=groups,
            activation=activation,
            output_gain=1.0,
            agent_id=agent_id,
            layer_norm=layer_norm,
            initialisation=initialisation,
            further_inputs=inputs - spec.state_size,
        )
        width = hidden[0] if hidden else spec.action_features
        beside = partial(TeamLinear, outputs=width, groups=groups, gain=1.0, bias=False, initialisation=initialisation)
        self.action_layer = beside(actions, further_inputs=inputs - actions)
        self.observation_layer = beside(observation, further_inputs=inputs - observation) if own_observation else None
        self.twin = twin_of(self) if twins else None

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.network.rescale(scale, shift, self.action_layer)
        if self.twin is not None:
            self.twin.rescale(scale, shift)

    def action_values(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` in normalised units, ``[K, *, N, A]``; K is 2 with twins."""
        state = batch[keys.STATE].unsqueeze(-2)
        if not self.single_group:
            state = state.expand(*state.shape[:-2], self.spec.n_agents, -1)
        joint = action_features(batch[keys.JOINT_ACTION], self.spec, state.dtype)
        entered = self.network.enter(state) + self.action_layer(others_features(joint))
        if self.observation_layer is not None:
            observation = batch[keys.OBSERVATION]
            if self.layer_norm:
                observation = F.layer_norm(observation, observation.shape[-1:])
            entered = entered + self.observation_layer(observation)
        values = self.network.leave(entered).unsqueeze(0)
        return values if self.twin is None else torch.cat([values, self.twin.action_values(batch)])
