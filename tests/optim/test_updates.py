"""The updates at work on a real actor: gradients, masks, minibatches, the order of sequential updates, schedules."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, fit, learner_of, random_script
from stepping import CONTINUOUS, DISCRETE, B, Descent, N, T, batch_of, changed, learning, log_probs, snapshot
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.batches import minibatches, units
from marlkit.component import Actor, Critic, Runtime, Update
from marlkit.contract import Contract
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.local import LocalCritic
from marlkit.data.rollout import RolloutData
from marlkit.envs.product_game import ProductGameEnvironment
from marlkit.errors import OptionError
from marlkit.learning import Learning, Metrics
from marlkit.nn.distributions import TeamDistribution
from marlkit.nn.networks import TeamLinear
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.optim._actor_critic import ActorCriticUpdate
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.optim.sequential import SequentialUpdate
from marlkit.optim.trust_region import TrustRegionUpdate
from marlkit.spec import TeamSpec

SPECS = [pytest.param(DISCRETE, id="discrete"), pytest.param(CONTINUOUS, id="continuous")]
STEPS: list[tuple[type[Update], dict[str, Any]]] = [
    (PpoClipUpdate, {"epochs": 3, "entropy_coef": 0.1}),
    (PolicyGradientUpdate, {"epochs": 2, "entropy_coef": 0.1}),
    (TrustRegionUpdate, {"epochs": 3}),
]
EVERY_STEP = [pytest.param(cls, options, id=cls.__name__) for cls, options in STEPS]


# --- PPO ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("share", ["all", "none"])
@pytest.mark.parametrize("cls", [PpoClipUpdate, PolicyGradientUpdate])
def test_first_gradient_is_the_policy_gradient(spec: TeamSpec, share: Any, cls: type[Update]) -> None:
    """PPO-1: at the policy that collected, the ratio is 1 and the clip has no effect."""
    actor = StochasticActor(spec, hidden=[7], share=share, output_gain=1.0)
    batch = batch_of(actor).apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    actor.double()
    batch.set(keys.LOG_PROB, log_probs(actor, batch).detach().unsqueeze(-1))
    step = cls(spec, epochs=1, entropy_coef=0.0, value_coef=0.0, normalise_advantage=False, max_grad_norm=None)
    descent = Descent(actor)
    step.update(batch, learning(actor, CentralisedCritic(spec, hidden=[4]).double(), descent))
    alive, advantage = batch[keys.ALIVE][..., 0], batch[keys.ADVANTAGE][..., 0]
    gain = (log_probs(actor, batch) * advantage)[alive].sum() / alive.sum()
    expected = torch.autograd.grad(gain, list(actor.parameters()))
    for got, wanted in zip(descent.gradients[0], expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got, -wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_gradient_where_the_ratio_has_gained_enough(sign: float) -> None:
    actor = StochasticActor(DISCRETE, hidden=[7])
    batch = batch_of(actor)
    batch.set(keys.ADVANTAGE, torch.full_like(batch[keys.ADVANTAGE], sign))
    # The policy seems to have moved by a ratio of 1.3 where that is a gain for one half, and by nothing for the other half.
    moved = torch.rand(B, T, N, 1) < 0.5
    batch.set(keys.LOG_PROB, batch[keys.LOG_PROB] - sign * math.log(1.3) * moved)
    step = PpoClipUpdate(DISCRETE, epochs=1, entropy_coef=0.0, value_coef=0.0, normalise_advantage=False)
    descent = Descent(actor)
    step.update(batch, learning(actor, CentralisedCritic(DISCRETE, hidden=[4]), descent))
    alive = batch[keys.ALIVE][..., 0]
    counted = alive & ~moved[..., 0]
    expected = torch.autograd.grad(-sign * log_probs(actor, batch)[counted].sum() / alive.sum(), list(actor.parameters()))
    for got, wanted in zip(descent.gradients[0], expected, strict=True):
        assert got is not None
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def dead_entries_changed(batch: TensorDict) -> TensorDict:
    """The same batch with other things where agents are not alive, impossible ones included."""
    dead = ~batch[keys.ALIVE]
    other = batch.clone()
    other.set(keys.OBSERVATION, torch.where(dead, 100 * torch.randn_like(batch[keys.OBSERVATION]), batch[keys.OBSERVATION]))
    if batch[keys.ACTION].is_floating_point():
        other.set(keys.ACTION, torch.where(dead, batch[keys.ACTION] + 5, batch[keys.ACTION]))
    else:
        other.set(keys.ACTION, torch.where(dead[..., 0], (batch[keys.ACTION] + 1) % 2, batch[keys.ACTION]))
    other.set(keys.LOG_PROB, batch[keys.LOG_PROB].masked_fill(dead, -math.inf))
    other.set(keys.ADVANTAGE, batch[keys.ADVANTAGE].masked_fill(dead, math.nan))
    return other


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("minibatch_size", [None, 7])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("cls", "options"), EVERY_STEP)
def test_what_dead_agents_saw_and_did_changes_no_parameter(
    spec: TeamSpec, minibatch_size: int | None, sequential: bool, cls: type[Update], options: dict[str, Any]
) -> None:
    """MASK-1, through the whole update."""
    step = cls(spec, minibatch_size=minibatch_size, **options)
    update = SequentialUpdate(spec, step=step) if sequential else step
    ended = []
    for change in (lambda batch: batch, dead_entries_changed):
        torch.manual_seed(1)
        actor = StochasticActor(spec, hidden=[7], share="none" if sequential else "all", output_gain=1.0)
        critic = CentralisedCritic(spec, hidden=[4])
        start = snapshot(actor, critic)
        batch = change(batch_of(actor))
        torch.manual_seed(2)
        metrics = update.update(batch, learning(actor, critic, Descent(nn.ModuleList([actor, critic]), lr=0.01)))
        assert len(changed(start, actor, critic)) == len(start)
        ended.append((snapshot(actor, critic), metrics))
    (first, metrics), (second, others) = ended
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name, value in metrics.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("cls", [PpoClipUpdate, PolicyGradientUpdate])
def test_what_alive_agents_saw_does_change_the_parameters(cls: type[Update]) -> None:
    actor = StochasticActor(DISCRETE, hidden=[7])
    batch = batch_of(actor)
    losses = []
    for alive in (True, False):
        mask = batch[keys.ALIVE] if alive else ~batch[keys.ALIVE]
        changed_batch = batch.clone().set(keys.ADVANTAGE, torch.where(mask, 2 * batch[keys.ADVANTAGE], batch[keys.ADVANTAGE]))
        descent = Descent(actor)
        step = cls(DISCRETE, epochs=1, normalise_advantage=False)
        step.update(changed_batch, learning(actor, CentralisedCritic(DISCRETE, hidden=[4]), descent))
        losses.append(torch.cat([g.flatten() for g in descent.gradients[0] if g is not None]))
    assert not torch.allclose(losses[0], losses[1])


@pytest.mark.parametrize("share", ["all", "none"])
@pytest.mark.parametrize("value_norm", [True, "popart"])
@pytest.mark.parametrize(("cls", "options"), EVERY_STEP)
def test_values_of_dead_agents_are_left_out_on_request(
    cls: type[Update], options: dict[str, Any], share: Any, value_norm: Any
) -> None:
    """MASK-1 for the critic: no target of an agent that is not alive reaches a parameter or a statistic, whatever it is."""
    ended = []
    for value in (0.0, 1e6, math.nan):
        torch.manual_seed(1)
        actor, critic = (
            StochasticActor(DISCRETE, hidden=[7]),
            LocalCritic(DISCRETE, hidden=[4], share=share, value_norm=value_norm),
        )
        batch = batch_of(actor)
        batch[keys.ALIVE][:, 0] = False
        for key in (keys.VALUE_TARGET, keys.STATE_VALUE):
            batch.set(key, batch[key].masked_fill(~batch[keys.ALIVE], value))
        update = cls(DISCRETE, **options, valued_agents="alive", minibatch_size=6)
        torch.manual_seed(2)
        metrics = update.update(batch, learning(actor, critic, Descent(nn.ModuleList([actor, critic]), lr=0.01)))
        ended.append((snapshot(critic), metrics))
    for found, metrics in ended[1:]:
        for name, tensor in ended[0][0].items():
            assert torch.equal(tensor, found[name]), name
        assert all(torch.equal(metrics[name], tensor) for name, tensor in ended[0][1].items())


def test_the_loss_of_the_values_of_those_alive_by_hand() -> None:
    """The critic says 0; the targets of those alive are 1 and 3, in units of their mean 2 and deviation 1: -1 and 1."""
    actor, critic = StochasticActor(DISCRETE, hidden=[4]), ConstantCritic(DISCRETE)
    critic.normaliser = ValueNormaliser(enabled=True)
    batch = batch_of(actor)
    batch.set(keys.ALIVE, torch.zeros(B, T, N, 1, dtype=torch.bool))
    batch[keys.ALIVE][0, :2, 1] = True
    batch.set(keys.VALUE_TARGET, torch.full((B, T, N, 1), 50.0))
    batch[keys.VALUE_TARGET][0, 0, 1], batch[keys.VALUE_TARGET][0, 1, 1] = 1.0, 3.0
    step = PpoClipUpdate(DISCRETE, epochs=1, value_clip=None, valued_agents="alive")
    descent = Descent(critic)
    learn = learning(actor, critic, descent)
    step.fit_critic(step.prepare(batch, learn), learn)
    assert descent.losses == pytest.approx([0.5], abs=1e-4)


def test_a_clip_by_dimension_is_the_sum_over_the_dimensions_that_agents_have() -> None:
    """By loops: each dimension has a ratio and a clip of its own, and agents count alike, whatever they have of dimensions."""
    torch.manual_seed(0)
    actor = StochasticActor(CONTINUOUS, hidden=[7], output_gain=1.0).double()
    batch = batch_of(StochasticActor(CONTINUOUS, hidden=[7], output_gain=1.0))
    batch = batch.apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    step = PpoClipUpdate(CONTINUOUS, epochs=1, entropy_coef=0.0, value_coef=0.0, normalise_advantage=False, ratio="dimension")
    descent = Descent(actor)
    step.update(batch, learning(actor, CentralisedCritic(CONTINUOUS, hidden=[4]).double(), descent))
    outputs = actor.network(batch[keys.OBSERVATION])
    deviation = torch.stack([actor.log_deviation[group] for group in actor.groups]).exp()
    total, alive, clipped = torch.zeros(()).double(), 0, 0
    for b, t, i in itertools.product(range(B), range(T), range(N)):
        alive += int(batch[keys.ALIVE][b, t, i])
        for d in range((2, 2, 1)[i]) if batch[keys.ALIVE][b, t, i] else ():
            x, advantage = batch[keys.ACTION][b, t, i, d], batch[keys.ADVANTAGE][b, t, i, 0]
            now = (-0.5 * ((x - outputs[b, t, i, d]) / deviation[i, d]) ** 2).exp() / deviation[i, d]
            then = (-0.5 * ((x - batch[keys.LOC][b, t, i, d]) / batch[keys.SCALE][b, t, i, d]) ** 2).exp() / batch[keys.SCALE][
                b, t, i, d
            ]
            ratio = now / then
            clipped += int(not 0.8 < ratio < 1.2)
            total = total + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    assert clipped > 5
    assert descent.losses[0] == pytest.approx(-(total / alive).item(), abs=1e-10)
    for got, wanted in zip(descent.gradients[0], torch.autograd.grad(-total / alive, list(actor.parameters())), strict=True):
        assert got is not None
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_where_actions_have_one_dimension_a_clip_by_dimension_is_that_of_the_agent() -> None:
    found = []
    for ratio in ("agent", "dimension"):
        actor = StochasticActor(DISCRETE, hidden=[7])
        torch.manual_seed(3)
        for parameter in actor.parameters():
            parameter.data.normal_()
        descent = Descent(actor, lr=0.1)
        step = PpoClipUpdate(DISCRETE, epochs=3, ratio=ratio)
        step.update(batch_of(actor), learning(actor, CentralisedCritic(DISCRETE, hidden=[4]), descent))
        found.append(descent.losses)
    assert step.reads == PpoClipUpdate(DISCRETE).reads
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("cls", [PpoClipUpdate, PolicyGradientUpdate])
def test_the_critic_learns_the_teams_return_of_dead_agents_too(cls: type[Update]) -> None:
    """B0.3: the value target of an agent that is not alive stays the team's return."""
    actor = StochasticActor(DISCRETE, hidden=[7])
    batch = batch_of(actor)
    gradients = []
    for alive in (True, False):
        batch.set(keys.ALIVE, torch.full_like(batch[keys.ALIVE], alive))
        torch.manual_seed(1)
        critic = LocalCritic(DISCRETE, hidden=[4])
        descent = Descent(nn.ModuleList([actor, critic]))
        cls(DISCRETE, epochs=1).update(batch, learning(actor, critic, descent))
        found = [gradient for gradient in descent.gradients[0] if gradient is not None]
        count = len(list(actor.parameters()))
        assert any(gradient.any() for gradient in found[:count]) == alive
        gradients.append(found[count:])
    for first, second in zip(*gradients, strict=True):
        assert first.any()
        assert torch.equal(first, second)


