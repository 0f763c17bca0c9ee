"""Components that a user might write: read by the tests of the recipe layer, most of them never run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Critic, Environment, Estimator, Runtime, Update
from marlkit.contract import Contract, When
from marlkit.critics.local import LocalCritic
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import PositiveFloat, PositiveInt
from marlkit.spec import TeamSpec

LEVELS = 1 + 2
KEYS = (keys.OBSERVATION, keys.STATE, keys.ALIVE, keys.IS_FIRST, keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE)
Mode = Literal["slow", "fast"]


class TinyEnvironment(Environment):
    """A tiny environment.

    Args:
        num_envs: how many
            at once.
        continuous_actions: whether actions are forces.
        pooled (bool): whether the team shares one reward.
        extras: anything else.
    """

    contract = Contract(
        writes=(
            *KEYS,
            When("discrete", (keys.ACTION_MASK,)),
            When("continuous", (keys.ACTION_DIMS,)),
        ),
        traits=(
            When("continuous_actions=true", ("continuous",)),
            When("continuous_actions=false", ("discrete",)),
            When("pooled=true", ("team_reward",)),
        ),
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        num_envs: PositiveInt = 4,
        continuous_actions: bool = True,
        pooled: bool = False,
        extras: dict[str, Any] | None = None,
    ) -> None: ...


class UntoldEnvironment(TinyEnvironment):
    """Its source determines neither the kind of actions nor whether rewards are pooled."""

    contract = Contract(writes=(*KEYS, When("discrete", (keys.ACTION_MASK,)), When("continuous", (keys.ACTION_DIMS,))))


class RecurrentActor(StochasticActor):
    """Reads the keys that it wrote at the previous step."""

    contract = Contract(
        reads=(keys.OBSERVATION, keys.HIDDEN),
        writes=(keys.ACTION, keys.LOG_PROB, keys.LOC, keys.SCALE, keys.following(keys.HIDDEN)),
        traits=("stochastic",),
    )


class ActionValueCritic(Critic):
    """Predicts the value of the action taken, and no state value."""

    contract = Contract(
        reads=(keys.STATE, keys.ACTION, When("discrete", (keys.LOGITS,)), When("continuous", (keys.LOC,))),
        writes=(keys.ACTION_VALUE,),
        predicts=keys.ACTION_VALUE,
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        mode: Mode = "slow",
        levels: PositiveInt = LEVELS,
        rate: "PositiveFloat" = 1e-3,  # noqa: UP037
    ) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)
        self.value = torch.nn.Parameter(torch.zeros(()))

    def predict(self, batch: TensorDictBase) -> Tensor:
        """One number for everything."""
        return self.value.expand(*batch.batch_size, self.spec.n_agents, 1)


class DiscreteCritic(LocalCritic):
    """A critic for discrete actions only, with what the local critic takes and one option more."""

    contract = Contract(
        reads=(keys.OBSERVATION, keys.LOGITS),
        writes=(keys.STATE_VALUE,),
        predicts=keys.STATE_VALUE,
        needs={"env": ("discrete",)},
    )

    def __init__(self, spec: TeamSpec, *, temperature: PositiveFloat = 1.0, value_norm: bool = False, **options: Any) -> None:
        super().__init__(spec, value_norm=value_norm, **options)
        self.temperature = temperature


class PlainCritic(LocalCritic):
    """The local critic under another name."""


class ClosedCritic(LocalCritic):
    """A local critic that can no longer be configured."""

    def __init__(self, spec: TeamSpec, *, bonus: float = 1.0) -> None:
        super().__init__(spec)
        self.bonus = bonus


class SilentCritic(Critic):
    """Writes a value and predicts no key."""

    contract = Contract(reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,))


class ValueEstimator(Estimator):
    """Writes a target but no advantage."""

    contract = Contract(reads=(keys.REWARD, keys.following(keys.STATE_VALUE)), writes=(keys.VALUE_TARGET,))


class WholeTeamUpdate(Update):
    """An update that cannot treat one agent alone."""

    contract = Contract(reads=(keys.ADVANTAGE, keys.VALUE_TARGET), traits=("on_policy",))

    def __init__(self, spec: TeamSpec, *, inner: Update | None = None) -> None: ...


class NotAComponent:
    """Extends no class of marlkit."""
