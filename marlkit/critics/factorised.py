"""The factorised critic: a team value made of the agents' own action values (IQL, VDN, QMIX)."""

from __future__ import annotations

from typing import Literal

from tensordict import TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract, When
from marlkit.functional import mixing as mix
from marlkit.functional.counterfactual import executed_value
from marlkit.nn.networks import TeamNetwork
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import Hidden, Initialisation, Width
from marlkit.spec import TeamSpec


class FactorisedCritic(Critic):
    """``Q = f(q_1, .., q_N)`` of the actor's values ``q_i = Q_i(o_i)[a_i]`` of the actions taken, which its loss trains.

    `none`: each agent has its own, ``Q_i = q_i`` (IQL, Tan 1993). `sum`: the team has ``sum_i q_i`` (VDN, Sunehag et al. 2018).
    `monotone`: it has ``|w'(s)| . ELU(sum_i |w_i(s)| q_i + b(s)) + b'(s)``, whose weights and biases are functions of the state
    (QMIX, Rashid et al. 2018). A team's value is written for each agent. No value falls where a ``q_i`` rises, so that greedy
    agents are a greedy team.

    The value of an agent that is not alive goes on to count, that of its only available action, as in the authors' code: what the
    team is paid after its end is part of what its last actions were worth. Values are in units of reward, as the actor's are:
    where these are large, `estimator.standardise_reward` scales them.

    Args:
        spec: the team.
        mixing: `none`, `sum` or `monotone`; the last two need one reward for the team.
        embedding: width of the hidden layer of `monotone`; 32 in QMIX.
        hidden: widths of the hidden layers of the networks that give its weights; `[]` in QMIX, `[64]` in later code.
        initialisation: of these networks: `uniform`, as `torch.nn.Linear` starts and as in QMIX; `orthogonal` (Saxe et al. 2014)
            or `xavier` (Glorot and Bengio 2010), whose mixtures are steeper at first and learn more slowly.
    """

    contract = Contract(
        reads=(keys.ACTION_VALUES, keys.ACTION, When("mixing=monotone", (keys.STATE,))),
        writes=(keys.ACTION_VALUE,),
        traits=("individual_global_max",),
        needs={
            "actor": ("greedy",),
            "env": ("discrete", When("mixing=sum", ("team_reward",)), When("mixing=monotone", ("team_reward",))),
        },
        predicts=keys.ACTION_VALUE,
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        mixing: Literal["none", "sum", "monotone"] = "none",
        embedding: Width = 32,
        hidden: Hidden = [64],  # noqa: B006
        initialisation: Initialisation = "uniform",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.mixing = mixing
        self.normaliser = ValueNormaliser(enabled=False)
        if mixing != "monotone":
            return

        def of_state(outputs: int, hidden: Hidden) -> TeamNetwork:
            return TeamNetwork(
                spec.state_size,
                outputs,
                hidden=hidden,
                groups=(0,),
                activation="relu",
                output_gain=1.0,
                agent_id=False,
                layer_norm=False,
                initialisation=initialisation,
            )

        self.networks = nn.ModuleDict(
            {
                "weight": of_state(spec.n_agents * embedding, hidden),
                "bias": of_state(embedding, []),
                "final_weight": of_state(embedding, hidden),
                "final_bias": of_state(1, [embedding]),
            }
        )

    def predict(self, batch: TensorDictBase) -> Tensor:
        """``Q`` of the actions taken, ``[*, N, 1]``."""
        own = executed_value(batch[keys.ACTION_VALUES], batch[keys.ACTION])
        if self.mixing == "none":
            return own
        team = mix.summed(own) if self.mixing == "sum" else self._mixed(own, batch[keys.STATE])
        return team.expand_as(own)

    def _mixed(self, own: Tensor, state: Tensor) -> Tensor:
        """The monotone mixture ``[*, 1, 1]`` of ``own`` ``[*, N, 1]`` in a state ``[*, S]``."""
        found = {name: network(state.unsqueeze(-2)).squeeze(-2) for name, network in self.networks.items()}
        found["weight"] = found["weight"].unflatten(-1, (self.spec.n_agents, -1))
        return mix.monotone(own, **found)
