"""The joint critic: Q of the actions of all agents, a differentiable function of them (MADDPG, Lowe et al. 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.nn import functional as F

from marlkit import keys
from marlkit.component import Critic, least
from marlkit.contract import Contract, When
from marlkit.critics._twins import twin_of
from marlkit.nn.actions import ActionBounds, action_features
from marlkit.nn.networks import TeamLinear, TeamNetwork, group_of_agents
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import Activation, Hidden, Initialisation, Share, ValueNorm
from marlkit.spec import TeamSpec


class JointCritic(Critic):
    """``Q_i(x_i, a_1, …, a_N)``, with the joint action as agent i views it and its own action in its own entry.

    The first layer is split. The products of the weights with ``x`` and with the joint action are taken once for all agents that
    view the same; agent i's own entry enters as a change, ``W_i (own_i - joint_ii)``. Continuous actions enter within the bounds
    of the environment, as it executes them, and what an agent's actions are padded with never enters.

    Args:
        spec: the team.
        view: `state`, or `own` for the agent's own observation: what the value depends on besides the actions.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none` as in MADDPG, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart.
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the view and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        twins: have two networks, each regressed, and value by the smaller of theirs (Fujimoto et al. 2018).
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
    """

    contract = Contract(
        reads=(
            When("view=state", (keys.STATE,)),
            When("view=own", (keys.OBSERVATION,)),
            keys.ACTION,
            keys.JOINT_ACTION,
        ),
        writes=(keys.ACTION_VALUE,),
        traits=("differentiable_in_action", When("share=none", ("separate_parameters",))),
        predicts=keys.ACTION_VALUE,
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        view: Literal["state", "own"] = "state",
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
        self.view = view
        self.normaliser = ValueNormaliser(enabled=value_norm)
        groups = group_of_agents(share, spec.n_agents)
        self.single_group = max(groups) == 0
        viewed, actions = spec.state_size if view == "state" else spec.observation, spec.n_agents * spec.action_features
        self.network = TeamNetwork(
            viewed,
            1,
            hidden=hidden,
            groups=groups,
            activation=activation,
            # An actor that climbs saturates on the slope of a critic that has learnt nothing, unless there is hardly any.
            output_gain=0.01,
            agent_id=agent_id,
            layer_norm=layer_norm,
            initialisation=initialisation,
            further_inputs=actions,
        )
        width = hidden[0] if hidden else 1
        self.action_layer = TeamLinear(
            actions, width, groups, gain=1.0, bias=False, initialisation=initialisation, further_inputs=viewed
        )
        self.bounds = ActionBounds(spec)
        self.twin = twin_of(self) if twins else None

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.network.rescale(scale, shift, self.action_layer)
        if self.twin is not None:
            self.twin.rescale(scale, shift)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` of the actions taken in normalised units, ``[*, N, 1]``."""
        return least(self.predictions(batch))

    def predictions(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` of the actions taken in normalised units, ``[K, *, N, 1]``; K is 2 with twins."""
        dtype = self.action_layer.weights[0].dtype
        own, joint = (action_features(batch[key], self.spec, dtype) for key in (keys.ACTION, keys.JOINT_ACTION))
        return self.action_value(batch, own, joint)

    def action_value(self, batch: TensorDictBase, own: Tensor, joint: Tensor) -> Tensor:
        """``Q_i`` ``[K, *, N, 1]`` with ``own`` ``[*, N, F]`` for agent i's entry in its view of ``joint`` ``[*, V, N, F]``."""
        joint, own = self.bounds.without_padding(joint), self.bounds.without_padding(own)
        one_view = joint.shape[-3] == 1
        before = joint.squeeze(-3) if one_view else joint.diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
        change = torch.einsum("...nf,hnf->...nh", own - before, self._own_weight())
        values = self.network.leave(self._entered(batch) + self._from_joint(joint.flatten(-2)) + change).unsqueeze(0)
        return values if self.twin is None else torch.cat([values, self.twin.action_value(batch, own, joint)])

    def _entered(self, batch: TensorDictBase) -> Tensor:
        """What the view adds to the first layer: ``[*, N, H]``, or ``[*, 1, H]`` where it is the same for all."""
        view = batch[keys.OBSERVATION] if self.view == "own" else batch[keys.STATE].unsqueeze(-2)
        if not self.single_group:
            view = view.expand(*view.shape[:-2], self.spec.n_agents, -1)
        return self.network.enter(view)

    def _from_joint(self, joint: Tensor) -> Tensor:
        """What the joint actions ``[*, V, N F]`` add to the first layer: ``[*, N, H]``, or ``[*, 1, H]`` likewise."""
        if joint.shape[-2] == self.spec.n_agents:
            return self.action_layer(joint)
        weight = self.action_layer.stacked(self.action_layer.weights)
        return F.linear(joint, weight.flatten(0, 1)).unflatten(-1, (len(weight), -1)).squeeze(-3)

    def _own_weight(self) -> Tensor:
        """Of agent i's weights those of agent i's own action, ``[H, N, F]``."""
        weight = self.action_layer.stacked(self.action_layer.weights).unflatten(-1, (self.spec.n_agents, -1))
        return weight[0] if len(weight) == 1 else weight.diagonal(dim1=0, dim2=2).movedim(-1, 1)
