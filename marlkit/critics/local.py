"""The local critic: each agent values its own observation (IPPO, IA2C; de Witt et al. 2020), or each of its own actions there."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Critic, least
from marlkit.contract import Contract, When
from marlkit.critics._twins import twin_of
from marlkit.critics._vector import write_action_values
from marlkit.functional.counterfactual import executed_value
from marlkit.nn.networks import TeamNetwork, group_of_agents
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import Activation, Hidden, Initialisation, Share, ValueNorm
from marlkit.spec import TeamSpec


class LocalCritic(Critic):
    """``V_i(o_i)``; with `style: q`, ``Q_i(o_i)[b]`` of every own action ``b``, whose mean under ``pi_i`` is the state value.

    Args:
        spec: the team.
        style: `v`, a state value, or `q`, values of every own discrete action (F2A2-ISAC, Li et al. 2023).
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart.
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the input and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        twins: have two networks, each regressed, and value by the smaller of theirs (Fujimoto et al. 2018).
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
    """

    contract = Contract(
        reads=(keys.OBSERVATION, When("style=q", (keys.ACTION,)), When("style=q & discrete", (keys.LOGITS,))),
        writes=(keys.STATE_VALUE, When("style=q", (keys.ACTION_VALUES, keys.ACTION_VALUE))),
        traits=(When("style=q", ("action_values",)), When("share=none", ("separate_parameters",))),
        needs={"env": (When("style=q", ("discrete",)),)},
        predicts=(When("style=v", (keys.STATE_VALUE,)), When("style=q", (keys.ACTION_VALUE,))),
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        style: Literal["v", "q"] = "v",
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
        self.style = style
        self.normaliser = ValueNormaliser(enabled=value_norm)
        self.network = TeamNetwork(
            spec.observation,
            spec.action_features if style == "q" else 1,
            hidden=hidden,
            groups=group_of_agents(share, spec.n_agents),
            activation=activation,
            output_gain=1.0,
            agent_id=agent_id,
            layer_norm=layer_norm,
            initialisation=initialisation,
        )
        self.twin = twin_of(self) if twins else None

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.network.rescale(scale, shift)
        if self.twin is not None:
            self.twin.rescale(scale, shift)

    def outputs(self, batch: TensorDictBase) -> Tensor:
        """What each network says, in normalised units: ``[K, *, N, 1]``, or ``[K, *, N, A]`` with `style: q`."""
        own = self.network(batch[keys.OBSERVATION]).unsqueeze(0)
        return own if self.twin is None else torch.cat([own, self.twin.outputs(batch)])

    def predictions(self, batch: TensorDictBase) -> Tensor:
        """``V_i(o_i)``, or ``Q_i`` of the action taken, by each network in normalised units: ``[K, *, N, 1]``."""
        values = self.outputs(batch)
        return executed_value(values, batch[keys.ACTION]) if self.style == "q" else values

    def predict(self, batch: TensorDictBase) -> Tensor:
        """The least of :meth:`predictions`, ``[*, N, 1]``."""
        return least(self.predictions(batch))

    def action_values(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` of every own action, by each network, in normalised units: ``[K, *, N, A]`` (`style: q`)."""
        return self.outputs(batch) if self.style == "q" else super().action_values(batch)

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write the least of the values in real units; with `style: q` those of actions and their mean under the policy."""
        values = self.normaliser.denormalise(least(self.outputs(batch)))
        return write_action_values(batch, values) if self.style == "q" else batch.set(keys.STATE_VALUE, values)
