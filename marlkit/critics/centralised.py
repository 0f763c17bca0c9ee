"""The centralised critic: the state is valued (MAPPO, Yu et al. 2022; HAPPO, Kuba et al. 2022)."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract, When
from marlkit.nn.networks import TeamNetwork, group_of_agents
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import Activation, Hidden, Initialisation, Share, ValueNorm
from marlkit.spec import TeamSpec


class CentralisedCritic(Critic):
    """``V(s)`` for the team, or ``V_i(s)`` where agents are rewarded individually.

    A shared critic evaluates the state once for all agents: one output under a team reward, one output per agent otherwise
    (which tells the agents apart without N copies of the state). Unshared critics have a network per agent or group.

    Args:
        spec: the team.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the input and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
    """

    contract = Contract(
        reads=(keys.STATE,),
        writes=(keys.STATE_VALUE,),
        traits=(When("share=none", ("separate_parameters",)),),
        predicts=keys.STATE_VALUE,
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        hidden: Hidden = [64, 64],  # noqa: B006
        share: Share = "all",
        activation: Activation = "tanh",
        layer_norm: bool = False,
        initialisation: Initialisation = "orthogonal",
        value_norm: ValueNorm = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=value_norm)
        self.shared = share == "all"
        groups = group_of_agents(share, spec.n_agents)
        self.network = TeamNetwork(
            spec.state_size,
            spec.n_agents if self.shared and not spec.team_reward else 1,
            hidden=hidden,
            groups=(0,) if self.shared else groups,
            activation=activation,
            output_gain=1.0,
            agent_id=True,
            layer_norm=layer_norm,
            initialisation=initialisation,
        )

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.network.rescale(scale, shift)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """``V_i(s)`` in normalised units, ``[*, N, 1]``."""
        state = batch[keys.STATE].unsqueeze(-2)
        if self.shared:
            values = self.network(state).transpose(-1, -2)
        else:
            values = self.network(state.expand(*state.shape[:-2], self.spec.n_agents, -1))
        return values.expand(*values.shape[:-2], self.spec.n_agents, 1)