# --- minibatches ----------------------------------------------------------------------------------------------------------


class WatchedActor(StochasticActor):
    """Remembers the first feature of every agent that it was evaluated on."""

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        self.seen.append(batch[keys.OBSERVATION][..., 0, 0].clone())
        return super().distribution(batch, agents)

    seen: list[Tensor]


@pytest.mark.parametrize(("size", "counts"), [(None, [24]), (24, [24]), (10, [10, 10, 4]), (1, [1] * 24)])
@pytest.mark.parametrize("cls", [PpoClipUpdate, PolicyGradientUpdate])
def test_every_epoch_sees_every_step_once(size: int | None, counts: list[int], cls: type[Update]) -> None:
    torch.manual_seed(0)
    actor = WatchedActor(DISCRETE, hidden=[4])
    batch = batch_of(actor)
    actor.seen = []
    number = torch.arange(B * T).view(B, T)
    batch[keys.OBSERVATION][..., 0, 0] = number.float()
    step = cls(DISCRETE, epochs=3, minibatch_size=size)
    step.update(batch, learning(actor, CentralisedCritic(DISCRETE, hidden=[4]), Descent(actor)))
    assert [len(rows) for rows in actor.seen] == counts * 3
    epochs = torch.cat(actor.seen).view(3, -1).int().tolist()
    for seen in epochs:
        assert sorted(seen) == list(range(B * T))
    if size is not None and size < B * T:
        assert epochs[0] != epochs[1] != epochs[2], "every epoch is shuffled again"


