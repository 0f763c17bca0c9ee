"""An environment that plays a script, and a training in memory: for tests that need to determine what happens at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor, Critic, Data, Environment, Estimator, Opponents, Targets, Update
from marlkit.contract import Contract, When
from marlkit.critics.local import LocalCritic
from marlkit.data.rollout import RolloutData
from marlkit.estimators.gae import GaeEstimator
from marlkit.learning import RunStep, run_directly
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.spec import TeamSpec
from marlkit.targets.online import OnlineTargets
from marlkit.training.learner import Learner


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
    """Plays a script whatever the agents do, and starts over at its end."""

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
        self.now = 0
        return self._seen(self.script.fresh[0], torch.ones(self.num_envs, 1, dtype=torch.bool))

    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
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
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
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


class FixedData(Data):
    """Hands out copies of the same batches, in order."""

    contract = Contract(traits=("on_policy",))

    def __init__(self, spec: TeamSpec, batches: list[TensorDict]) -> None:
        self.spec = spec
        self.stored = batches
        self.count = 0

    def collect(self, env: Environment, actor: Actor, run_step: RunStep = run_directly) -> TensorDict:
        self.count += 1
        return self.stored[(self.count - 1) % len(self.stored)].clone()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def learner_of(
    env: Environment,
    actor: Actor,
    *,
    critic: Critic | None = None,
    opponents: Opponents | None = None,
    targets: Targets | None = None,
    estimator: Estimator | None = None,
    update: Update | None = None,
    data: Data | None = None,
    optimizer: AdamOptimizer | None = None,
    iterations: int = 10,
) -> Learner:
    """A learner of these components; those not given are the simplest ones."""
    return Learner(
        env=env,
        actor=actor,
        critic=critic or LocalCritic(env.spec, hidden=[4]),
        opponents=opponents or TruePolicyOpponents(env.spec),
        targets=targets or OnlineTargets(env.spec),
        estimator=estimator or GaeEstimator(env.spec),
        update=update or PpoClipUpdate(env.spec, epochs=1),
        data=data or RolloutData(env.spec, steps=4),
        optimizer=optimizer or AdamOptimizer(env.spec),
        iterations=iterations,
    )


def fit(learner: Learner, iterations: int) -> None:
    """Train for some iterations without writing files."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=iterations,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(learner)
