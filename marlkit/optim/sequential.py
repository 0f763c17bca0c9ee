"""Sequential updates: agents learn one after another, each allowing for those before it (HAPPO and HATRPO, Kuba et al. 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase

from marlkit import keys
from marlkit.component import Actor, Critic, Update
from marlkit.contract import Contract
from marlkit.errors import OptionError
from marlkit.functional.sequential import compound
from marlkit.learning import Learning, Metrics, mean_metrics
from marlkit.options import NonNegativeInt
from marlkit.spec import TeamSpec


class SequentialUpdate(Update):
    """Agents learn in turn, in a fresh random order per iteration; agent m maximises its surrogate with ``M_m`` for ``A``.

    ``M_1 = A`` and ``M_{m+1} = M_m pi_new_m(a_m | o_m) / pi_old_m(a_m | o_m)``, the compound ratio (1 for agents that are not
    alive). The critic is fitted last. With ``step: ppo_clip`` this is HAPPO, with ``step: trust_region`` HATRPO, with
    ``step: {type: policy_gradient, surrogate: ratio}`` HAA2C.

    With a fixed order the return still does not fall (Kuba et al. 2022, theorem 2); that the team comes to a Nash equilibrium is
    shown for random ones (theorem 3). Where agents share parameters, neither is: the turn of one moves the policies of the
    others, and the ratios of earlier turns no longer tell where these policies are.

    Args:
        spec: the team.
        step: how one agent is updated, and the critic.
        order: `random`; `fixed`, from the first agent to the last; or a list of all agents, such as `[2, 0, 1]`, for every
            iteration.

    Raises:
        OptionError: the order does not name every agent once.
    """

    contract = Contract(
        reads=(keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE),
        traits=("on_policy",),
        inherits=("step",),
        without=("per_agent",),
        needs={"actor": ("independent_agents",), "step": ("per_agent",), "env": ("team_reward",)},
        prefers={
            "actor": {
                "separate_parameters": "the turn of one agent also moves the policies of those that share its parameters, so "
                "that the guarantees of sequential updates are lost"
            }
        },
    )

    def __init__(
        self, spec: TeamSpec, *, step: Update, order: Literal["random", "fixed"] | list[NonNegativeInt] = "random"
    ) -> None:
        super().__init__()
        self.spec = spec
        self.step = step
        if isinstance(order, list) and sorted(order) != list(range(spec.n_agents)):
            message = f"must name each of the {spec.n_agents} agents (0 to {spec.n_agents - 1}) once, got {order}"
            raise OptionError("order", message)
        self.fixed_order = {"random": None, "fixed": list(range(spec.n_agents))}[order] if isinstance(order, str) else order

    def attach(self, actor: Actor, critic: Critic) -> None:
        """Attach the step."""
        self.step.attach(actor, critic)

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """One round over the agents, then the critic, on a batch ``[B, T]``."""
        batch = self.step.prepare(batch, learning)
        advantage = batch[keys.ADVANTAGE]
        factor = torch.ones_like(advantage[..., 0, :])
        history: list[Metrics] = []
        for agent in self._order(learning):
            batch.set(keys.ADVANTAGE, advantage * factor.unsqueeze(-2))
            history.append(self.step.fit_policy(batch, learning, [agent]))
            factor = self._compound(factor, batch, learning, agent)
        metrics = mean_metrics(history)
        metrics["actor/compound_ratio"] = factor.mean()
        return metrics | self.step.fit_critic(batch, learning)

    def _order(self, learning: Learning) -> list[int]:
        if self.fixed_order is not None:
            return self.fixed_order
        with learning.ranks.common():
            return torch.randperm(self.spec.n_agents).tolist()

    @torch.no_grad()
    def _compound(self, factor: torch.Tensor, batch: TensorDictBase, learning: Learning, agent: int) -> torch.Tensor:
        action = batch[keys.ACTION].narrow(2, agent, 1)
        log_prob = learning.actor.distribution(batch, [agent]).log_prob(action)
        old, alive = batch[keys.LOG_PROB][..., agent, :], batch[keys.ALIVE][..., agent, :]
        return compound(factor, log_prob[..., 0, :], old, alive)