@pytest.mark.parametrize("cls", [PpoClipUpdate, PolicyGradientUpdate, TrustRegionUpdate])
def test_the_critic_can_take_a_step_for_each_time_step_before_the_policys(cls: type[ActorCriticUpdate]) -> None:
    torch.manual_seed(0)
    actor, critic = StochasticActor(DISCRETE, hidden=[4]), CentralisedCritic(DISCRETE, hidden=[4])
    descent = Descent(nn.ModuleList([actor, critic]), lr=0.01)
    count = len(list(actor.parameters()))
    step = cls(DISCRETE, epochs=2, minibatch_size=12, critic_epochs=3)
    step.update(batch_of(actor), learning(actor, critic, descent))
    of_policy = [any(gradient is not None for gradient in found[:count]) for found in descent.gradients]
    of_critic = [any(gradient is not None for gradient in found[count:]) for found in descent.gradients]
    policy_steps = 0 if cls is TrustRegionUpdate else 2 * 2
    assert of_critic == [True] * 3 * T + [False] * policy_steps
    assert of_policy == [False] * 3 * T + [True] * policy_steps


@pytest.mark.parametrize(("critic_epochs", "steps"), [(3, 3 * T), (None, 2 * 2)])
def test_a_critic_that_is_fitted_alone_takes_the_policys_passes_by_default(critic_epochs: int | None, steps: int) -> None:
    actor, critic = StochasticActor(DISCRETE, hidden=[4]), CentralisedCritic(DISCRETE, hidden=[4])
    descent = Descent(nn.ModuleList([actor, critic]))
    step = TrustRegionUpdate(DISCRETE, epochs=2, minibatch_size=12, critic_epochs=critic_epochs)
    step.update(batch_of(actor), learning(actor, critic, descent))
    assert len(descent.losses) == steps


