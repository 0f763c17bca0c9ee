"""Components with one fault each, by the rule of the testing kit that it breaks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors.deterministic import DeterministicActor
from marlkit.actors.epsilon_greedy import EpsilonGreedyActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.actors.transformer import TransformerActor
from marlkit.component import Component, Critic, least
from marlkit.contract import Contract, When
from marlkit.critics.attention import AttentionCritic
from marlkit.critics.factorised import FactorisedCritic
from marlkit.critics.joint import JointCritic
from marlkit.critics.transformer import TransformerCritic
from marlkit.data.replay import ReplayData
from marlkit.data.rollout import RolloutData
from marlkit.data.uniform_play import UniformPlayData
from marlkit.errors import OptionError
from marlkit.estimators.gae import GaeEstimator
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.functional.counterfactual import executed_value
from marlkit.learning import at_once
from marlkit.nn.distributions import CategoricalTeam, NormalTeam
from marlkit.nn.networks import TeamNetwork, group_of_agents
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.opponents.theory_of_mind import TheoryOfMindOpponents
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ddpg import DdpgUpdate
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.optim.sequential import SequentialUpdate
from marlkit.optim.trust_region import TrustRegionUpdate
from marlkit.options import Hidden, PositiveInt, Share, ValueNorm
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.targets.hard import HardTargets
from marlkit.targets.online import OnlineTargets
from marlkit.targets.soft import SoftTargets
from marlkit.trainers.lightning import LightningTrainer

DISCRETE = TeamSpec(3, 5, Discrete(4), action_sizes=(4, 2, 3), team_reward=True)
CONTINUOUS = TeamSpec(3, 4, Continuous(2), action_sizes=(2, 2, 1), team_reward=True)


class PlainCritic(Critic):
    """A network that values what each agent sees, and nothing else.

    Args:
        spec: the team.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters.
        value_norm: regress on running-normalised targets.
    """

    contract = Contract(
        reads=(keys.OBSERVATION,),
        writes=(keys.STATE_VALUE,),
        traits=(When("share=none", ("separate_parameters",)),),
        predicts=keys.STATE_VALUE,
    )

    def __init__(self, spec: TeamSpec, *, hidden: Hidden = [4], share: Share = "all", value_norm: ValueNorm = True) -> None:  # noqa: B006
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=value_norm)
        groups = group_of_agents(share, spec.n_agents)
        self.network = TeamNetwork(
            spec.observation, 1, hidden=hidden, groups=groups, activation="tanh", output_gain=1.0, agent_id=True, layer_norm=False
        )

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``."""
        self.network.rescale(scale, shift)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """The network's outputs."""
        found: Tensor = self.network(batch[keys.OBSERVATION])
        return found


Build = Callable[[], Component]
MUTANTS: list[tuple[str, str, Build]] = []
"""Rule, what is wrong, and how to build it."""


def mutant(
    rule: str, fault: str, base: Any, spec: TeamSpec = DISCRETE, options: dict[str, Any] | None = None, **changes: Any
) -> None:
    """A component of a class derived from ``base`` with other attributes."""

    def build() -> Component:
        torch.manual_seed(0)
        found: Component = type(f"Broken{base.__name__}", (base,), changes)(spec, **(options or {}))
        return found

    MUTANTS.append((rule, fault, build))


def of(base: Any, **changes: Any) -> Contract:
    """The contract of a class, changed."""
    return replace(base.contract, **changes)


SMALL: dict[str, Any] = {"hidden": [4]}


# --- every kind -----------------------------------------------------------------------------------------------------------


def _forgets_spec(self: Any, spec: TeamSpec, *, lr: float = 1.0) -> None:
    pass


mutant("is built for a team", "no spec", AdamOptimizer, __init__=_forgets_spec)
mutant("names keys of the table", "an own key", PlainCritic, contract=of(PlainCritic, reads=(("agents", "observatoin"),)))
mutant("names known traits", "a typo in traits", StochasticActor, contract=of(StochasticActor, traits=("independant_agents",)))
mutant("names known traits", "a typo in needs", PlainCritic, contract=of(PlainCritic, needs={"actor": ("stocastic",)}))
mutant("names known traits", "of another kind", PlainCritic, contract=of(PlainCritic, traits=("on_policy",)))
mutant("names known traits", "needed of another kind", PlainCritic, contract=of(PlainCritic, needs={"actor": ("lagging",)}))
mutant(
    "names known traits",
    "a typo in a condition",
    PlainCritic,
    contract=of(PlainCritic, traits=(When("discret", ("separate_parameters",)),)),
)
mutant(
    "has conditions that can hold",
    "no such option",
    PlainCritic,
    contract=of(PlainCritic, traits=(When("shares=none", ("separate_parameters",)),)),
)
mutant(
    "has conditions that can hold",
    "no such value",
    PlainCritic,
    contract=of(PlainCritic, traits=(When("share=non", ("separate_parameters",)),)),
)
mutant(
    "has conditions that can hold",
    "no such value to differ from",
    PlainCritic,
    contract=of(PlainCritic, traits=(When("share!=non", ("separate_parameters",)),)),
)
mutant(
    "has a contract of what exists", "needs of nothing", PlainCritic, contract=of(PlainCritic, needs={"acter": ("stochastic",)})
)
mutant("has a contract of what exists", "inherits of nothing", PpoClipUpdate, contract=of(PpoClipUpdate, inherits=("step",)))
mutant(
    "has a contract of what exists",
    "predicts what it does not write",
    PlainCritic,
    contract=of(PlainCritic, predicts=keys.ACTION_VALUE),
)


def _by_position(self: Any, spec: TeamSpec, hidden: Any = (4,)) -> None:
    PlainCritic.__init__(self, spec, hidden=list(hidden))


def _badly_annotated(self: Any, spec: TeamSpec, *, hidden: Hidden = [0]) -> None:  # noqa: B006
    PlainCritic.__init__(self, spec, hidden=[4])


def _not_annotated(self: Any, spec: TeamSpec, *, hidden=None) -> None:  # type: ignore[no-untyped-def]
    PlainCritic.__init__(self, spec, hidden=[4])


def _not_described(self: Any, spec: TeamSpec, *, wideness: PositiveInt = 4) -> None:
    PlainCritic.__init__(self, spec, hidden=[wideness])


NO_SHARE = of(PlainCritic, traits=())
mutant("takes options by keyword", "by position", PlainCritic, __init__=_by_position, contract=NO_SHARE)
mutant("takes options by keyword", "a default that is refused", PlainCritic, __init__=_badly_annotated, contract=NO_SHARE)
mutant("takes options by keyword", "no annotation", PlainCritic, __init__=_not_annotated, contract=NO_SHARE)
mutant("describes its options", "no word of one", PlainCritic, __init__=_not_described, contract=NO_SHARE)


def _part(step: Any) -> Build:
    return lambda: SequentialUpdate(DISCRETE, step=step(DISCRETE))


MUTANTS.append(("has parts that it can use", "a step that is not per agent", _part(DdpgUpdate)))


