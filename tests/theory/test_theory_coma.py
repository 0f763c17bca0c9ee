"""COMA (Foerster et al. 2018): its critic, baseline, targets and gradient by hand, by enumeration and by double loops."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scripted import Script, ScriptedEnvironment, fit, learner_of, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Actor, Critic, Environment
from marlkit.critics.counterfactual import CounterfactualCritic
from marlkit.data.rollout import RolloutData
from marlkit.errors import OptionError
from marlkit.estimators.counterfactual import CounterfactualEstimator
from marlkit.estimators.td_lambda import TdLambdaEstimator
from marlkit.functional.losses import policy_gradient_loss
from marlkit.learning import RunStep, run_directly
from marlkit.nn.actions import action_features
from marlkit.nn.networks import TeamLinear
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.targets.hard import HardTargets
from marlkit.testing import fake_batch
from marlkit.training.learner import Learner

GAMMA, LMBDA = 0.9, 0.8
SHARES: list[Any] = ["all", "none", [[0, 2], [1]]]
TEAM = TeamSpec(3, 4, Discrete(3), state=5, team_reward=True, action_sizes=(3, 2, 3))


# --- COMA-1: two agents by hand -------------------------------------------------------------------------------------------


def critic_of_table(table: list[list[float]]) -> CounterfactualCritic:
    """A linear critic ``Q(a_1, a_2) = table[a_1][a_2]`` of two agents; the table is symmetric."""
    spec = TeamSpec(2, 1, Discrete(2), team_reward=True)
    critic = CounterfactualCritic(spec, hidden=[], agent_id=False, value_norm=False)
    for parameter in critic.parameters():
        parameter.data.zero_()
    values = torch.tensor(table)
    critic.action_layer.weights[0].data.copy_(torch.cat([values, values], 1))
    return critic


@pytest.mark.parametrize(("executed", "baseline", "advantage"), [((0, 0), 0.6, 0.4), ((1, 1), 1.2, 1.8)])
def test_baseline_and_advantage_by_hand(executed: tuple[int, int], baseline: float, advantage: float) -> None:
    critic = critic_of_table([[1.0, 0.0], [0.0, 3.0]])
    batch = TensorDict({keys.STATE: torch.zeros(1, 2)}, batch_size=[1])
    batch.set(keys.ACTION, torch.tensor([executed])).set(keys.JOINT_ACTION, torch.tensor([[executed]]))
    batch.set(keys.LOGITS, torch.tensor([[[0.6, 0.4], [0.5, 0.5]]]).log())
    with torch.no_grad():
        critic(batch)
    assert float(batch[keys.STATE_VALUE][0, 0]) == pytest.approx(baseline, abs=1e-6)
    CounterfactualEstimator(critic.spec, target=_Nothing(critic.spec))(batch)
    assert float(batch[keys.ADVANTAGE][0, 0]) == pytest.approx(advantage, abs=1e-6)


class _Nothing(TdLambdaEstimator):
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        return batch


# --- what the critic sees -------------------------------------------------------------------------------------------------


def unbiased(critic: CounterfactualCritic) -> CounterfactualCritic:
    """The same with biases, which start at zero, of any value."""
    for name, parameter in critic.named_parameters():
        if "bias" in name:
            parameter.data.normal_()
    return critic


def plain_q(critic: CounterfactualCritic, batch: TensorDictBase, row: tuple[int, ...], agent: int) -> Tensor:
    """``Q_i`` of one agent in one row, from one long input vector and whole weight matrices."""
    spec, network = critic.spec, critic.network
    layers = [layer for layer in network.layers if isinstance(layer, TeamLinear)]
    of = layers[0].groups[agent]
    joint = batch[keys.JOINT_ACTION][row]
    view = joint[min(agent, len(joint) - 1)]
    parts = [batch[keys.STATE][row]]
    weights = [layers[0].weights[of], critic.action_layer.weights[of]]
    others = torch.zeros(spec.n_agents, spec.action_features)
    for other in set(range(spec.n_agents)) - {agent}:
        others[other, view[other]] = 1.0
    parts.append(others.flatten())
    if critic.observation_layer is not None:
        parts.append(batch[keys.OBSERVATION][row][agent])
        weights.append(critic.observation_layer.weights[of])
    x = torch.cat(weights, 1) @ torch.cat(parts) + layers[0].biases[of]
    if network.identity is not None:
        x = x + network.identity[agent]
    for layer in layers[1:]:
        x = layer.weights[of] @ x.tanh() + layer.biases[of]
    return x


def seen(spec: TeamSpec, critic: Critic, views: int, size: tuple[int, ...] = (4,)) -> TensorDict:
    batch = fake_batch(spec, size, critic.reads)
    joint = batch[keys.ACTION].unsqueeze(-2).repeat(*[1] * len(size), views, 1)
    if views > 1:  # every agent's own action, and its beliefs about the others'
        own = torch.eye(spec.n_agents, dtype=torch.bool)
        joint = torch.where(own, joint, torch.randint(spec.action_features, joint.shape))
    return batch.set(keys.JOINT_ACTION, joint)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("own_observation", [False, True])
@pytest.mark.parametrize("share", SHARES, ids=str)
@pytest.mark.parametrize("hidden", [[], [6], [6, 5]], ids=str)
@pytest.mark.parametrize("size", [(4,), (2, 3)], ids=str)
def test_critic_is_one_network_over_state_observation_and_others(
    hidden: list[int], share: Any, own_observation: bool, views: int, size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    options = {"hidden": hidden, "share": share, "own_observation": own_observation}
    critic = unbiased(CounterfactualCritic(TEAM, **options, value_norm=False))
    batch = seen(TEAM, critic, views, size)
    critic(batch)
    for row in itertools.product(*map(range, size)):
        for agent in range(3):
            values = plain_q(critic, batch, row, agent)
            torch.testing.assert_close(batch[keys.ACTION_VALUES][row][agent], values, rtol=1e-5, atol=1e-6)
            executed = batch[keys.ACTION_VALUE][row][agent, 0]
            torch.testing.assert_close(executed, values[batch[keys.ACTION][row][agent]], rtol=1e-5, atol=1e-6)
            policy = batch[keys.LOGITS][row][agent].exp() / batch[keys.LOGITS][row][agent].exp().sum()
            torch.testing.assert_close(batch[keys.STATE_VALUE][row][agent, 0], policy @ values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own_observation", [False, True])
@pytest.mark.parametrize("share", SHARES, ids=str)
def test_own_action_changes_nothing_and_others_do(share: Any, own_observation: bool) -> None:
    torch.manual_seed(0)
    critic = CounterfactualCritic(TEAM, hidden=[6], share=share, own_observation=own_observation)
    batch = seen(TEAM, critic, 1)
    changed = batch.clone()
    changed[keys.ACTION][:, 1] = 1 - batch[keys.ACTION][:, 1]
    changed.set(keys.JOINT_ACTION, changed[keys.ACTION].unsqueeze(-2))
    for key in (keys.ACTION_VALUES, keys.STATE_VALUE):
        before, after = critic(batch.clone())[key], critic(changed.clone())[key]
        assert torch.equal(before[:, 1], after[:, 1])
        assert (before[:, [0, 2]] != after[:, [0, 2]]).any(-1).all()


def test_values_are_in_real_units_and_the_prediction_in_normalised_ones() -> None:
    critic = CounterfactualCritic(TEAM, hidden=[6])
    batch = seen(TEAM, critic, 1)
    critic.normaliser.enabled = False
    plain = critic(batch.clone())
    critic.normaliser.enabled = True
    critic.normaliser.update(torch.tensor([1.0, 5.0]))
    found = critic(batch.clone())
    torch.testing.assert_close(critic.predict(batch), plain[keys.ACTION_VALUE])
    for key in critic.writes:
        torch.testing.assert_close(found[key], plain[key] * 2.0 + 3.0, rtol=1e-4, atol=1e-4)


def test_layer_normalisation_reaches_every_input() -> None:
    critic = CounterfactualCritic(TEAM, hidden=[6], own_observation=True, layer_norm=True)
    batch = seen(TEAM, critic, 1)
    scaled = batch.clone().set(keys.STATE, 3 + 50 * batch[keys.STATE])
    scaled.set(keys.OBSERVATION, 7 + 40 * batch[keys.OBSERVATION])
    torch.testing.assert_close(critic.predict(scaled), critic.predict(batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("own_observation", [False, True])
def test_parameters_of_an_agent_are_all_that_moves_its_values(own_observation: bool) -> None:
    critic = CounterfactualCritic(TEAM, hidden=[6], share="none", own_observation=own_observation)
    assert "separate_parameters" in critic.traits
    assert "separate_parameters" not in CounterfactualCritic(TEAM).traits
    owned = [critic.agent_parameters([agent]) for agent in range(3)]
    assert sorted(id(p) for own in owned for p in own) == sorted(id(p) for p in critic.parameters())
    assert len({tuple(p.shape for p in own) for own in owned}) == 1, "in one order for every agent"
    batch = seen(TEAM, critic, 1)
    for agent, own in enumerate(owned):
        gradients = torch.autograd.grad(critic.predict(batch)[:, agent].sum(), list(critic.parameters()), allow_unused=True)
        reached = {id(p) for p, g in zip(critic.parameters(), gradients, strict=True) if g is not None and g.abs().max() > 0}
        assert reached == {id(p) for p in own}


# --- COMA-2: the gradient, enumerated -------------------------------------------------------------------------------------


class EveryJointAction:
    """Three agents in one state; every joint action once, with its probability as weight, in double precision."""

    def __init__(self, seed: int, uniform_share: float = 0.3) -> None:
        torch.manual_seed(seed)
        self.actor = StochasticActor(TEAM, hidden=[4], output_gain=2.0, uniform_share=uniform_share).double()
        observed = torch.randn(1, 3, 4, dtype=torch.float64)
        self.joint = torch.tensor([a for a in itertools.product(range(3), repeat=3) if a[1] < 2])
        rows = len(self.joint)
        self.batch = TensorDict({keys.OBSERVATION: observed.expand(rows, -1, -1)}, batch_size=[rows])
        available = torch.arange(3) < torch.tensor(TEAM.own_action_sizes).unsqueeze(-1)
        self.batch.set(keys.ACTION_MASK, available.expand(rows, -1, -1)).set(keys.ACTION, self.joint)
        self.batch.set(keys.JOINT_ACTION, self.joint.unsqueeze(-2)).set(keys.STATE, torch.randn(1, 5).double().expand(rows, -1))
        self.policy = self.actor.distribution(self.batch)
        self.log_prob = self.policy.log_prob(self.joint)
        self.batch.set(keys.LOGITS, self.policy.parameters()[keys.LOGITS].detach())
        self.weight = self.log_prob.detach().sum(-2, keepdim=True).exp()

    def gradient(self, advantage: Tensor) -> Tensor:
        """``E[sum_i grad log pi_i(a_i) A_i]``."""
        loss = -policy_gradient_loss(self.log_prob, advantage, self.weight.expand_as(advantage)) * 3
        return self.flat(loss)

    def flat(self, loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, list(self.actor.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in found])

    def variance(self, advantage: Tensor) -> float:
        """Of the sampled gradient, summed over the parameters."""
        each = torch.stack([self.flat((self.log_prob[row] * advantage[row]).sum()) for row in range(len(self.joint))])
        weight = self.weight.squeeze(-1)
        return float((weight * (each - (weight * each).sum(0)) ** 2).sum())


def of_critic(game: EveryJointAction, seed: int) -> tuple[Tensor, Tensor]:
    """Q of the action taken and the baseline, of a random critic, independent of the game."""
    torch.manual_seed(100 + seed)
    critic = CounterfactualCritic(TEAM, hidden=[5], own_observation=True, value_norm=False).double()
    with torch.no_grad():
        critic(game.batch)
    return game.batch[keys.ACTION_VALUE], game.batch[keys.STATE_VALUE]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_baseline_adds_nothing_to_the_expected_gradient(seed: int, share: float) -> None:
    game = EveryJointAction(seed, share)
    assert float(game.weight.sum()) == pytest.approx(1.0, abs=1e-12)
    value, baseline = of_critic(game, seed)
    assert float(baseline.std()) > 1e-2
    torch.testing.assert_close(game.gradient(baseline), torch.zeros_like(game.gradient(value)), rtol=0, atol=1e-12)
    torch.testing.assert_close(game.gradient(value - baseline), game.gradient(value), rtol=0, atol=1e-12)


@pytest.mark.parametrize("agent", range(3))
def test_the_advantage_is_zero_on_average_whatever_the_others_do(agent: int) -> None:
    """Under the policy that acts, uniform share included: another policy in the baseline would leave a bias."""
    game = EveryJointAction(seed=4)
    value, baseline = of_critic(game, 4)
    advantage = (game.log_prob.detach().exp() * (value - baseline))[:, agent, 0]
    others = [o for o in range(3) if o != agent]
    for fixed in game.joint[:, others].unique(dim=0):
        rows = (game.joint[:, others] == fixed).all(-1)
        assert float(advantage[rows].sum()) == pytest.approx(0.0, abs=1e-12)


def test_with_the_true_values_it_is_the_gradient_of_the_return() -> None:
    """A game of one step: ``Q_i(b, a_-i) = r(b, a_-i)``; the return is enumerated from plain softmaxes and the uniform share."""
    game, share = EveryJointAction(seed=5), 0.3
    table = torch.randn(3, 3, 3, dtype=torch.float64)
    reward = table[tuple(game.joint.T)]
    values = torch.stack([torch.stack([table[self_] for self_ in _replaced(game.joint, i)], -1) for i in range(3)], -2)
    policy = game.batch[keys.LOGITS].exp()
    advantage = reward[:, None, None] - (policy * values).sum(-1, keepdim=True)
    features = game.actor.network(game.batch[keys.OBSERVATION][:1])[0]
    expected = torch.zeros((), dtype=torch.float64)
    for row, joint in enumerate(game.joint.tolist()):
        probability = torch.ones((), dtype=torch.float64)
        for agent, action in enumerate(joint):
            size = TEAM.own_action_sizes[agent]
            share_ = float(torch.tensor(share))
            probability = probability * ((1 - share_) * features[agent, :size].softmax(-1)[action] + share_ / size)
        expected = expected + probability * reward[row]
    torch.testing.assert_close(game.gradient(advantage), game.flat(expected), rtol=1e-6, atol=1e-8)


def _replaced(joint: Tensor, agent: int) -> list[tuple[Tensor, ...]]:
    """The joint actions with every action of ``agent`` in turn."""
    found = []
    for action in range(3):
        other = joint.clone()
        other[:, agent] = action
        found.append(tuple(other.T))
    return found


def test_the_baseline_reduces_the_variance_of_the_gradient() -> None:
    """On average over random tables of values that are far from zero, as returns are."""
    ratios = []
    for seed in range(6):
        game = EveryJointAction(seed)
        value, baseline = of_critic(game, seed)
        ratios.append(game.variance(value - baseline) / game.variance(value + 3.0))
    assert max(ratios) < 0.5


# --- the floor of the policy ----------------------------------------------------------------------------------------------


def test_actor_plays_its_stored_distribution_with_the_uniform_share() -> None:
    torch.manual_seed(0)
    actor = StochasticActor(TEAM, hidden=[4], output_gain=2.0, uniform_share=0.5, uniform_share_end=0.1)
    batch = fake_batch(TEAM, [6], actor.reads)
    logits = actor.network(batch[keys.OBSERVATION]).masked_fill(~batch[keys.ACTION_MASK], -torch.inf)
    for progress, share in ((0.0, 0.5), (0.25, 0.4), (1.0, 0.1)):
        actor.schedule(progress)
        played = actor(batch.clone())
        size = torch.tensor(TEAM.own_action_sizes).unsqueeze(-1)
        policy = (1 - share) * logits.softmax(-1) + share / size * batch[keys.ACTION_MASK]
        chosen = policy.gather(-1, played[keys.ACTION].unsqueeze(-1)).log()
        torch.testing.assert_close(played[keys.LOG_PROB], chosen, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(played[keys.LOGITS].softmax(-1), policy, rtol=1e-5, atol=1e-6)
        again = actor.distribution(played)
        assert torch.equal(again.log_prob(played[keys.ACTION]), played[keys.LOG_PROB])
        entropy = -(policy * policy.clamp(min=1e-30).log()).sum(-1, keepdim=True)
        torch.testing.assert_close(again.entropy(), entropy, rtol=1e-5, atol=1e-6)


def test_the_share_travels_with_the_policy() -> None:
    """Copies and checkpoints of the policy keep the share; a policy without one has no state for it."""
    actor = StochasticActor(TEAM, uniform_share=0.5, uniform_share_end=0.0)
    actor.schedule(0.5)
    other = StochasticActor(TEAM, uniform_share=0.5, uniform_share_end=0.0)
    other.load_state_dict(actor.state_dict())
    assert other.uniform_share is not None
    assert float(other.uniform_share) == pytest.approx(0.25)
    assert "uniform_share" not in StochasticActor(TEAM).state_dict()
    StochasticActor(TEAM).schedule(0.5)


@pytest.mark.parametrize("option", ["uniform_share", "uniform_share_end"])
def test_no_uniform_share_of_continuous_actions(option: str) -> None:
    options: dict[str, Any] = {option: 0.1}
    with pytest.raises(OptionError, match=f"`{option}`: mixes in discrete actions, but .* continuous"):
        StochasticActor(TeamSpec(2, 3, Continuous(1)), **options)
    StochasticActor(TeamSpec(2, 3, Continuous(1)), uniform_share=0.0, uniform_share_end=0.0)


# --- COMA-3: targets ------------------------------------------------------------------------------------------------------

B, T, N = 4, 10, 2
PLAYED = TeamSpec(N, 3, Discrete(3), team_reward=True)


def coma(script: Script, *, steps: int = T, interval: int = 200) -> Learner:
    torch.manual_seed(0)
    target = TdLambdaEstimator(PLAYED, gamma=GAMMA, lmbda=LMBDA, bootstrap="action_value")
    return learner_of(
        ScriptedEnvironment(PLAYED, script),
        StochasticActor(PLAYED, hidden=[6], output_gain=1.0, uniform_share=0.2),
        critic=unbiased(CounterfactualCritic(PLAYED, hidden=[6], value_norm=False)),
        targets=HardTargets(PLAYED, interval=interval),
        estimator=CounterfactualEstimator(PLAYED, target=target),
        data=RolloutData(PLAYED, steps=steps),
    )


def moved(learner: Learner) -> None:
    """Online networks that differ from their copies."""
    for parameter in (*learner.actor.parameters(), *learner.critic.parameters()):
        parameter.data += torch.randn_like(parameter)


def spied(learner: Learner) -> dict[tuple[float, ...], Tensor]:
    """The actions that the policy chooses after a cut, by the first agent's observation."""
    chosen: dict[tuple[float, ...], Tensor] = {}
    policy = learner.actor
    original = policy.bootstrap

    def bootstrap(batch: TensorDictBase) -> TensorDictBase:
        original(batch)
        for seen_, action in zip(batch[keys.OBSERVATION][:, 0], batch[keys.ACTION], strict=True):
            chosen[tuple(seen_.tolist())] = action
        return batch

    object.__setattr__(policy, "bootstrap", bootstrap)
    return chosen


