"""Independent policies whose network is any module of torch, tensordict or TorchRL, named by its dotted path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors._independent import IndependentActor, of_agents
from marlkit.contract import Contract, When
from marlkit.errors import OptionError
from marlkit.nn.named_network import NamedNetwork
from marlkit.options import DottedPath, Probability, StartingDeviation
from marlkit.spec import TeamSpec


class ModuleActor(IndependentActor):
    """``pi_i(a_i | x_i)`` of the outputs of a module that is given ``[*, N, O]`` and gives ``[*, N, F]``.

    F outputs per agent: a logit for each discrete action, or a mean for each dimension, in half-ranges of the action, whose
    deviation is learnt and the same for all agents. A recipe that fits every environment names sizes instead of numbers: `N`
    agents, `O` observation features, `S` state features, `A` actions or `D` action dimensions, and `F`; and
    `{path: torch.nn.Tanh}` is that class::

        actor:
          type: module
          network: torchrl.modules.MultiAgentMLP
          network_options:
            {n_agent_inputs: O, n_agent_outputs: F, n_agents: N, centralized: false, share_params: true, depth: 2, num_cells: 64,
             activation_class: {path: torch.nn.Tanh}}

    A module of tensordict reads the observation under its own ``in_keys`` instead, and writes one key of any name.

    Args:
        spec: the team.
        network: dotted path of a class that extends `torch.nn.Module`; imported when training starts, not by `marlkit check`.
        network_options: its arguments.
        centralised: whether the module may let an agent see what others observe, so that acting needs the whole team.
        initial_std: deviation at the start, in half-ranges of the action; 0.3 to 1.
        uniform_share: share of discrete actions that are chosen uniformly among the available ones, as in `stochastic`.
        uniform_share_end: its value at the end of the training, reached linearly; `null`: unchanged.

    Raises:
        OptionError: there is no such class, it cannot be built with these options, what it gives is of another shape, or it mixes
            agents though it may not.
    """

    contract = Contract(
        reads=(keys.OBSERVATION, When("discrete", (keys.ACTION_MASK,)), When("continuous", (keys.ACTION_DIMS,))),
        writes=(
            keys.ACTION,
            keys.LOG_PROB,
            When("discrete", (keys.LOGITS,)),
            When("continuous", (keys.LOC, keys.SCALE)),
        ),
        traits=("stochastic", "independent_agents", When("centralised=true", ("centralised_execution",))),
        code="marlkit.nn.named_code:code",
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        network: DottedPath,
        network_options: dict[str, Any] = {},  # noqa: B006
        centralised: bool = False,
        initial_std: StartingDeviation = 1.0,
        uniform_share: Probability = 0.0,
        uniform_share_end: Probability | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        outputs = self.count_outputs("parameter")
        self.network = NamedNetwork(spec, network, network_options, outputs=outputs, reads=self.reads)
        if not centralised and self.network.mixes_agents():
            message = "must be true, because in this network an agent's action depends on what other agents observe"
            raise OptionError("centralised", message)
        self.prepare_policy(
            (0,) * spec.n_agents, initial_std=initial_std, uniform_share=uniform_share, uniform_share_end=uniform_share_end
        )

    def outputs(self, batch: TensorDictBase, agents: Sequence[int] | None) -> tuple[Tensor, None]:
        """``x_i`` of all agents or of ``agents``, ``[*, n, F]``."""
        return of_agents(self.network(batch), agents), None
