"""Episodes played with the most likely actions, on environments of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys, rng
from marlkit.component import Actor, Environment, who_is
from marlkit.errors import NonFiniteError
from marlkit.keys import Key
from marlkit.spec import TeamSpec
from marlkit.training.culprit import naming_the_culprit
from marlkit.training.inspection import CAUSES
from marlkit.training.returns import by_group, has_agent_returns, return_metrics, return_names


@dataclass(frozen=True)
class Episodes:
    """Results of one episode per environment.

    Attributes:
        returns: undiscounted sum of rewards, averaged over the agents, ``[B]``.
        lengths: number of steps, ``[B]``.
        terminated: whether the episode truly ended rather than was cut, ``[B]`` bool.
        agent_returns: undiscounted sum of each agent's rewards, ``[B, N]``.
        spec: the team.
    """

    returns: Tensor
    lengths: Tensor
    terminated: Tensor
    agent_returns: Tensor
    spec: TeamSpec

    def by_metric(self) -> dict[str, Tensor]:
        """Each episode's part ``[B]`` in the metrics that are means over episodes: returns, length, whether it terminated."""
        groups = [each for _, each in by_group(self.agent_returns, self.spec)] or [self.returns]
        agents = self.agent_returns.unbind(-1) if has_agent_returns(self.spec) else ()
        returns = dict(zip(return_names("evaluation", self.spec), [*groups, *agents], strict=True))
        return returns | {"evaluation/length": self.lengths.float(), "evaluation/terminated": self.terminated.float()}

    def summary(self) -> dict[str, float]:
        """Mean and deviation of the return, mean length and share of terminated episodes, as metrics.

        The return is the team's, or that of each group where agents are opposed; see
        :func:`marlkit.training.returns.return_metrics`.
        """
        means = return_metrics("evaluation", self.spec, self.returns.mean().item(), self.agent_returns.mean(0))
        groups = {f"group_return_std/{name}": each for name, each in by_group(self.agent_returns, self.spec)}
        spread = groups or {"return_std": self.returns}
        return means | {
            **{f"evaluation/{name}": each.std(correction=0).item() for name, each in spread.items()},
            "evaluation/length": self.lengths.float().mean().item(),
            "evaluation/terminated": self.terminated.float().mean().item(),
        }


@torch.no_grad()
def play_episodes(
    env: Environment,
    actor: Actor,
    *,
    seed: int,
    steps: int,
    deterministic: bool = True,
    watch: Callable[[Environment], None] | None = None,
) -> Episodes:
    """Play the first episode of every environment to its end.

    The random generators are seeded for the episodes and put back afterwards, so that evaluating never changes training and
    every evaluation sees the same episodes.

    Args:
        env: reset first.
        actor: chooses the actions.
        seed: of the episodes.
        steps: where an episode is cut if the environment does not end it.
        deterministic: the most likely actions rather than samples.
        watch: called before every step while environment 0 plays its first episode.

    Raises:
        NonFiniteError: a return is NaN or infinite.
        MarlkitError: a component failed; names it.
        MarlkitError: the team spec says that all agents receive the same rewards, and they did not.
    """
    with rng.isolated(seed), naming_the_culprit("while episodes were played"):
        env.seed(seed)
        current, carried = env.reset(), actor.initial_state(env.num_envs)
        running = torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
        returns = torch.zeros(env.num_envs, device=env.device)
        lengths = torch.zeros(env.num_envs, dtype=torch.int64, device=env.device)
        terminated = torch.zeros_like(running)
        agent_returns = torch.zeros(env.num_envs, env.spec.n_agents, device=env.device)
        for _ in range(steps):
            if watch is not None and running[0]:
                watch(env)
            arrived, current, carried = _step(env, actor, current, carried, deterministic)
            reward = arrived[keys.REWARD[1:]]
            returns += reward.mean(-2).squeeze(-1) * running
            agent_returns += reward.squeeze(-1) * running.unsqueeze(-1)
            lengths += running
            terminated |= running & arrived[keys.TERMINATED[1]].squeeze(-1)
            running &= ~arrived[keys.DONE[1]].squeeze(-1)
            if not running.any():
                break
    if not returns.isfinite().all():
        raise NonFiniteError(f"while episodes were played: the returns in {who_is(env)} are not finite. {CAUSES['env']}")
    env.refuse_unequal_rewards(agent_returns.unsqueeze(-1))
    return Episodes(returns, lengths, terminated, agent_returns, env.spec)


def _step(
    env: Environment, actor: Actor, current: TensorDict, carried: dict[Key, Tensor], deterministic: bool
) -> tuple[TensorDict, TensorDict, dict[Key, Tensor]]:
    taken = current.copy()
    for key, value in carried.items():
        taken.set(key, value)
    actor(taken, deterministic=deterministic)
    arrived, following = env.step(taken[keys.ACTION])
    return arrived, following, {key: taken[keys.following(key)] for key in carried}