def next_values(batch: TensorDict, critic: CounterfactualCritic, chosen: dict[tuple[float, ...], Tensor]) -> np.ndarray:
    """Of every step: the target critic's value of the next state and its joint action, executed where there is one."""
    found = np.zeros((B, T, N))
    for b, t in np.ndindex(B, T):
        if batch[keys.TERMINATED][b, t]:
            continue
        following = batch["next"][b, t]
        if batch[keys.TRUNCATED][b, t] or t == T - 1:
            action = chosen.pop(tuple(following[keys.OBSERVATION][0].tolist()))
        else:
            action = batch[keys.ACTION][b, t + 1]
        row = TensorDict({keys.STATE: following[keys.STATE][None], keys.JOINT_ACTION: action[None, None]}, batch_size=[1])
        for agent in range(N):
            found[b, t, agent] = plain_q(critic, row, (0,), agent)[action[agent]].item()
    assert not chosen, "no other step was valued on an action that was not executed"
    return found


def lambda_returns(batch: TensorDict, following: np.ndarray) -> np.ndarray:
    """The weighted sum of n-step returns, each written out."""
    reward, found = batch[keys.REWARD][..., 0].double().numpy(), np.zeros((B, T, N))
    terminated, done = batch[keys.TERMINATED][..., 0], batch[keys.DONE][..., 0]
    for b, t in np.ndindex(B, T):
        last = next((k for k in range(t, T) if done[b, k]), T - 1)
        for end in range(t, last + 1):
            n_step = sum(GAMMA ** (k - t) * reward[b, k] for k in range(t, end + 1))
            n_step = n_step + (0 if terminated[b, end] else GAMMA ** (end - t + 1) * following[b, end])
            found[b, t] += (LMBDA ** (end - t)) * (1.0 if end == last else 1 - LMBDA) * n_step
    return found


