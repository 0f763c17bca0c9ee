"""Sequential updates: agents learn one after another, each allowing for those before it (HAPPO and HATRPO, Kuba et al. 2022)."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from marlkit import keys
from marlkit.component import Actor, Critic, Update
from marlkit.contract import Contract
from marlkit.functional.sequential import compound
from marlkit.learning import Learning, Metrics, mean_metrics
from marlkit.spec import TeamSpec


class SequentialUpdate(Update):
    """Each iteration draws a fresh random order of the agents; agent m maximises its surrogate with ``M_m`` in place of ``A``.

    ``M_1 = A`` and ``M_{m+1} = M_m pi_new_m(a_m | o_m) / pi_old_m(a_m | o_m)``, the compound ratio (1 for agents that are not
    alive). The critic is fitted last. With ``step: ppo_clip`` this is HAPPO, with ``step: trust_region`` HATRPO, with
    ``step: policy_gradient`` HAA2C.

    Args:
        spec: the team.
        step: how one agent is updated, and the critic.
    """

    contract = Contract(
        reads=(keys.ACTION, keys.LOG_PROB, keys.ALIVE, keys.ADVANTAGE),
        traits=("on_policy",),
        inherits=("step",),
        without=("per_agent",),
        needs={"actor": ("separate_parameters",), "step": ("per_agent",), "env": ("team_reward",)},
    )

    def __init__(self, spec: TeamSpec, *, step: Update) -> None:
        super().__init__()
        self.spec = spec
        self.step = step

    def attach(self, actor: Actor, critic: Critic) -> None:
        """Attach the step."""
        self.step.attach(actor, critic)

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """One round over the agents, then the critic."""
        batch = self.step.prepare(batch, learning)
        advantage = batch[keys.ADVANTAGE]
        factor = torch.ones_like(advantage[..., 0, :])
        history: list[Metrics] = []
        with learning.ranks.common():
            order = torch.randperm(self.spec.n_agents).tolist()
        for agent in order:
            batch.set(keys.ADVANTAGE, advantage * factor.unsqueeze(-2))
            history.append(self.step.fit_policy(batch, learning, [agent]))
            factor = self._compound(factor, batch, learning, agent)
        metrics = mean_metrics(history)
        metrics["actor/compound_ratio"] = factor.mean()
        return metrics | self.step.fit_critic(batch, learning)

    @torch.no_grad()
    def _compound(self, factor: torch.Tensor, batch: TensorDictBase, learning: Learning, agent: int) -> torch.Tensor:
        action = batch[keys.ACTION].narrow(2, agent, 1)
        log_prob = learning.actor.distribution(batch, [agent]).log_prob(action)
        old, alive = batch[keys.LOG_PROB][..., agent, :], batch[keys.ALIVE][..., agent, :]
        return compound(factor, log_prob[..., 0, :], old, alive)