def test_sequences_stay_whole_and_in_order() -> None:
    torch.manual_seed(0)
    batch = TensorDict({"number": torch.arange(B * T).view(B, T)}, batch_size=[B, T])
    rows = units(batch, 3)
    found = [sequence.tolist() for minibatch in minibatches(rows, 7) for sequence in minibatch["number"]]
    assert sorted(found) == [[start, start + 1, start + 2] for start in range(0, B * T, 3)]
    assert [len(minibatch) for minibatch in minibatches(rows, 7)] == [2, 2, 2, 2], "7 joint steps are two sequences of 3"


def test_sequences_that_do_not_fit_the_rollout_are_refused() -> None:
    with pytest.raises(OptionError, match=r"`sequence_length`: must divide the 6 steps of a rollout, got 4"):
        units(TensorDict({}, batch_size=[B, T]), 4)


# --- the sequential order -------------------------------------------------------------------------------------------------


class MovingStep(Update):
    """Moves the policy of an agent somewhere, and remembers whose turn it was and with which advantage."""

    contract = Contract(reads=(keys.ACTION,), traits=("per_agent",))

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.turns: list[tuple[str, list[int], Tensor]] = []

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        raise AssertionError("no simultaneous update was requested")

    def prepare(self, batch: TensorDictBase, learning: Learning) -> TensorDictBase:
        return batch.clone()

    def fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int]) -> Metrics:
        self.turns.append(("policy", list(agents), batch[keys.ADVANTAGE].clone()))
        with torch.no_grad():
            for parameter in learning.actor.agent_parameters(agents):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return {"actor/loss": torch.zeros(())}

    def fit_critic(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        self.turns.append(("critic", [], batch[keys.ADVANTAGE].clone()))
        return {}


def test_the_order_is_fresh_and_uniform_and_the_critic_comes_last() -> None:
    """HA-3: chi^2 over the six orders of three agents, and over the pairs of successive orders."""
    actor = StochasticActor(DISCRETE, hidden=[], share="none")
    step = MovingStep(DISCRETE)
    update = SequentialUpdate(DISCRETE, step=step)
    batch = batch_of(actor, shape=(1, 1))
    critic = CentralisedCritic(DISCRETE, hidden=[])
    torch.manual_seed(0)
    orders = []
    count = 1200
    for _ in range(count):
        step.turns.clear()
        update.update(batch, learning(actor, critic, Descent(actor)))
        assert [kind for kind, _, _ in step.turns] == ["policy"] * N + ["critic"]
        orders.append(tuple(agent for _, agents, _ in step.turns for agent in agents))
    frequency = Counter(orders)
    assert set(frequency) == set(permutations(range(N)))
    assert sum((n - count / 6) ** 2 / (count / 6) for n in frequency.values()) < 20.5  # 0.1 % point with 5 degrees of freedom
    pairs = Counter(pairwise(orders))
    wanted = (count - 1) / 36
    chi = sum((pairs[a, b] - wanted) ** 2 / wanted for a in frequency for b in frequency)
    assert chi < 66.6  # 0.1 % point with 35 degrees of freedom


class StandingStep(MovingStep):
    """Moves nothing and draws nothing."""

    def fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int]) -> Metrics:
        self.turns.append(("policy", list(agents), batch[keys.ADVANTAGE]))
        return {"actor/loss": torch.zeros(())}