def test_targets_are_lambda_returns_of_the_target_critic_on_executed_actions() -> None:
    script = random_script(PLAYED, B, T)
    assert min(script.terminated.sum(), script.truncated.sum()) >= 3
    learner = coma(script)
    old_critic = copy.deepcopy(learner.critic)
    assert isinstance(old_critic, CounterfactualCritic)
    moved(learner)
    chosen = spied(learner)
    batch = learner.data.collect(learner.env, learner.actor)
    learner.annotate(batch)
    learner.estimator(batch)
    expected = lambda_returns(batch, next_values(batch, old_critic, chosen))
    np.testing.assert_allclose(batch[keys.VALUE_TARGET][..., 0].numpy(), expected, rtol=1e-4, atol=1e-4)
    new_critic = learner.critic
    assert isinstance(new_critic, CounterfactualCritic)
    for b, t, agent in np.ndindex(B, T, N):
        values = plain_q(new_critic, batch, (b, t), agent)
        advantage = values[batch[keys.ACTION][b, t, agent]] - batch[keys.LOGITS][b, t, agent].softmax(-1) @ values
        torch.testing.assert_close(batch[keys.ADVANTAGE][b, t, agent, 0], advantage, rtol=1e-4, atol=1e-4)


def value_targets(script: Script) -> Tensor:
    learner = coma(script)
    torch.manual_seed(3)
    batch = learner.data.collect(learner.env, learner.actor)
    learner.annotate(batch)
    found: Tensor = learner.estimator(batch)[keys.VALUE_TARGET]
    return found


