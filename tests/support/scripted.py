"""An environment that plays a script, and a training in memory: for tests that need to determine what happens at each step."""

from __future__ import annotations

from typing import Any

import lightning
from tensordict import TensorDict

from marlkit.component import Actor, Critic, Data, Environment, Estimator, Opponents, Targets, Update
from marlkit.contract import Contract
from marlkit.critics.local import LocalCritic
from marlkit.data.rollout import RolloutData
from marlkit.estimators.gae import GaeEstimator
from marlkit.learning import RunStep, run_directly
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.spec import TeamSpec
from marlkit.targets.online import OnlineTargets
from marlkit.testing.scripted import Script, ScriptedEnvironment, random_script
from marlkit.training.learner import Learner

__all__ = ["FixedData", "Script", "ScriptedEnvironment", "fit", "learner_of", "random_script"]


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