class ComputedContractCritic(PlainCritic):
    """Its contract is right, but computed: `marlkit check` could not read it.

    Args:
        spec: the team.
    """

    contract = replace(PlainCritic.contract, traits=tuple(["separate_parameters"][:0]))

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__(spec, hidden=[4])


MUTANTS.append(("is read without running it", "a computed contract", lambda: ComputedContractCritic(DISCRETE)))


def _keeps_layer(self: Any, spec: TeamSpec) -> None:
    PlainCritic.__init__(self, spec)
    self.layers = [torch.nn.Linear(2, 1)]


def _keeps_tensor(self: Any, spec: TeamSpec, **options: Any) -> None:
    PlainCritic.__init__(self, spec, hidden=[4], **options)
    self.kept = [torch.ones(3)]


mutant("holds tensors as parameters and buffers", "a tensor in a list", PlainCritic, __init__=_keeps_tensor)
mutant("holds tensors as parameters and buffers", "a layer in a list", PlainCritic, __init__=_keeps_layer)


# --- what reads and writes keys -------------------------------------------------------------------------------------------


def _predict(expression: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    def predict(self: Any, batch: Any) -> Tensor:
        return self.network(batch[keys.OBSERVATION]) + expression(self, batch)

    return predict


mutant(
    "reads what it declares",
    "a state that is not declared",
    PlainCritic,
    options=SMALL,
    predict=_predict(lambda self, batch: batch[keys.STATE].sum(-1)[..., None, None]),
)


def _returns_nothing(self: Any, batch: Any) -> None:
    PlainCritic.forward(self, batch)


mutant("writes what it declares", "nothing", PlainCritic, options=SMALL, forward=lambda self, batch: batch)
mutant("writes what it declares", "no batch", PlainCritic, options=SMALL, forward=_returns_nothing)
mutant(
    "writes what it declares",
    "more than that",
    PlainCritic,
    options=SMALL,
    forward=lambda self, batch: PlainCritic.forward(self, batch).set(keys.ACTION_VALUE, batch[keys.STATE_VALUE]),
)
mutant(
    "writes what it declares",
    "another shape",
    PlainCritic,
    options=SMALL,
    predict=lambda self, batch: self.network(batch[keys.OBSERVATION]).squeeze(-1),
)
mutant(
    "writes what it declares",
    "another type",
    PlainCritic,
    options=SMALL,
    predict=lambda self, batch: self.network(batch[keys.OBSERVATION]).double(),
)
mutant(
    "writes what it declares", "NaN", PlainCritic, options=SMALL, predict=_predict(lambda self, batch: torch.tensor(float("nan")))
)


def _in_place(self: Any, batch: Any) -> Tensor:
    batch[keys.OBSERVATION].mul_(2.0)
    return self.network(batch[keys.OBSERVATION])


mutant("changes nothing that it reads", "scales observations in place", PlainCritic, options=SMALL, predict=_in_place)


def _estimates_in_place(self: Any, batch: Any) -> Any:
    batch[keys.REWARD].sub_(batch[keys.REWARD].mean())
    return GaeEstimator.forward(self, batch)


mutant("changes nothing that it reads", "centres rewards in place", GaeEstimator, forward=_estimates_in_place)


def _learns_statistics(self: Any, batch: Any) -> Any:
    self.normaliser.update(PlainCritic.predict(self, batch).detach())
    return PlainCritic.forward(self, batch)


mutant("evaluates without learning", "statistics of its values", PlainCritic, options=SMALL, forward=_learns_statistics)


def _counts_calls(self: Any, batch: Any) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return self.network(batch[keys.OBSERVATION]) + self.calls


mutant("gives the same twice", "counts its calls", PlainCritic, options=SMALL, predict=_counts_calls)
mutant("draws nothing", "dropout", PlainCritic, options=SMALL, predict=_predict(lambda self, batch: torch.randn(())))


def _shares_on_copy(self: Any, memo: Any) -> Any:
    twin = type(self)(self.spec, hidden=[4])
    twin.network = self.network
    return twin


mutant("can be copied", "its copies share a network", PlainCritic, options=SMALL, __deepcopy__=_shares_on_copy)


def _unsaved_noise(self: Any, spec: TeamSpec, **options: Any) -> None:
    DeterministicActor.__init__(self, spec, hidden=[4], **options)
    buffer = self._buffers.pop("exploration")
    self.register_buffer("exploration", buffer, persistent=False)


mutant(
    "is restored by its state",
    "noise that is not saved",
    DeterministicActor,
    CONTINUOUS,
    {"exploration_end": 0.01},
    __init__=_unsaved_noise,
)


# --- actors ---------------------------------------------------------------------------------------------------------------


def _changed_log_prob(self: Any, batch: Any, deterministic: bool = False) -> Any:
    StochasticActor.forward(self, batch, deterministic)
    return batch.set(keys.LOG_PROB, batch[keys.LOG_PROB] + 0.1)


def _summed(self: Any, action: Tensor) -> Tensor:
    standard = (action - self.loc) / self.scale
    return (-0.5 * standard.square() - self.scale.log() - 0.919).sum(-1, keepdim=True)


class OfAllDimensions(NormalTeam):
    """Sums the log-probability over padding too."""

    log_prob = _summed


def _normal_of_all(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    policy: Any = StochasticActor.policy(self, outputs, batch, agents)
    return OfAllDimensions(policy.loc, policy.scale, policy.dims)


RULE = "writes the log probability of the action"
mutant(RULE, "another than its distribution's", StochasticActor, options=SMALL, forward=_changed_log_prob)
mutant(RULE, "padding counts", StochasticActor, CONTINUOUS, SMALL, policy=_normal_of_all)


def _lying_distribution(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    policy: Any = StochasticActor.policy(self, outputs, batch, agents)
    return type("Twice", (CategoricalTeam,), {"log_prob": lambda own, a: 2 * CategoricalTeam.log_prob(own, a)})(policy.log_probs)


mutant(RULE, "another than its parameters'", StochasticActor, options=SMALL, policy=_lying_distribution)


def _unmasked(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    return CategoricalTeam(outputs)


mutant("plays available actions only", "ignores the mask", StochasticActor, options=SMALL, policy=_unmasked)


def _masks_after_reading(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    own = torch.arange(self.spec.action_features) < torch.tensor(self.spec.own_action_sizes).unsqueeze(-1)
    return CategoricalTeam(outputs, own if agents is None else own[list(agents)])


mutant("plays available actions only", "knows own actions, no mask", StochasticActor, options=SMALL, policy=_masks_after_reading)


def _needs_a_mask(self: Any, batch: Any, agents: Any = None) -> Tensor:
    found: Tensor = batch[keys.ACTION_MASK]
    return found if agents is None else found[..., list(agents), :]


mutant("knows the own actions without a mask", "needs one", StochasticActor, options=SMALL, available=_needs_a_mask)


def _draws_anyway(self: Any, batch: Any, deterministic: bool = False) -> Any:
    return StochasticActor.forward(self, batch, False)


def _draws_and_plays_mode(self: Any, batch: Any, deterministic: bool = False) -> Any:
    torch.rand(1)
    return StochasticActor.forward(self, batch, deterministic)


def _plays_least_likely(self: Any, batch: Any, deterministic: bool = False) -> Any:
    policy = self.distribution(batch)
    action = (policy.log_probs.masked_fill(~self.available(batch), 1e9)).argmin(-1) if deterministic else policy.sample()
    return self.write_choice(batch, policy, action)


mutant("plays the mode without drawing", "samples", StochasticActor, options=SMALL, forward=_draws_anyway)
mutant(
    "plays the mode without drawing", "draws what it does not use", StochasticActor, options=SMALL, forward=_draws_and_plays_mode
)
mutant("plays the mode without drawing", "plays the least likely", StochasticActor, options=SMALL, forward=_plays_least_likely)


def _explores_outside(self: Any, batch: Any, deterministic: bool = False) -> Any:
    policy = self.distribution(batch)
    other = CategoricalTeam(3 * torch.arange(4.0).expand_as(policy.log_probs), self.available(batch))
    return self.write_choice(batch, policy, policy.mode() if deterministic else other.sample())


def _twice_the_noise(self: Any, batch: Any, deterministic: bool = False) -> Any:
    policy = self.distribution(batch)
    action = policy.mode() if deterministic else policy.loc + 2 * (policy.sample() - policy.loc)
    return self.write_choice(batch, policy, action.detach())


mutant("plays what its distribution says", "explores outside of it", StochasticActor, options=SMALL, forward=_explores_outside)
mutant("plays what its distribution says", "twice the noise", StochasticActor, CONTINUOUS, SMALL, forward=_twice_the_noise)


def _mixes_rows(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    return StochasticActor.policy(self, outputs + batch[keys.OBSERVATION].mean() * torch.arange(4.0), batch, agents)


def _only_rows(self: Any, batch: Any, agents: Any = None) -> Any:
    assert batch.batch_dims == 1
    return StochasticActor.outputs(self, batch, agents)


mutant("gives rows the same in any batch", "mixes rows", StochasticActor, options=SMALL, policy=_mixes_rows)
mutant("gives rows the same in any batch", "knows one batch dimension", StochasticActor, options=SMALL, outputs=_only_rows)


def _attends(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    others = batch[keys.OBSERVATION].sum(-1, keepdim=True).mean(-2, keepdim=True)
    return StochasticActor.policy(self, outputs + others * torch.arange(4.0), batch, agents)


mutant("acts on what the agent itself sees", "attends to others", StochasticActor, options=SMALL, policy=_attends)
mutant(
    "acts on what the agent itself sees",
    "centralised, and silent about it",
    TransformerActor,
    options={"embedding": 4},
    contract=of(TransformerActor, traits=("stochastic", "autoregressive")),
)
mutant(
    "acts independently of what others choose",
    "autoregressive",
    TransformerActor,
    options={"embedding": 4},
    contract=of(TransformerActor, traits=("stochastic", "independent_agents", "centralised_execution")),
)


class OneDraw(CategoricalTeam):
    """All agents draw with the same random number."""

    def sample(self) -> Tensor:
        uniform = torch.rand(*self.log_probs.shape[:-2], 1, 1)
        return (self.log_probs.exp().cumsum(-1) < uniform).sum(-1).clamp(max=self.log_probs.shape[-1] - 1)


EQUAL = TeamSpec(3, 5, Discrete(4), team_reward=True)
mutant(
    "acts independently of what others choose",
    "draws together",
    StochasticActor,
    EQUAL,
    SMALL,
    policy=lambda self, outputs, batch, agents: OneDraw(outputs, self.available(batch, agents)),
)


class LaterActor(StochasticActor):
    """Its agents look at the actions of those after them.

    Args:
        spec: the team.
        options: those of the actor.
    """

    contract = of(StochasticActor, traits=("stochastic", "autoregressive", "centralised_execution"))

    def distribution(self, batch: Any, agents: Any = None) -> Any:
        outputs, _ = self.outputs(batch, agents)
        later = batch[keys.ACTION].roll(-1, -1).unsqueeze(-1).float()
        later = torch.cat([later[..., :-1, :], torch.zeros_like(later[..., -1:, :])], -2)
        return self.policy(outputs + later * torch.arange(outputs.shape[-1]), batch, agents)

    def forward(self, batch: Any, deterministic: bool = False) -> Any:
        batch.set(keys.ACTION, torch.zeros(*batch.batch_size, self.spec.n_agents, dtype=torch.int64))
        for agent in reversed(range(self.spec.n_agents)):
            policy = self.distribution(batch)
            chosen = policy.mode() if deterministic else policy.sample()
            batch[keys.ACTION][..., agent] = chosen[..., agent]
        return self.write_choice(batch, self.distribution(batch), batch[keys.ACTION])


mutant("depends on the actions of earlier agents only", "looks at later ones", LaterActor, EQUAL, SMALL)


def _fixed_deviation(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    policy: Any = StochasticActor.policy(self, outputs, batch, agents)
    return NormalTeam(policy.loc, policy.scale.detach(), policy.dims)


mutant("learns what it draws from", "its deviation is fixed", StochasticActor, CONTINUOUS, SMALL, policy=_fixed_deviation)
mutant(
    "passes gradient to its network",
    "detached",
    DeterministicActor,
    CONTINUOUS,
    SMALL,
    distribution=lambda self, batch, agents=None: _detached(DeterministicActor.distribution(self, batch, agents)),
)


def _detached(policy: Any) -> NormalTeam:
    return NormalTeam(policy.loc.detach(), policy.scale, policy.dims)


class SoftOneHot(CategoricalTeam):
    """Relaxes without taking one."""

    def rsample(self, temperature: float = 1.0) -> Tensor:
        return self.log_probs.exp()


class TeamEntropy(CategoricalTeam):
    """One entropy for the team."""

    def entropy(self) -> Tensor:
        return super().entropy().sum(-2, keepdim=True)


for _fault, _distribution in (("not one-hot", SoftOneHot), ("one entropy for all", TeamEntropy)):
    mutant(
        "gives a complete distribution",
        _fault,
        StochasticActor,
        options=SMALL,
        policy=lambda self, outputs, batch, agents, d=_distribution: d(outputs, self.available(batch, agents)),
    )

APART = of(StochasticActor, traits=("stochastic", "independent_agents", "separate_parameters"))
mutant("keeps agents apart", "claims it of a shared network", StochasticActor, options=SMALL, contract=APART)


def _all_of_them(self: Any, agents: Any) -> Any:
    return list(self.parameters())


mutant(
    "keeps agents apart",
    "gives every agent all",
    StochasticActor,
    options={**SMALL, "share": "none"},
    agent_parameters=_all_of_them,
)


def _common_scale(self: Any, spec: TeamSpec, **options: Any) -> None:
    StochasticActor.__init__(self, spec, **options)
    self.common = torch.nn.Parameter(torch.ones(()))


mutant(
    "keeps agents apart",
    "a parameter that all use",
    StochasticActor,
    options={**SMALL, "share": "none"},
    __init__=_common_scale,
    policy=lambda self, outputs, batch, agents: StochasticActor.policy(self, outputs * self.common, batch, agents),
)
mutant(
    "has the same policy of an agent alone",
    "another distribution alone",
    StochasticActor,
    options=SMALL,
    policy=lambda self, outputs, batch, agents: StochasticActor.policy(
        self, outputs * (2.0 if agents is not None and len(agents) == 1 else 1.0), batch, agents
    ),
)
mutant(
    "keeps agents apart",
    "shares what is another's",
    StochasticActor,
    options={**SMALL, "share": "none"},
    shared_parameters=lambda self, agent: list(self.agent_parameters([0])),
)
mutant(
    "keeps agents apart",
    "claims it of shared action values",
    EpsilonGreedyActor,
    options=SMALL,
    contract=of(EpsilonGreedyActor, traits=("greedy", "independent_agents", "separate_parameters")),
)

RULE = "prefers the action that it values most"
GREEDY = of(StochasticActor, traits=("stochastic", "independent_agents", "greedy"))
mutant(RULE, "claims it", StochasticActor, options=SMALL, contract=GREEDY)


def _writes_other_values(self: Any, outputs: Tensor, batch: Any, agents: Any) -> Any:
    policy = EpsilonGreedyActor.policy(self, outputs, batch, agents)
    batch.set(keys.ACTION_VALUES, -outputs)
    return policy


mutant(RULE, "writes other values", EpsilonGreedyActor, options=SMALL, policy=_writes_other_values)
mutant(
    RULE,
    "bootstraps with what explores",
    EpsilonGreedyActor,
    options=SMALL,
    bootstrap=lambda self, batch: self(batch, deterministic=False),
)

RULE = "gives actions with gradient"
mutant(
    RULE,
    "detached",
    DeterministicActor,
    options=SMALL,
    reparametrised=lambda self, batch: DeterministicActor.reparametrised(self, batch).detach(),
)
mutant(
    RULE,
    "not one-hot",
    DeterministicActor,
    options=SMALL,
    reparametrised=lambda self, batch: self.distribution(batch).log_probs.exp(),
)
mutant(RULE, "claims it", StochasticActor, CONTINUOUS, SMALL, contract=of(StochasticActor, traits=("reparametrised",)))
mutant(
    "chooses what values are bootstrapped with",
    "another log-probability",
    DeterministicActor,
    CONTINUOUS,
    SMALL,
    bootstrap=lambda self, batch: DeterministicActor.bootstrap(self, batch).set(keys.LOG_PROB, batch[keys.LOG_PROB] + 1),
)
mutant(
    "chooses what values are bootstrapped with",
    "writes the action alone",
    DeterministicActor,
    CONTINUOUS,
    SMALL,
    bootstrap=lambda self, batch: batch.set(keys.ACTION, self.distribution(batch).mode()),
)


def _without_encoding(self: Any, batch: Any, agents: Any = None) -> Any:
    return TransformerActor.distribution(self, batch.copy(), agents)


def _detached_encoding(self: Any, batch: Any, agents: Any = None) -> Any:
    policy = TransformerActor.distribution(self, batch, agents)
    batch.set(keys.ENCODING, batch[keys.ENCODING].detach())
    return policy


for _fault, _changed in (("does not", _without_encoding), ("detached", _detached_encoding)):
    mutant("renews keys with gradient", _fault, TransformerActor, options={"embedding": 4}, distribution=_changed)


def _replaces(self: Any, progress: float) -> None:
    self.exploration = torch.tensor(0.1 * (1 - progress) + 0.01)


def _in_attribute(self: Any, progress: float) -> None:
    self.temperature = 1.0 - 0.5 * progress


def _multiplies(self: Any, progress: float) -> None:
    self.exploration.mul_(0.9)


for _fault, _fading in (("replaces a buffer", _replaces), ("an attribute", _in_attribute), ("step by step", _multiplies)):
    mutant("fades in place", _fault, DeterministicActor, CONTINUOUS, SMALL, schedule=_fading)

GRU: dict[str, Any] = {"hidden": [4], "body": "gru"}
mutant(
    "starts what it carries",
    "starts from noise",
    StochasticActor,
    options=GRU,
    initial_state=lambda self, batch_size: {keys.HIDDEN: torch.ones(batch_size, 3, 4)},
)
mutant(
    "starts what it carries",
    "of another batch size",
    StochasticActor,
    options=GRU,
    initial_state=lambda self, batch_size: {keys.HIDDEN: torch.zeros(4 if batch_size == 3 else batch_size, 3, 4)},
)


def _never_resets(self: Any, batch: Any, agents: Any = None) -> Any:
    blind = batch.copy().set(keys.IS_FIRST, torch.zeros_like(batch[keys.IS_FIRST]))
    return StochasticActor.outputs(self, blind, agents)


def _forgets_sequences(self: Any, batch: Any, agents: Any = None) -> Any:
    if batch.batch_dims == 1:
        return StochasticActor.outputs(self, batch, agents)
    outputs, hidden = StochasticActor.outputs(self, batch.reshape(-1), agents)
    assert hidden is not None
    return outputs.unflatten(0, batch.batch_size), hidden.unflatten(0, batch.batch_size)


RULE = "sees sequences as it played them"
mutant(RULE, "remembers beyond an end", StochasticActor, options=GRU, outputs=_never_resets)
mutant(RULE, "reads every stored state", StochasticActor, options=GRU, outputs=_forgets_sequences)


# --- critics --------------------------------------------------------------------------------------------------------------

mutant(
    "predicts a key",
    "nothing",
    PlainCritic,
    options=SMALL,
    contract=of(PlainCritic, predicts=None),
    forward=lambda self, batch: batch.set(keys.STATE_VALUE, self.predict(batch)),
)
RULE = "writes what it predicts"
mutant(
    RULE,
    "in normalised units",
    PlainCritic,
    options=SMALL,
    forward=lambda self, batch: batch.set(keys.STATE_VALUE, self.predict(batch)),
)
mutant(
    RULE,
    "the largest of two",
    PlainCritic,
    options=SMALL,
    predictions=lambda self, batch: torch.stack([self.predict(batch), self.predict(batch) - 1]),
)
mutant(RULE, "no axis of networks", PlainCritic, options=SMALL, predictions=lambda self, batch: self.predict(batch))

mutant(
    "keeps its values with popart",
    "scales, and does not shift",
    PlainCritic,
    options=SMALL,
    rescale=lambda self, scale, shift: PlainCritic.rescale(self, scale, torch.zeros(())),
)
mutant(
    "keeps its values with popart", "forgets its last layer", PlainCritic, options=SMALL, rescale=lambda self, scale, shift: None
)

RULE = "does not see the own action"
READS_ACTION = of(PlainCritic, reads=(keys.OBSERVATION, keys.ACTION))


def _action_of(agent: int) -> Callable[[Any, Any], Tensor]:
    def expression(self: Any, batch: Any) -> Tensor:
        mine = torch.nn.functional.one_hot(torch.tensor(agent), self.spec.n_agents)
        return (batch[keys.ACTION] * mine).unsqueeze(-1).float()

    return expression


for _agent in range(3):
    mutant(
        RULE,
        f"agent {_agent} sees its action",
        PlainCritic,
        options=SMALL,
        contract=READS_ACTION,
        predict=_predict(_action_of(_agent)),
    )
mutant(
    RULE,
    "in its own view of the joint action",
    PlainCritic,
    options=SMALL,
    contract=of(PlainCritic, reads=(keys.OBSERVATION, keys.JOINT_ACTION)),
    predict=_predict(lambda self, batch: batch[keys.JOINT_ACTION].sum(-1).float().mean(-1)[..., None, None]),
)
mutant(
    RULE,
    "by its log-probability",
    PlainCritic,
    options=SMALL,
    contract=of(PlainCritic, reads=(keys.OBSERVATION, keys.LOG_PROB)),
    predict=_predict(lambda self, batch: batch[keys.LOG_PROB]),
)
mutant(
    RULE,
    "by the belief about itself",
    PlainCritic,
    CONTINUOUS,
    SMALL,
    contract=of(PlainCritic, reads=(keys.OBSERVATION, keys.OPPONENT_SCALE)),
    predict=_predict(lambda self, batch: batch[keys.OPPONENT_SCALE].mean((-3, -1)).unsqueeze(-1)),
)


mutant(
    "values each agent by what it sees",
    "in the next one's place",
    PlainCritic,
    options=SMALL,
    predict=lambda self, batch: PlainCritic.predict(self, batch).roll(1, -2),
)


def _rows_alone(self: Any, batch: Any) -> Tensor:
    assert batch.batch_dims == 1
    return self.network(batch[keys.OBSERVATION])


RULE = "values rows the same in any batch"
mutant(RULE, "knows one batch dimension", PlainCritic, options=SMALL, predict=_rows_alone)
mutant(
    RULE,
    "centres over the batch",
    PlainCritic,
    options=SMALL,
    predict=_predict(lambda self, batch: batch[keys.OBSERVATION].mean()),
)
mutant(
    "has predictions with gradient",
    "detached",
    PlainCritic,
    options=SMALL,
    predict=lambda self, batch: self.network(batch[keys.OBSERVATION]).detach(),
)
mutant(
    "has predictions with gradient",
    "the second of two detached",
    PlainCritic,
    options=SMALL,
    predictions=lambda self, batch: torch.stack([self.predict(batch), self.predict(batch).detach()]),
)
mutant(
    "has predictions with gradient",
    "detaches the encoding",
    TransformerCritic,
    options={"encoder": "actor"},
    _encoding=lambda self, batch: batch[keys.ENCODING].detach(),
)
CLAIMS = of(PlainCritic, traits=("separate_parameters",))
mutant("keeps values apart", "claims it of a shared network", PlainCritic, options=SMALL, contract=CLAIMS)
mutant(
    "keeps values apart", "gives every agent all", PlainCritic, options={**SMALL, "share": "none"}, agent_parameters=_all_of_them
)

RULE = "climbs the own action"
mutant(
    RULE,
    "detaches the own action",
    JointCritic,
    options=SMALL,
    action_value=lambda self, batch, own, joint: JointCritic.action_value(self, batch, own.detach(), joint),
)
mutant(
    RULE,
    "reads the joint action alone",
    JointCritic,
    options=SMALL,
    action_value=lambda self, batch, own, joint: JointCritic.action_value(
        self, batch, joint[..., 0, :, :] if joint.shape[-3] == 1 else joint.diagonal(dim1=-3, dim2=-2).movedim(-1, -2), joint
    ),
)


def _climbs_all(self: Any, batch: Any, own: Tensor, joint: Tensor) -> Tensor:
    return JointCritic.action_value(self, batch, own, joint) + (own - own.detach()).sum((-1, -2))[..., None, None]


mutant(RULE, "climbs others' too", JointCritic, options=SMALL, action_value=_climbs_all)
mutant(
    RULE,
    "claims it",
    PlainCritic,
    options=SMALL,
    contract=of(PlainCritic, reads=(keys.OBSERVATION, keys.ACTION, keys.JOINT_ACTION), traits=("differentiable_in_action",)),
)
RULE, ATTENTION = "values every own action", {"hidden": [4], "heads": 2}


def _takes_first(self: Any, batch: Any) -> Any:
    AttentionCritic.forward(self, batch)
    return batch.set(keys.ACTION_VALUE, batch[keys.ACTION_VALUES][..., :1])


mutant(
    RULE,
    "no axis of networks",
    AttentionCritic,
    options=ATTENTION,
    action_values=lambda self, batch: AttentionCritic.action_values(self, batch)[0],
    predictions=lambda self, batch: executed_value(AttentionCritic.action_values(self, batch), batch[keys.ACTION]),
    forward=lambda self, batch: _of_one(self, batch),
)


def _of_one(self: Any, batch: Any) -> Any:
    values = self.normaliser.denormalise(least(AttentionCritic.action_values(self, batch)))
    batch.set(keys.ACTION_VALUES, values).set(keys.ACTION_VALUE, executed_value(values, batch[keys.ACTION]))
    return batch.set(keys.STATE_VALUE, (values * batch[keys.LOGITS].softmax(-1)).sum(-1, keepdim=True))


def _shifted_table(self: Any, batch: Any) -> Any:
    AttentionCritic.forward(self, batch)
    return batch.set(keys.ACTION_VALUES, batch[keys.ACTION_VALUES] + 1)


mutant(RULE, "writes others than it has", AttentionCritic, options=ATTENTION, forward=_shifted_table)

RULE = "never falls where an action value rises"
TEAM = TeamSpec(3, 5, Discrete(4), state=7, team_reward=True)
MIXING: dict[str, Any] = {"mixing": "monotone", "embedding": 4, "hidden": [4]}


def _signed(self: Any, own: Tensor, state: Tensor) -> Tensor:
    """A mixture whose weights may be negative."""
    weight = self.networks["weight"](state.unsqueeze(-2)).unflatten(-1, (self.spec.n_agents, -1)).squeeze(-3)
    return (own * weight).sum((-2, -1), keepdim=True)


mutant(RULE, "weights of any sign", FactorisedCritic, TEAM, MIXING, _mixed=_signed)
mutant(
    RULE,
    "values the greedy action",
    FactorisedCritic,
    options={"mixing": "sum"},
    predict=lambda self, batch: batch[keys.ACTION_VALUES].amax(-1, keepdim=True),
)
mutant(
    RULE,
    "forgets an agent",
    FactorisedCritic,
    options={"mixing": "sum"},
    predict=lambda self, batch: executed_value(batch[keys.ACTION_VALUES], batch[keys.ACTION])[..., :1, :].expand(
        *batch.batch_size, 3, 1
    ),
)
mutant(
    RULE,
    "claims it",
    PlainCritic,
    options=SMALL,
    contract=of(PlainCritic, traits=("individual_global_max",)),
)


# --- estimators -----------------------------------------------------------------------------------------------------------


def _ignoring(*which: Any) -> Callable[[Any, Any], Any]:
    """GAE that sees no ends of this kind."""

    def forward(self: Any, batch: Any) -> Any:
        blind = batch.copy()
        for key in which:
            blind.set(key, torch.zeros_like(batch[key]))
        written = GaeEstimator.forward(self, blind)
        return batch.set(keys.ADVANTAGE, written[keys.ADVANTAGE]).set(keys.VALUE_TARGET, written[keys.VALUE_TARGET])

    return forward


def _takes_cuts_for_ends(self: Any, batch: Any) -> Any:
    written = GaeEstimator.forward(self, batch.copy().set(keys.TERMINATED, batch[keys.DONE]))
    return batch.set(keys.ADVANTAGE, written[keys.ADVANTAGE]).set(keys.VALUE_TARGET, written[keys.VALUE_TARGET])


def _with_gradient(self: Any, batch: Any) -> Any:
    target = batch[keys.REWARD] + 0.9 * batch[keys.following(keys.STATE_VALUE)] * ~batch[keys.TERMINATED].unsqueeze(-1)
    return batch.set(keys.VALUE_TARGET, target).set(keys.ADVANTAGE, target - batch[keys.STATE_VALUE])


def _changed_outputs(key: Any, change: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def forward(self: Any, batch: Any) -> Any:
        GaeEstimator.forward(self, batch)
        return batch.set(key, change(batch[key]))

    return forward


def _centres(self: Any, batch: Any) -> Any:
    GaeEstimator.forward(self, batch)
    return batch.set(keys.ADVANTAGE, batch[keys.ADVANTAGE] - batch[keys.ADVANTAGE].mean(0, keepdim=True))


mutant("gives no gradient", "of the next value", OneStepEstimator, forward=_with_gradient)
mutant("stops at the end of an episode", "sees none", GaeEstimator, forward=_ignoring(keys.DONE, keys.TERMINATED))
mutant(
    "stops at the end of an episode",
    "sees true ends only",
    GaeEstimator,
    forward=lambda self, batch: _ignoring(keys.DONE)(self, batch),
)
mutant("bootstraps a cut and no true end", "bootstraps both", GaeEstimator, forward=_ignoring(keys.TERMINATED))
mutant("bootstraps a cut and no true end", "bootstraps neither", GaeEstimator, forward=_takes_cuts_for_ends)
mutant("estimates each environment by itself", "centres over environments", GaeEstimator, forward=_centres)
mutant("pays for reward", "takes rewards for costs", GaeEstimator, forward=_changed_outputs(keys.ADVANTAGE, torch.neg))
mutant("pays for reward", "a target of zeros", GaeEstimator, forward=_changed_outputs(keys.VALUE_TARGET, torch.zeros_like))
mutant("takes steps in any order unless it needs a rollout", "sums over time", GaeEstimator, contract=of(GaeEstimator, needs={}))


# --- opponents ------------------------------------------------------------------------------------------------------------


def _loses_own(self: Any, batch: Any, played: bool = True) -> Any:
    TruePolicyOpponents.forward(self, batch, played)
    return batch.set(keys.JOINT_ACTION, batch[keys.JOINT_ACTION].roll(1, -1))


def _guesses(self: Any, batch: Any, played: bool = True) -> Any:
    TruePolicyOpponents.forward(self, batch, played)
    joint = batch[keys.ACTION].unsqueeze(-2).repeat_interleave(self.spec.n_agents, -2)
    own = torch.eye(self.spec.n_agents, dtype=torch.bool)
    return batch.set(keys.JOINT_ACTION, torch.where(own, joint, torch.full_like(joint, 0 if played else 9)))


def _imagines(self: Any, batch: Any, played: bool = True) -> Any:
    _guesses(self, batch, played)
    return TruePolicyOpponents.forward(self, batch, played) if played else batch


def _attached(self: Any, batch: Any, played: bool = True) -> Any:
    TruePolicyOpponents.forward(self, batch, played)
    return batch.set(keys.OPPONENT_LOGITS, batch[keys.LOGITS].unsqueeze(batch.batch_dims))


def _one_seed(self: Any, batch: Any, played: bool = True) -> Any:
    TruePolicyOpponents.forward(self, batch, played)
    return batch.set(keys.SAMPLE_SEED, torch.full_like(batch[keys.SAMPLE_SEED], 7))


def _mixes_beliefs(self: Any, batch: Any, played: bool = True) -> Any:
    TruePolicyOpponents.forward(self, batch, played)
    if keys.OPPONENT_LOGITS not in (self.writes if self.wanted is None else self.wanted):
        return batch
    return batch.set(keys.OPPONENT_LOGITS, batch[keys.OPPONENT_LOGITS] * batch[keys.ACTION].float().mean())


def _uniform(self: Any, batch: Any, played: bool = True) -> Any:
    TruePolicyOpponents.forward(self, batch, played)
    wanted = self.writes if self.wanted is None else self.wanted
    return batch.set(keys.OPPONENT_LOGITS, batch[keys.OPPONENT_LOGITS] * 0.5) if keys.OPPONENT_LOGITS in wanted else batch


TRUE = TruePolicyOpponents
mutant("keeps the own action", "in another place", TRUE, forward=_loses_own)
mutant("keeps the own action", "guesses what was played", TRUE, forward=_guesses)
mutant("imagines available actions", "actions that are not there", TRUE, forward=_imagines)
mutant("writes beliefs without gradient", "the policy's", TRUE, forward=_attached)
mutant("seeds samples with whole numbers", "one for all", TRUE, forward=_one_seed)
mutant("believes rows the same in any batch", "mixes rows", TRUE, forward=_mixes_beliefs, contract=of(TRUE, traits=()))
mutant("writes what is wanted from what it asks for", "asks for too little", TRUE, reads_for=lambda self, beliefs: ())
mutant(
    "writes what is wanted from what it asks for",
    "asks where nothing is wanted",
    TRUE,
    reads_for=lambda self, beliefs: (keys.ACTION,),
)
mutant("believes what the policies are", "others", TRUE, forward=_uniform)
MIND: dict[str, Any] = {
    "memory": 2,
    "memory_layers": 1,
    "hidden": [4],
    "characters": 2,
    "character_length": 3,
    "recent": 8,
    "fit_rows": 8,
}


def _no_history(self: Any, spec: TeamSpec, **options: Any) -> None:
    TheoryOfMindOpponents.__init__(self, spec, **options)
    self.history = 0


def _trains_critic(self: Any, batch: Any, learning: Any) -> Any:
    metrics = TheoryOfMindOpponents.fit(self, batch, learning)
    with torch.no_grad():
        for parameter in learning.critic.parameters():
            parameter.add_(0.1)
    return metrics


def _sees_all_alive(self: Any, rows: Any) -> Tensor:
    return torch.ones_like(rows[keys.ALIVE]).unsqueeze(1) * self.pairs


def _unsaved_character(self: Any, spec: TeamSpec, **options: Any) -> None:
    TheoryOfMindOpponents.__init__(self, spec, **options)
    self.register_buffer("character", self._buffers.pop("character"), persistent=False)


MODEL = TheoryOfMindOpponents
mutant("asks for the past that it reads", "no history", MODEL, options=MIND, __init__=_no_history)
mutant("trains itself alone", "the critic too", MODEL, options=MIND, fit=_trains_critic)
mutant("trains itself alone", "not at all", MODEL, options=MIND, fit=lambda self, batch, learning: {})
mutant("learns nothing from dead agents", "takes all for alive", MODEL, options=MIND, _weight=_sees_all_alive)
mutant("believes on from its state", "characters that are not saved", MODEL, options=MIND, __init__=_unsaved_character)


# --- targets --------------------------------------------------------------------------------------------------------------


def _other_critic(self: Any) -> Any:
    return JointCritic(DISCRETE, hidden=[4])


def _half(self: Any, actor: Any, critic: Any) -> None:
    SoftTargets.track(self, actor, critic)
    for parameter in self.copies.critic.parameters():
        parameter.data.mul_(0.5)


def _with_grad(self: Any, actor: Any, critic: Any) -> None:
    SoftTargets.track(self, actor, critic)
    self.copies.requires_grad_(True)


def _parameters_only(self: Any, name: str) -> Any:
    places = [place for place in self._places[name] if isinstance(getattr(place[0], place[2]), torch.nn.Parameter)]
    return [getattr(copied, own) for copied, _, own in places], [getattr(online, own) for _, online, own in places]


def _loses_what_is_put_off(self: Any, name: str, afterwards: Any) -> None:
    if afterwards is at_once:
        self._count(name)


LAGS = of(OnlineTargets, traits=("lagging",))
mutant("starts from the networks", "another class", SoftTargets, critic=_other_critic)
mutant("starts from the networks", "other parameters", SoftTargets, track=_half)
mutant(
    "chooses with what it knows",
    "another copy chooses",
    SoftTargets,
    chooser=lambda self: copy.deepcopy(self._online["actor"]),
)
mutant("bootstraps with what learns", "lags in silence", SoftTargets, contract=of(SoftTargets, traits=()))
mutant("keeps copies of its own", "claims to lag", OnlineTargets, contract=LAGS)
mutant("keeps copies of its own", "copies with gradient", SoftTargets, track=_with_grad)
mutant("follows what changed", "stays where it is", SoftTargets, approach=lambda self, name, afterwards: None)
mutant(
    "follows what changed",
    "moves all",
    SoftTargets,
    follow=lambda self, changed, afterwards=None: SoftTargets.follow(self, ["actor", "critic"]),
)
mutant("follows what changed", "leaves buffers behind", SoftTargets, tensors=_parameters_only)
mutant("puts python off", "loses what is put off", HardTargets, options={"interval": 30}, approach=_loses_what_is_put_off)
mutant(
    "follows on from its state",
    "does not save its count",
    HardTargets,
    options={"interval": 30},
    get_extra_state=lambda self: dict.fromkeys(self.steps, 0),
)


# --- data -----------------------------------------------------------------------------------------------------------------


def _stores_current(self: Any, env: Any, actor: Any, run_step: Any = None) -> Any:
    batch = RolloutData.collect(self, env, actor)
    done = batch[keys.DONE].unsqueeze(-1)
    after = keys.following(keys.OBSERVATION)
    return batch.set(after, torch.where(done, torch.zeros_like(batch[after]), batch[after]))


def _starts_anew(self: Any, env: Any, actor: Any, run_step: Any = None) -> Any:
    self._current = None
    return RolloutData.collect(self, env, actor)


def _forgets_hidden(self: Any, env: Any, actor: Any, run_step: Any = None) -> Any:
    if self._current is not None:
        self._current = self._current.copy().set(keys.HIDDEN, torch.zeros_like(self._current[keys.HIDDEN]))
    return RolloutData.collect(self, env, actor)


def _shuffled_rewards(self: Any, played: Any, actor: Any) -> Any:
    for batch in ReplayData.batches(self, played, actor):
        yield batch.set(keys.REWARD, batch[keys.REWARD].roll(1, 0))


def _yields_twice(self: Any, played: Any, actor: Any) -> Any:
    yield played
    yield played


def _wrong_past(self: Any, batch: Any, steps: Any) -> None:
    RolloutData._show_past(self, batch, steps)
    batch.set(keys.RECENT_VALID, torch.ones_like(batch[keys.RECENT_VALID]))


RULE = "stores what happened"
mutant(RULE, "what came after a reset", RolloutData, collect=_stores_current)
mutant(
    RULE,
    "less than it played",
    RolloutData,
    collect=lambda self, env, actor, run_step=None: RolloutData.collect(self, env, actor)[:, 1:],
)
mutant("goes on where it stopped", "starts anew", RolloutData, collect=_starts_anew)
mutant("carries what the actor remembers", "forgets between iterations", RolloutData, collect=_forgets_hidden)
mutant("gives batches of what was played", "rewards of other steps", ReplayData, batches=_shuffled_rewards)


def _one_step_only(self: Any, played: Any, actor: Any) -> Any:
    for batch in ReplayData.batches(self, played, actor):
        yield batch[:1].expand(batch.batch_size).clone()


mutant("gives batches of what was played", "one step again and again", ReplayData, batches=_one_step_only)
mutant("gives what was just played", "twice", RolloutData, batches=_yields_twice)
mutant("gives what was just played", "claims it", ReplayData, contract=of(ReplayData, traits=("on_policy",)))
mutant("shows the recent past", "takes all for valid", RolloutData, _show_past=_wrong_past)
mutant("shows what was played from", "the actor's, of a uniform choice", UniformPlayData, behaviour=RolloutData.behaviour)
mutant("shows what was played from", "keeps nothing of it", RolloutData, behaviour_read=lambda self: [])
mutant(
    "plays on from its state", "an empty state", ReplayData, state_dict=lambda self: {}, load_state_dict=lambda self, state: None
)
mutant("plays on from its state", "no plain data", RolloutData, state_dict=lambda self: {"current": self._current})


def _refuses_what_is_not_there(self: Any, envs: int, iterations: int, sequence_length: int | None) -> None:
    if sequence_length is not None:
        raise OptionError("length", "is not there")


mutant("refuses by naming an option", "another", RolloutData, refuse_unfit=_refuses_what_is_not_there)


# --- updates --------------------------------------------------------------------------------------------------------------


def _raises(self: Any, batch: Any, learning: Any) -> Any:
    raise NotImplementedError("not written yet")


def _around(
    before: Callable[[Any, Any], Any] | None = None, after: Callable[[Any, Any], Any] | None = None, **metrics: Any
) -> Any:
    """PPO with something done before or after it, and other metrics."""

    def update(self: Any, batch: Any, learning: Any) -> Any:
        if before is not None:
            before(batch, learning)
        found = PpoClipUpdate.update(self, batch, learning)
        if after is not None:
            after(batch, learning)
        return found | {name.replace("__", "/"): value for name, value in metrics.items()}

    return update


@torch.no_grad()
def _by_itself(batch: Any, learning: Any) -> None:
    for parameter in learning.actor.parameters():
        parameter.mul_(0.99)


def _weightless(self: Any, batch: Any, learning: Any) -> Any:
    frozen = batch.copy().set(keys.ADVANTAGE, torch.zeros_like(batch[keys.ADVANTAGE]))
    return PpoClipUpdate.update(self, frozen, learning)


PPO: dict[str, Any] = {"epochs": 1}
mutant("updates from what it declares", "only raises", PpoClipUpdate, update=_raises)
mutant(
    "updates from what it declares",
    "a key that it does not declare",
    PpoClipUpdate,
    options=PPO,
    update=_around(before=lambda batch, learning: batch[keys.RECENT_VALID]),
)
mutant(
    "changes actor and critic",
    "does nothing",
    PpoClipUpdate,
    update=lambda self, batch, learning: {"actor/loss": torch.zeros(())},
)
mutant(
    "changes actor and critic",
    "the critic alone",
    PpoClipUpdate,
    options={**PPO, "entropy_coef": 0.0, "normalise_advantage": False},
    update=_weightless,
)
mutant("says what it changes", "moves the actor by itself", PpoClipUpdate, options=PPO, update=_around(after=_by_itself))
mutant(
    "changes by gradient only",
    "claims it",
    TrustRegionUpdate,
    options=PPO,
    contract=of(TrustRegionUpdate, traits=("per_agent", "by_gradient", "on_policy")),
)
RULE = "returns metrics to log"
mutant(RULE, "a number", PpoClipUpdate, options=PPO, update=_around(actor__clip=0.5))
mutant(RULE, "NaN", PpoClipUpdate, options=PPO, update=_around(actor__clip=torch.tensor(float("nan"))))
mutant(RULE, "with gradient", PpoClipUpdate, options=PPO, update=_around(actor__clip=torch.ones((), requires_grad=True)))
mutant(RULE, "without a component", PpoClipUpdate, options=PPO, update=_around(loss=torch.zeros(())))
mutant(
    "leaves the batch as it is",
    "normalises in place",
    PpoClipUpdate,
    options=PPO,
    update=_around(before=lambda batch, learning: batch[keys.ADVANTAGE].sub_(batch[keys.ADVANTAGE].mean())),
)
mutant(
    "fits the critic to the value target",
    "climbs",
    PpoClipUpdate,
    options=PPO,
    value_loss=lambda self, rows, learning: (-PpoClipUpdate.value_loss(self, rows, learning)[0], {}),
)


def _with_advantages(change: Callable[[Tensor], Tensor]) -> Any:
    """PPO with other advantages."""

    def update(self: Any, batch: Any, learning: Any) -> Any:
        return PpoClipUpdate.update(self, batch.copy().set(keys.ADVANTAGE, change(batch[keys.ADVANTAGE])), learning)

    return update


RULE = "makes likelier what has an advantage"
mutant(RULE, "descends", PpoClipUpdate, options=PPO, update=_with_advantages(torch.neg))
mutant(
    RULE,
    "the first agent's for all",
    PpoClipUpdate,
    options=PPO,
    update=_with_advantages(lambda found: found[..., :1, :].expand_as(found).clone()),
)
mutant(
    RULE,
    "trains the first agent alone",
    PpoClipUpdate,
    options=PPO,
    update=_with_advantages(lambda found: found * torch.tensor([[1.0], [0.0], [0.0]])),
)
mutant(
    "gives dead agents no say in the policy",
    "takes all for alive",
    PpoClipUpdate,
    options=PPO,
    prepare=lambda self, batch, learning: PpoClipUpdate.prepare(
        self, batch.copy().set(keys.ALIVE, torch.ones_like(batch[keys.ALIVE])), learning
    ),
)
mutant(
    "gives dead agents no say in the policy",
    "in the advantages' mean",
    PpoClipUpdate,
    options={**PPO, "normalise_advantage": False},
    prepare=lambda self, batch, learning: PpoClipUpdate.prepare(
        self, batch.copy().set(keys.ADVANTAGE, batch[keys.ADVANTAGE] - batch[keys.ADVANTAGE].mean()), learning
    ),
)


def _counted(self: Any, batch: Any, learning: Any) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    scaled = batch.copy().set(keys.ADVANTAGE, batch[keys.ADVANTAGE] * self.calls)
    return PolicyGradientUpdate.update(self, scaled, learning)


mutant("goes on from its state", "counts in an attribute", PolicyGradientUpdate, update=_counted)


def _one_pass(self: Any, name: Any, batch: Any, learning: Any, loss: Any, epochs: int, minibatch_size: int | None) -> Any:
    return PpoClipUpdate.fit(self, name, batch, learning, loss, 1, minibatch_size)


mutant("takes several epochs", "one pass", PpoClipUpdate, fit=_one_pass)
mutant(
    "needs what was just played",
    "does not need it",
    PpoClipUpdate,
    options=PPO,
    contract=of(PpoClipUpdate, needs={"actor": ("stochastic",)}),
)
mutant(
    "updates one agent at a time",
    "all at once",
    PpoClipUpdate,
    options=PPO,
    fit_policy=lambda self, batch, learning, agents: PpoClipUpdate.fit_policy(self, batch, learning, range(3)),
)


# --- optimisers and trainers ----------------------------------------------------------------------------------------------


def _leaves_out(self: Any, parameters: Any) -> Any:
    return torch.optim.Adam(self.groups({name: own for name, own in parameters.items() if name != "critic"}))


def _one_group(self: Any, parameters: Any) -> Any:
    return torch.optim.Adam([p for own in parameters.values() for p in own], lr=self.lr)


def _ignores_critic_lr(self: Any, parameters: Any) -> Any:
    groups = self.groups(parameters)
    return torch.optim.Adam([{"params": group["params"], "lr": self.lr, "initial_lr": self.lr} for group in groups])


class Decaying(torch.optim.SGD):
    """Shrinks all parameters, those without gradient too."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)


class Counting(torch.optim.SGD):
    """Keeps its count of steps to itself."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in (p for p in group["params"] if p.grad is not None):
                    parameter.sub_(0.01 / self.steps * parameter.grad)


RATES: dict[str, Any] = {"lr": 0.01, "critic_lr": 0.02, "lr_end": 0.5}
mutant("holds every parameter once", "leaves out the critic", AdamOptimizer, build=_leaves_out)
mutant("holds every parameter once", "one group", AdamOptimizer, build=_one_group)
mutant("changes rates as it says", "the critic's is ignored", AdamOptimizer, options=RATES, build=_ignores_critic_lr)
mutant(
    "changes rates as it says", "does not anneal", AdamOptimizer, options=RATES, schedule=lambda self, optimizer, progress: None
)
mutant(
    "descends where there is a gradient",
    "decays all",
    AdamOptimizer,
    build=lambda self, parameters: Decaying(self.groups(parameters), lr=0.1),
)
mutant(
    "descends where there is a gradient",
    "climbs",
    AdamOptimizer,
    build=lambda self, parameters: torch.optim.Adam(self.groups(parameters), maximize=True),
)
mutant(
    "steps on from its state",
    "a count of its own",
    AdamOptimizer,
    build=lambda self, parameters: Counting(self.groups(parameters), lr=0.1),
)


def _forgets_options(self: Any, spec: TeamSpec, *, iterations: PositiveInt = 100) -> None:
    self.spec = spec


mutant("keeps its options", "forgets one", LightningTrainer, __init__=_forgets_options)