def test_absurd_states_behind_ends_and_resets_do_not_leak() -> None:
    """GAE-3 for action values."""
    script = random_script(PLAYED, B, T)
    plain = value_targets(script)
    changed = copy.deepcopy(script)
    changed.arriving[script.terminated.squeeze(-1)] = 1e6
    changed.fresh[1:] *= 1e6
    torch.testing.assert_close(value_targets(changed), plain, rtol=1e-5, atol=1e-5)
    changed = copy.deepcopy(script)
    changed.arriving[script.truncated.squeeze(-1)] += 50.0
    cut = script.truncated.transpose(0, 1).squeeze(-1)
    assert ((value_targets(changed) - plain).abs().amax((-1, -2))[cut] > 1e-3).all()


def test_target_critic_is_replaced_at_every_200th_step() -> None:
    learner = coma(random_script(PLAYED, B, 5), steps=5)
    learner.update = PolicyGradientUpdate(PLAYED, minibatch_size=2)  # 10 steps in an iteration of 4 x 5 rows
    first = copy.deepcopy(learner.critic.state_dict())
    fit(learner, 19)
    copied = learner.targets.critic()
    assert all(torch.equal(value, first[name]) for name, value in copied.state_dict().items())
    fit(learner, 1)
    assert all(torch.equal(value, copied.state_dict()[name]) for name, value in learner.critic.state_dict().items())
    assert any((value != first[name]).any() for name, value in copied.state_dict().items())