@pytest.mark.parametrize(("order", "turns"), [("fixed", [0, 1, 2]), ([2, 0, 1], [2, 0, 1])])
def test_a_given_order_holds_in_every_iteration_and_draws_nothing(order: Any, turns: list[int]) -> None:
    actor, step = StochasticActor(DISCRETE, hidden=[], share="none"), StandingStep(DISCRETE)
    update = SequentialUpdate(DISCRETE, step=step, order=order)
    batch, critic = batch_of(actor, shape=(1, 1)), CentralisedCritic(DISCRETE, hidden=[])
    drawn = torch.get_rng_state()
    for _ in range(3):
        update.update(batch, learning(actor, critic, Descent(actor)))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [agent for _, agents, _ in step.turns for agent in agents] == 3 * turns


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 0], []])
def test_an_order_that_does_not_name_every_agent_once_is_refused(order: list[int]) -> None:
    with pytest.raises(OptionError, match=r"`order`: must name each of the 3 agents \(0 to 2\) once, got"):
        SequentialUpdate(DISCRETE, step=PpoClipUpdate(DISCRETE), order=order)


@pytest.mark.parametrize("share", ["all", [[0, 2], [1]]])
@pytest.mark.parametrize(("cls", "options"), EVERY_STEP)
def test_agents_that_share_parameters_can_take_turns(share: Any, cls: type[Update], options: dict[str, Any]) -> None:
    """The ablation of Kuba et al. (2022): every turn moves what the agent shares, and no other network."""
    torch.manual_seed(0)
    actor, critic = StochasticActor(CONTINUOUS, hidden=[7], share=share), CentralisedCritic(CONTINUOUS, hidden=[4])
    batch, step = batch_of(actor), cls(CONTINUOUS, **options)
    modules = nn.ModuleList([actor, critic])
    learn = learning(actor, critic, Descent(modules, lr=0.01))
    prepared = step.prepare(batch, learn)
    for agents in ([0], [1], [2]):
        before = snapshot(actor)
        step.fit_policy(prepared, learn, agents)
        group = 0 if share == "all" else (0, 1, 0)[agents[0]]
        moved = {name for name in changed(before, actor) if not name.endswith("identity")}
        assert moved
        assert all(name.endswith(f".{group}") for name in moved), moved
    SequentialUpdate(CONTINUOUS, step=step).update(batch, learn)


