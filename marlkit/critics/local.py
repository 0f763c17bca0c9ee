"""The local critic: each agent values its own observation (IPPO, IA2C; de Witt et al. 2020)."""

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


class LocalCritic(Critic):
    """``V_i(o_i)``.

    Args:
        spec: the team.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart.
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the input and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
    """

    contract = Contract(
        reads=(keys.OBSERVATION,),
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
        agent_id: bool = True,
        activation: Activation = "tanh",
        layer_norm: bool = False,
        initialisation: Initialisation = "orthogonal",
        value_norm: ValueNorm = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=value_norm)
        self.network = TeamNetwork(
            spec.observation,
            1,
            hidden=hidden,
            groups=group_of_agents(share, spec.n_agents),
            activation=activation,
            output_gain=1.0,
            agent_id=agent_id,
            layer_norm=layer_norm,
            initialisation=initialisation,
        )

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.network.rescale(scale, shift)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """``V_i(o_i)`` in normalised units, ``[*, N, 1]``."""
        return self.network(batch[keys.OBSERVATION])