# --- one agent ------------------------------------------------------------------------------------------------------------

LR, ALONE = 3e-3, TeamSpec(1, 3, Discrete(4), team_reward=True)


class RecordedData(RolloutData):
    """Stores the played steps."""

    def __init__(self, spec: TeamSpec, *, steps: int) -> None:
        super().__init__(spec, steps=steps)
        self.recorded: list[TensorDict] = []

    def collect(self, env: Environment, actor: Actor, run_step: RunStep = run_directly) -> TensorDict:
        self.recorded.append(super().collect(env, actor, run_step).clone())
        return self.recorded[-1].clone()


class PlainQActorCritic:
    """One agent: Q(s)[A] regressed on TD(lambda) of a copy, ``A = Q(a) - E_pi Q``, in double precision and plain tensors."""

    def __init__(self, learner: Learner, interval: int) -> None:
        network = learner.critic.get_submodule("network")
        self.actor = [p.detach().double().requires_grad_() for p in learner.actor.parameters()]
        self.critic = [p.detach().double().requires_grad_() for p in network.parameters()]
        self.optimizer = torch.optim.Adam([*self.actor, *self.critic], lr=LR, eps=1e-5, fused=False, foreach=False)
        self.target, self.interval, self.steps = [p.detach().clone() for p in self.critic], interval, 0

    @staticmethod
    def perceptron(layers: list[Tensor], x: Tensor) -> Tensor:
        return (x @ layers[0].T + layers[1]).tanh() @ layers[2].T + layers[3]

    def update(self, batch: TensorDict, share: float) -> None:
        seen_, action = batch[keys.OBSERVATION][:, :, 0].double(), batch[keys.ACTION][:, :, 0, None]
        reward, ended = batch[keys.REWARD][:, :, 0, 0].double(), batch[keys.TERMINATED][..., 0].double()
        steps = reward.shape[1]
        policy = (1 - share) * self.perceptron(self.actor, seen_).softmax(-1) + share / 4
        with torch.no_grad():
            value = self.perceptron(self.target, seen_).gather(-1, action)[..., 0]
            target, later = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
            for t in reversed(range(steps)):
                following = value[:, t + 1] if t + 1 < steps else later
                target[:, t] = reward[:, t] + GAMMA * (1 - ended[:, t]) * ((1 - LMBDA) * following + LMBDA * later)
                later = target[:, t]
            own = self.perceptron(self.critic, seen_)
            advantage = own.gather(-1, action)[..., 0] - (policy * own).sum(-1)
        error = self.perceptron(self.critic, seen_).gather(-1, action)[..., 0] - target
        entropy = -(policy * policy.log()).sum(-1)
        gain = policy.gather(-1, action)[..., 0].log() * advantage + 0.02 * entropy
        self.optimizer.zero_grad()
        (0.5 * (error**2).mean() - gain.mean()).backward()
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.interval == 0:
            self.target = [p.detach().clone() for p in self.critic]