def test_the_teams_advantage_is_the_mean_of_those_alive() -> None:
    actor = StochasticActor(DISCRETE, hidden=[7])
    batch = batch_of(actor)
    batch[keys.ALIVE][0, 0] = False
    batch[keys.ADVANTAGE][~batch[keys.ALIVE]] = math.nan
    step = PpoClipUpdate(DISCRETE, team_advantage=True, normalise_advantage=False)
    prepared = step.prepare(batch, learning(actor, CentralisedCritic(DISCRETE, hidden=[4]), Descent(actor)))
    for b, t in itertools.product(range(B), range(T)):
        alive = [batch[keys.ADVANTAGE][b, t, i, 0].item() for i in range(N) if batch[keys.ALIVE][b, t, i]]
        expected = sum(alive) / len(alive) if alive else 0.0
        assert prepared[keys.ADVANTAGE][b, t, :, 0].tolist() == pytest.approx([expected] * N, abs=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_each_agent_is_given_the_advantage_times_the_ratios_of_those_before_it(spec: TeamSpec) -> None:
    actor = StochasticActor(spec, hidden=[7], share="none", output_gain=1.0)
    batch = batch_of(actor)
    before = log_probs(actor, batch).detach()
    step = MovingStep(spec)
    learn = learning(actor, CentralisedCritic(spec, hidden=[4]), Descent(actor))
    metrics = SequentialUpdate(spec, step=step).update(batch, learn)
    # Each agent moved in its own turn only, so that the final policies tell all ratios.
    ratio = (log_probs(actor, batch).detach() - before).exp()
    ratio[~batch[keys.ALIVE][..., 0]] = 1.0
    expected = torch.ones(B, T)
    for _, agents, advantage in step.turns[:N]:
        torch.testing.assert_close(advantage, batch[keys.ADVANTAGE] * expected[..., None, None], rtol=1e-4, atol=1e-6)
        expected = expected * ratio[..., agents[0]]
    assert (expected - 1).abs().max() > 0.1
    assert metrics["actor/compound_ratio"].item() == pytest.approx(expected.mean().item(), rel=1e-4)


class WatchedStep(Update):
    """Notices what every turn of another update changed, and whether it changed everything that it may."""

    contract = Contract(traits=("per_agent",))

    def __init__(self, spec: TeamSpec, *, inner: Update) -> None:
        super().__init__()
        self.spec = spec
        self.inner = inner
        self.turns = 0
        self.attached: list[Actor | Critic] = []

    def attach(self, actor: Actor, critic: Critic) -> None:
        self.attached += [actor, critic]

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        raise AssertionError("no simultaneous update was requested")

    def prepare(self, batch: TensorDictBase, learning: Learning) -> TensorDictBase:
        return self.inner.prepare(batch, learning)

    def fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int]) -> Metrics:
        before = snapshot(learning.actor, learning.critic)
        metrics = self.inner.fit_policy(batch, learning, agents)
        moved = changed(before, learning.actor, learning.critic)
        own = {id(parameter) for parameter in learning.actor.agent_parameters(agents)}
        assert moved == {f"0.{name}" for name, parameter in learning.actor.named_parameters() if id(parameter) in own}
        self.turns += 1
        return metrics

    def fit_critic(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        before = snapshot(learning.actor, learning.critic)
        metrics = self.inner.fit_critic(batch, learning)
        moved = changed(before, learning.actor, learning.critic)
        assert moved
        assert not any(name.startswith("0.") for name in moved)
        return metrics


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("cls", "options"), EVERY_STEP)
def test_a_policy_moves_in_its_own_turn_only(
    spec: TeamSpec, weight_decay: float, cls: type[Update], options: dict[str, Any]
) -> None:
    """Adam's momentum of earlier turns and its weight decay move no agent outside its turn."""
    torch.manual_seed(0)
    actor = StochasticActor(spec, hidden=[7], share="none")
    owners = Counter(id(parameter) for agent in range(N) for parameter in actor.agent_parameters([agent]))
    assert owners == Counter(id(parameter) for parameter in actor.parameters())
    step = WatchedStep(spec, inner=cls(spec, **options))
    env = ScriptedEnvironment(spec, random_script(spec, envs=3, steps=8))
    optimizer = AdamOptimizer(spec, lr=1e-2, weight_decay=weight_decay)
    critic = CentralisedCritic(spec)
    fit(learner_of(env, actor, critic=critic, update=SequentialUpdate(spec, step=step), optimizer=optimizer), 3)
    assert step.turns == 3 * N
    first, second = step.attached  # once, when the learner is built
    assert first is actor
    assert second is critic


