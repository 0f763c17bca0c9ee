"""A critic whose network is any module of torch, tensordict or TorchRL, named by its dotted path."""

from __future__ import annotations

from typing import Any, Literal

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract, When
from marlkit.nn.named_network import NamedNetwork
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import DottedPath
from marlkit.spec import TeamSpec


class ModuleCritic(Critic):
    """``V_i(o)`` or ``V_i(s)`` by a module that is given ``[*, N, O]`` or ``[*, N, S]`` and gives ``[*, N, 1]``.

    A recipe that fits every environment names sizes instead of numbers: `N` agents, `O` observation features, `S` state features,
    `A` actions or `D` action dimensions, and `F` outputs per agent, here 1; and `{path: torch.nn.Tanh}` is that class::

        critic:
          type: module
          network: torchrl.modules.MultiAgentMLP
          network_options:
            {n_agent_inputs: O, n_agent_outputs: F, n_agents: N, centralized: true, share_params: true, depth: 2, num_cells: 64,
             activation_class: {path: torch.nn.Tanh}}

    A module of tensordict reads the observation or the state under its own ``in_keys`` instead, and writes one key of any name.

    Args:
        spec: the team.
        network: dotted path of a class that extends `torch.nn.Module`; imported when training starts, not by `marlkit check`.
        network_options: its arguments.
        view: what the module sees: `own`, what the agents observe; `state`, the state, the same for each agent.
        value_norm: regress on running-normalised targets (Yu et al. 2022).

    Raises:
        OptionError: there is no such class, it cannot be built with these options, or what it gives is of another shape.
    """

    contract = Contract(
        reads=(When("view=own", (keys.OBSERVATION,)), When("view=state", (keys.STATE,))),
        writes=(keys.STATE_VALUE,),
        predicts=keys.STATE_VALUE,
        code="marlkit.nn.named_code:code",
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        network: DottedPath,
        network_options: dict[str, Any] = {},  # noqa: B006
        view: Literal["own", "state"] = "own",
        value_norm: bool = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=value_norm)
        self.network = NamedNetwork(spec, network, network_options, outputs=1, reads=self.reads)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """The module's value in normalised units, ``[*, N, 1]``."""
        return self.network(batch)