def test_one_agent_is_a_q_actor_critic_with_the_policy_mean_as_value() -> None:
    """Every episode ends within its rollout, so that no action is imagined."""
    iterations, interval = 5, 2
    script = random_script(ALONE, B, iterations * T, ends=0.15)
    script.terminated |= script.truncated
    script.truncated[:] = False
    script.terminated[T - 1 :: T] = True
    torch.manual_seed(1)
    target = TdLambdaEstimator(ALONE, gamma=GAMMA, lmbda=LMBDA, bootstrap="action_value")
    learner = learner_of(
        ScriptedEnvironment(ALONE, script),
        StochasticActor(ALONE, hidden=[6], output_gain=1.0, uniform_share=0.5, uniform_share_end=0.0),
        critic=CounterfactualCritic(ALONE, hidden=[5], value_norm=False),
        targets=HardTargets(ALONE, interval=interval),
        estimator=CounterfactualEstimator(ALONE, target=target),
        update=PolicyGradientUpdate(ALONE, entropy_coef=0.02, max_grad_norm=None),
        optimizer=AdamOptimizer(ALONE, lr=LR, eps=1e-5),
        iterations=iterations,
    )
    learner.data = played = RecordedData(ALONE, steps=T)
    plain = PlainQActorCritic(learner, interval)
    begun = [p.detach().clone() for p in (*learner.actor.parameters(), *learner.critic.get_submodule("network").parameters())]
    fit(learner, iterations)
    for index, batch in enumerate(played.recorded):
        plain.update(batch, 0.5 * (1 - index / iterations))
    ended = [*learner.actor.parameters(), *learner.critic.get_submodule("network").parameters()]
    for got, before, should in zip(ended, begun, (*plain.actor, *plain.critic), strict=True):
        assert (got - before).abs().max() > 1e-3
        torch.testing.assert_close(got.detach().double(), should.detach(), rtol=0, atol=1e-5)


def test_action_features_are_the_critics_inputs() -> None:
    """One-hot vectors of the padded length, so that a weight belongs to one action of one agent."""
    features = action_features(torch.tensor([[2, 0, 1]]), TEAM)
    assert features.tolist() == [[[0, 0, 1], [1, 0, 0], [0, 1, 0]]]