class UnitStep:
    """A trust region step: every mean moves by one standard deviation where its gradient points."""

    def __init__(self, means: Sequence[nn.Parameter]) -> None:
        self.means = list(means)

    def __call__(self, loss: Tensor, max_grad_norm: float | None) -> Metrics:
        found = torch.autograd.grad(loss, self.means, allow_unused=True)
        with torch.no_grad():
            for mean, gradient in zip(self.means, found, strict=True):
                if gradient is not None:
                    mean.sub_(gradient.sign())
        return {}


def product_game_after(sequential: bool, seed: int) -> tuple[float, float]:
    """Means of two normal policies after one update on r = a1 a2 that started from (-0.25, 0.25)."""
    torch.manual_seed(seed)
    env = ProductGameEnvironment(Runtime(torch.device("cpu"), 0), num_envs=20_000)
    actor = StochasticActor(env.spec, hidden=[], share="none")
    layer = actor.network.layers[0]
    assert isinstance(layer, TeamLinear)
    with torch.no_grad():
        for weight, bias, mean in zip(layer.weights, layer.biases, (-0.25, 0.25), strict=True):
            weight.zero_()
            bias.fill_(mean)
    learner = learner_of(env, actor, critic=CentralisedCritic(env.spec, hidden=[4]), data=RolloutData(env.spec, steps=1))
    batch = learner.data.collect(env, actor)
    learner.annotate(batch)
    learner.estimator(batch)
    step = PpoClipUpdate(env.spec, epochs=1, entropy_coef=0.0, value_coef=0.0)
    update = SequentialUpdate(env.spec, step=step) if sequential else step
    minimise = UnitStep(list(layer.biases))
    update.update(batch, learning(actor, learner.critic, minimise))
    first, second = (mean.item() for mean in minimise.means)
    return first, second


def test_trust_region_steps_at_once_make_the_team_worse_and_in_turn_better() -> None:
    """HA-1 on the environment itself; J is the product of the means, -0.0625 before."""
    assert product_game_after(sequential=False, seed=0) == pytest.approx((0.75, -0.75))
    found = {tuple(round(mean, 4) for mean in product_game_after(sequential=True, seed=seed)) for seed in range(6)}
    assert found == {(0.75, 1.25), (-1.25, -0.75)}, "both orders end at J = 0.9375"


# --- schedules, value clip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [None, 0.5])
@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("cls", [PpoClipUpdate, PolicyGradientUpdate])
def test_weight_of_the_entropy_is_linear_in_the_progress(end: float | None, progress: float, cls: type[Update]) -> None:
    actor = StochasticActor(DISCRETE, hidden=[7], output_gain=1.0)
    batch = batch_of(actor)
    step = cls(DISCRETE, epochs=1, entropy_coef=0.1, entropy_coef_end=end, value_coef=0.0)
    descent = Descent(actor)
    metrics = step.update(batch, learning(actor, CentralisedCritic(DISCRETE, hidden=[4]), descent, progress))
    probability = batch[keys.LOGITS].double().softmax(-1)
    entropies = -(probability * probability.clamp(min=1e-300).log()).sum(-1)
    entropy = entropies[batch[keys.ALIVE][..., 0]].mean().item()
    assert metrics["actor/entropy"].item() == pytest.approx(entropy, rel=1e-5)
    coefficient = 0.1 if end is None else 0.1 * (1 - progress) + end * progress
    assert descent.losses[0] == pytest.approx(metrics["actor/loss"].item() - coefficient * entropy, rel=1e-4, abs=1e-6)


class RateKeeper(PpoClipUpdate):
    """Notes the learning rates in use."""

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        self.rates.append(self.read())
        return super().update(batch, learning)

    rates: list[list[float]]
    read: Callable[[], list[float]]


