"""An environment that plays a script: for tests that need to determine what happens at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Environment
from marlkit.contract import Contract, When
from marlkit.spec import TeamSpec


@dataclass
class Script:
    """What happens at each of K steps to B environments.

    ``arriving`` ``[K, B, N, O]`` is seen after step k, ``fresh`` ``[K + 1, B, N, O]`` at the start of an episode that begins at
    step k, ``reward`` is ``[K, B, N, 1]``, ``terminated`` and ``truncated`` are ``[K, B, 1]``.
    """

    arriving: Tensor
    fresh: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor


def random_script(spec: TeamSpec, envs: int, steps: int, *, seed: int = 0, ends: float = 0.3) -> Script:
    """Random observations and rewards; an episode ends at a step with probability ``ends``, terminated or truncated."""
    draw = torch.Generator().manual_seed(seed)
    ended = torch.rand(steps, envs, 1, generator=draw) < ends
    truly = torch.rand(steps, envs, 1, generator=draw) < 0.5
    team = (envs, spec.n_agents)
    return Script(
        arriving=torch.randn(steps, *team, spec.observation, generator=draw),
        fresh=torch.randn(steps + 1, *team, spec.observation, generator=draw),
        reward=torch.randn(steps, *team, 1, generator=draw),
        terminated=ended & truly,
        truncated=ended & ~truly,
    )


class ScriptedEnvironment(Environment):
    """Plays a script whatever the agents do, and starts over at its end.

    Args:
        spec: the team.
        script: what happens.
    """

    contract = Contract(
        writes=(
            *(keys.OBSERVATION, keys.STATE, keys.ALIVE, keys.IS_FIRST),
            When("discrete", (keys.ACTION_MASK,)),
            When("continuous", (keys.ACTION_DIMS,)),
            *(keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE),
        )
    )

    def __init__(self, spec: TeamSpec, script: Script) -> None:
        self.spec = spec
        self.script = script
        self.num_envs = script.reward.shape[1]
        self.device = torch.device("cpu")
        self.now = 0
        self.taken: list[Tensor] = []

    def reset(self) -> TensorDict:
        """Start the script, batch ``[B]``."""
        self.now = 0
        return self._seen(self.script.fresh[0], torch.ones(self.num_envs, 1, dtype=torch.bool))

    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """The next step of the script, whatever the action ``[B, N]`` or ``[B, N, D]``, which is noted."""
        self.taken.append(action)
        script, now = self.script, self.now
        terminated, truncated = script.terminated[now], script.truncated[now]
        done = terminated | truncated
        arrived = self._seen(script.arriving[now], torch.zeros_like(done))
        arrived.set(("agents", "reward"), script.reward[now])
        arrived.set("terminated", terminated).set("truncated", truncated).set("done", done)
        self.now = (now + 1) % len(script.reward)
        return arrived, self._seen(torch.where(done.unsqueeze(-1), script.fresh[now + 1], script.arriving[now]), done)

    def state_dict(self) -> dict[str, Any]:
        """The step of the script."""
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.now = state["now"]

    def _seen(self, observation: Tensor, is_first: Tensor) -> TensorDict:
        sizes = torch.tensor(self.spec.own_action_sizes).unsqueeze(-1)
        has = (torch.arange(self.spec.action_features) < sizes).expand(self.num_envs, -1, -1)
        agents = {
            "observation": observation,
            "alive": torch.ones(*observation.shape[:2], 1, dtype=torch.bool),
            "action_mask" if self.spec.discrete else "action_dims": has,
        }
        step = {"agents": agents, keys.STATE: observation.flatten(1), keys.IS_FIRST: is_first}
        return TensorDict(step, batch_size=[self.num_envs])