def test_learning_rates_fall_linearly_to_their_share() -> None:
    env = ScriptedEnvironment(DISCRETE, random_script(DISCRETE, envs=2, steps=4))
    update = RateKeeper(DISCRETE, epochs=1)
    optimizer = AdamOptimizer(DISCRETE, lr=1e-2, critic_lr=1e-3, lr_end=0.2)
    learner = learner_of(env, StochasticActor(DISCRETE, hidden=[4]), update=update, optimizer=optimizer, iterations=4)
    update.rates = []
    update.read = lambda: [float(group["lr"]) for group in learner.optimizers(use_pl_optimizer=False).param_groups]  # type: ignore[union-attr]
    fit(learner, 4)
    for rates, share in zip(update.rates, (1.0, 0.8, 0.6, 0.4), strict=True):
        assert rates == pytest.approx([1e-2 * share, 1e-3 * share])


class ConstantCritic(Critic):
    """One number for everything."""

    contract = Contract(reads=(keys.STATE,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)
        self.value = nn.Parameter(torch.zeros(()))

    def predict(self, batch: TensorDictBase) -> Tensor:
        return self.value.expand(*batch.batch_size, self.spec.n_agents, 1)


@pytest.mark.parametrize(
    ("clip", "huber_delta", "loss", "slope"),
    [
        (None, None, 0.125, -0.5),  # (0.5 - 1)^2 / 2
        (0.2, None, 0.32, 0.0),  # the old 0 may gain 0.2: (0.2 - 1)^2 / 2, and no slope
        (0.6, None, 0.125, -0.5),  # 0.5 is within reach
        (None, 0.1, 0.045, -0.1),  # 0.1 (0.5 - 0.05)
        (0.2, 0.1, 0.075, 0.0),  # 0.1 (0.8 - 0.05)
    ],
)
@pytest.mark.parametrize(("cls", "coef"), [(PpoClipUpdate, 1.0), (PolicyGradientUpdate, 0.25), (TrustRegionUpdate, 2.0)])
def test_value_loss_by_hand(
    clip: float | None, huber_delta: float | None, loss: float, slope: float, cls: type[Update], coef: float
) -> None:
    """The critic says 0 when the iteration begins, 0.5 in its second epoch, and should say 1."""
    actor, critic = StochasticActor(DISCRETE, hidden=[4]), ConstantCritic(DISCRETE)
    batch = batch_of(actor)
    batch.set(keys.STATE_VALUE, torch.zeros(B, T, N, 1)).set(keys.VALUE_TARGET, torch.ones(B, T, N, 1))
    step = cls(DISCRETE, epochs=2, value_coef=coef, value_clip=clip, huber_delta=huber_delta)
    descent = Descent(critic)

    def minimise(total: Tensor, max_grad_norm: float | None) -> Metrics:
        descent(total, max_grad_norm)
        critic.value.data.fill_(0.5)
        return {}

    learn = learning(actor, critic, minimise)
    step.fit_critic(step.prepare(batch, learn), learn)
    assert descent.losses[1] == pytest.approx(coef * loss, abs=1e-6)
    gradient = descent.gradients[1][0]
    assert gradient is not None
    assert gradient.item() == pytest.approx(coef * slope, abs=1e-6)


def test_first_epoch_is_never_clipped_although_the_normaliser_has_moved() -> None:
    """The old prediction is what the network said, not what it would say in the units of today."""
    actor = StochasticActor(DISCRETE, hidden=[4])
    batch = batch_of(actor)
    batch.set(keys.VALUE_TARGET, 50 + 10 * torch.randn(B, T, N, 1))
    found = []
    for clip in (1e-3, None):
        torch.manual_seed(3)
        critic = CentralisedCritic(DISCRETE, hidden=[4])
        with torch.no_grad():
            critic(batch)
        descent = Descent(critic)
        learn = learning(actor, critic, descent)
        step = PpoClipUpdate(DISCRETE, epochs=1, value_clip=clip)
        step.fit_critic(step.prepare(batch, learn), learn)
        found.append(descent)
    assert found[0].losses[0] == pytest.approx(found[1].losses[0], rel=1e-5)
    for clipped, free in zip(found[0].gradients[0], found[1].gradients[0], strict=True):
        assert clipped is not None
        assert free is not None
        torch.testing.assert_close(clipped, free, rtol=1e-4, atol=1e-6)
