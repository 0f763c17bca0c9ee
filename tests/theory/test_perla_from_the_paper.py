"""PERLA's equations, enumerated in NumPy from the paper alone (Jafferjee et al. 2022, arXiv:2209.01054).

The critics have random parameters. Each is a table of values at joint actions, which is read by believing the others to be
certain of one joint action. Everything else is summed here over joint actions: equations 1 and 2, theorems 1, 3 and 4,
algorithm 1. All is float64.

Algorithm 1 prints ``delta_i = (1/K) sum Q(s^{t-1}, ..) - (r + gamma (1/K) sum Q(s^t, ..))`` and gives "advantages delta_i" to
PPO, which ascends on them. Taken literally, what turned out worse than expected would become likelier. The advantage is therefore
read as ``-delta_i``: that of theorems 2 and 3, whose estimators ascend on Q, less a baseline. The regression squares ``delta_i``:
its sign does not matter there. The step from ``s^{t-1}`` to ``s^t`` of the algorithm is written here as from ``s^t`` to
``s^{t+1}``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.estimators.n_step import NStepEstimator
from marlkit.learning import Adjust, Learning, Metrics
from marlkit.nn.distributions import UNAVAILABLE
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.recipe import load_recipe
from marlkit.spec import Discrete, TeamSpec
from marlkit.training.assembly import build_environment, build_learner
from marlkit.training.learner import Learner

Array = NDArray[Any]
TEAMS = [(2, 3), (3, 2, 2)]
FEATURES = 2
"""Features of the state and of an observation."""


# --- tables and their sums, in NumPy -----------------------------------------------------------------------------------------


def joints(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All joint actions."""
    return list(product(*map(range, sizes)))


def random_policies(sizes: Sequence[int], seed: int) -> list[Array]:
    """Probabilities of the actions of each agent, none small."""
    draw = np.random.default_rng(seed)
    return [draw.dirichlet(np.full(size, 3.0)) for size in sizes]


def likelihood(joint: tuple[int, ...], policies: Sequence[Array], without: int | None = None) -> float:
    """The product of the policies' probabilities, that of the agent ``without`` left out."""
    return float(np.prod([policies[j][a] for j, a in enumerate(joint) if j != without]))


def marginalised(table: Array, agent: int, policies: Sequence[Array]) -> Array:
    """Equation 1: ``sum_{a_-i} prod_{j != i} pi_j(a_j) f(b, a_-i)`` of a table ``[A_0, .., A_N]``, for every own action ``b``."""
    found = np.zeros(table.shape[agent])
    for joint in joints(table.shape):
        found[joint[agent]] += likelihood(joint, policies, without=agent) * table[joint]
    return found


def score(policy: Array, action: int) -> Array:
    """Gradient of ``log pi(action)`` of a softmax in its logits."""
    return np.eye(len(policy))[action] - policy


# --- critics and what they are given -----------------------------------------------------------------------------------------


def team(sizes: Sequence[int]) -> TeamSpec:
    """A team whose agents have so many actions."""
    return TeamSpec(len(sizes), FEATURES, Discrete(max(sizes)), state=FEATURES, action_sizes=tuple(sizes))


def critic_of(sizes: Sequence[int], seed: int = 0, **options: Any) -> MarginalisedCritic:
    """A critic in float64 with random parameters."""
    given: dict[str, Any] = {"hidden": [8], "value_norm": False, "exact": "never"} | options
    critic = MarginalisedCritic(team(sizes), **given).double()
    randomise(critic, seed)
    return critic


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Replace all parameters by normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def with_options(critic: MarginalisedCritic, **changes: Any) -> MarginalisedCritic:
    """A critic with the same parameters and other options."""
    other = MarginalisedCritic(critic.spec, **(critic.options | changes)).to(next(critic.parameters()).dtype)
    other.load_state_dict(critic.state_dict())
    return other


def logits_of(policies: Sequence[Array], spec: TeamSpec) -> Tensor:
    """``[N, A]``; actions that an agent does not have are unavailable."""
    found = torch.full((spec.n_agents, spec.action_features), UNAVAILABLE, dtype=torch.float64)
    for agent, policy in enumerate(policies):
        found[agent, : len(policy)] = torch.from_numpy(np.log(np.maximum(policy, 1e-300)))
    return found.clamp(min=UNAVAILABLE)


def certain(joint: tuple[int, ...], sizes: Sequence[int]) -> list[Array]:
    """Policies that play ``joint``."""
    return [np.eye(size)[action] for size, action in zip(sizes, joint, strict=True)]


def rows_of(spec: TeamSpec, states: Tensor, actions: Tensor, beliefs: Tensor, own: Tensor | None = None) -> TensorDict:
    """What a critic reads.

    Args:
        spec: the team.
        states: ``[R, S]``; agent i observes the first features of them, moved by i.
        actions: executed ones, ``[R, N]``.
        beliefs: logits ``[R, V, N, A]``.
        own: the agents' own logits ``[R, N, A]``; those believed unless given.
    """
    batch = TensorDict({}, batch_size=[len(states)])
    batch.set(keys.STATE, states)
    moved = torch.arange(spec.n_agents, dtype=states.dtype).view(-1, 1)
    batch.set(keys.OBSERVATION, states[:, None, : spec.observation] + moved)
    batch.set(keys.ACTION, actions)
    batch.set(keys.LOGITS, beliefs[:, 0] if own is None else own)
    batch.set(keys.OPPONENT_LOGITS, beliefs)
    batch.set(keys.JOINT_ACTION, actions.unsqueeze(1))
    generator = torch.Generator().manual_seed(0)
    return batch.set(keys.SAMPLE_SEED, torch.randint(2**62, (len(states), 1), generator=generator))


def some_states(rows: int, seed: int = 5) -> Tensor:
    """Random states ``[rows, 2]``."""
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def repeated(spec: TeamSpec, state: Tensor, policies: Sequence[Array], rows: int, action: Tensor | None = None) -> TensorDict:
    """One state and its policies, many times, each with a seed of its own."""
    actions = torch.zeros(rows, spec.n_agents, dtype=torch.int64) if action is None else action
    beliefs = logits_of(policies, spec).expand(rows, 1, -1, -1)
    return rows_of(spec, state.expand(rows, -1), actions, beliefs)


def differentiable_table(critic: MarginalisedCritic, state: Tensor, observation: Tensor | None = None) -> Tensor:
    """``V_i`` or ``Q_i`` at every joint action, ``[J, N]``, with gradient: the exact mean where the others are certain."""
    sizes = critic.spec.own_action_sizes
    everything = joints(sizes)
    beliefs = torch.stack([logits_of(certain(joint, sizes), critic.spec) for joint in everything]).unsqueeze(1)
    rows = rows_of(critic.spec, state.expand(len(everything), -1), torch.tensor(everything), beliefs)
    if observation is not None:
        rows.set(keys.OBSERVATION, observation.expand(len(everything), -1, -1))
    reader = with_options(critic, exact="always", current="sampled")
    found: Tensor = torch.func.functional_call(reader, dict(critic.named_parameters()), (rows,))[reader.predicts]
    return found.squeeze(-1)


def tables(critic: MarginalisedCritic, state: Tensor, observation: Tensor | None = None) -> list[Array]:
    """The table ``[A_0, .., A_N]`` of each agent: ``Q_i(x, a)``, or ``V_i(x, a_-i)``, which own actions do not change."""
    sizes = critic.spec.own_action_sizes
    found = differentiable_table(critic, state, observation).detach().numpy()
    return [found[:, agent].reshape(sizes) for agent in range(len(sizes))]


def written(critic: MarginalisedCritic, rows: TensorDict, key: keys.Key) -> Array:
    """What a critic writes."""
    with torch.no_grad():
        found: Tensor = critic(rows)[key]
    return found.numpy()


def equal(found: Array | float, wanted: Array | float) -> None:
    """Check that two results are the same but for rounding."""
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


def within(mean: Array | float, samples: Array, errors: float = 5.0) -> None:
    """Check that ``samples`` ``[R, ..]`` have this mean, within so many standard errors."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    apart = np.abs(samples.mean(0) - mean)
    assert (apart <= errors * error + 1e-12).all(), (samples.mean(0), mean, error)


def variance_within(variance: float, samples: Array, mean: float, errors: float = 5.0) -> None:
    """Check the variance about a known mean, within so many standard errors."""
    within(variance, (samples - mean) ** 2, errors)


# --- 1: equations 1 and 2 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["state", "own"])
@pytest.mark.parametrize("style", ["v", "q"])
@pytest.mark.parametrize("sizes", TEAMS)
def test_the_exact_value_is_the_sum_of_equation_1(sizes: tuple[int, ...], style: str, view: str) -> None:
    """In every view its own beliefs count; `state_value` of `q` is the mean of ``Q~_i`` under the own policy."""
    critic = critic_of(sizes, style=style, view=view, exact="always")
    views = [random_policies(sizes, seed) for seed in range(len(sizes))]
    own = random_policies(sizes, 99)
    state = some_states(1)
    beliefs = torch.stack([logits_of(believed, critic.spec) for believed in views]).unsqueeze(0)
    executed = (1,) * len(sizes)
    rows = rows_of(critic.spec, state, torch.tensor([executed]), beliefs, logits_of(own, critic.spec).unsqueeze(0))
    rows.set(keys.JOINT_ACTION, rows[keys.JOINT_ACTION].expand(1, len(sizes), -1))
    critic(rows)
    for agent, table in enumerate(tables(critic, state)):
        assert np.ptp(table) > 0.1
        wanted = marginalised(table, agent, views[agent])
        if style == "v":
            equal(wanted, wanted[0])
            equal(rows[keys.STATE_VALUE][0, agent, 0].item(), wanted[0])
        else:
            equal(rows[keys.ACTION_VALUES][0, agent, : sizes[agent]].detach().numpy(), wanted)
            equal(rows[keys.ACTION_VALUE][0, agent, 0].item(), wanted[executed[agent]])
            equal(rows[keys.STATE_VALUE][0, agent, 0].item(), own[agent] @ wanted)
        equal(rows[keys.EXECUTED_VALUE][0, agent, 0].item(), table[executed])


@pytest.mark.parametrize("style", ["v", "q"])
@pytest.mark.parametrize("sizes", TEAMS)
def test_a_sampled_value_is_a_mean_of_k_entries_drawn_from_the_others_policies(sizes: tuple[int, ...], style: str) -> None:
    """Equation 2: with K = 1 each entry as often as the product of the others' policies says; with K = 2 means of two entries.

    Each agent has beliefs of its own about the others, as with exchanged policies where they are the same.
    """
    single = critic_of(sizes, style=style, samples=1)
    views, state = [random_policies(sizes, seed) for seed in range(len(sizes))], some_states(1)
    rows = repeated(single.spec, state, views[0], 4000)
    beliefs = torch.stack([logits_of(believed, single.spec) for believed in views])
    rows.set(keys.OPPONENT_LOGITS, beliefs.expand(4000, -1, -1, -1))
    rows.set(keys.JOINT_ACTION, rows[keys.JOINT_ACTION].expand(-1, len(sizes), -1))
    key = keys.STATE_VALUE if style == "v" else keys.ACTION_VALUE
    once = written(single, rows.clone(), key)[..., 0]
    twice = written(with_options(single, samples=2), rows.clone(), key)[..., 0]
    for agent, table in enumerate(tables(single, state)):
        others = [joint for joint in joints(sizes) if joint[agent] == 0]
        entries = np.array([table[joint] for joint in others])
        apart = np.abs(once[:, agent, None] - entries)
        assert apart.min(1).max() < 1e-9
        chosen = np.eye(len(others))[apart.argmin(1)]
        within(np.array([likelihood(joint, views[agent], without=agent) for joint in others]), chosen)
        pairs = np.array([sum(pair) / 2 for pair in combinations_with_replacement(entries, 2)])
        assert np.abs(twice[:, agent, None] - pairs).min(1).max() < 1e-9


@pytest.mark.parametrize("style", ["v", "q"])
@pytest.mark.parametrize("sizes", TEAMS)
def test_the_sampled_value_has_the_expectation_of_the_exact_one(sizes: tuple[int, ...], style: str) -> None:
    critic = critic_of(sizes, style=style, samples=3)
    policies, state = random_policies(sizes, 4), some_states(1)
    rows = repeated(critic.spec, state, policies, 4000)
    found = written(critic, rows, keys.STATE_VALUE if style == "v" else keys.ACTION_VALUES)
    for agent, table in enumerate(tables(critic, state)):
        wanted = marginalised(table, agent, policies)
        if style == "v":
            within(wanted[0], found[:, agent, 0])
        else:
            within(wanted, found[:, agent, : sizes[agent]])
            state_value = rows[keys.STATE_VALUE][:, agent, 0].detach().numpy()
            within(policies[agent] @ wanted, state_value)


@pytest.mark.parametrize("exact", ["always", "never"])
@pytest.mark.parametrize("style", ["v", "q"])
def test_the_own_executed_action_changes_no_mean_over_the_others(style: str, exact: str) -> None:
    """Nor what an agent is believed to do itself: neither is an input of ``V^_i``, nor of ``Q^_i(., b)``."""
    sizes = (3, 2, 2)
    critic = critic_of(sizes, style=style, samples=3, exact=exact)
    policies = random_policies(sizes, 6)
    rows = repeated(critic.spec, some_states(1), policies, 20)
    read = [keys.STATE_VALUE] if style == "v" else [keys.STATE_VALUE, keys.ACTION_VALUES]
    for agent in range(3):
        before = {key: written(critic, rows.clone(), key)[:, agent] for key in read}
        moved = rows.clone()
        moved[keys.ACTION][:, agent] = 1
        moved[keys.JOINT_ACTION][:, 0, agent] = 1
        for key in read:
            equal(written(critic, moved.clone(), key)[:, agent], before[key])
        if exact == "always":
            believed = logits_of(random_policies(sizes, 7), critic.spec)[agent]
            moved = rows.clone()
            moved.set(keys.OPPONENT_LOGITS, moved[keys.OPPONENT_LOGITS].clone())
            moved[keys.OPPONENT_LOGITS][:, 0, agent] = believed
            for key in read:
                equal(written(critic, moved.clone(), key)[:, agent], before[key])


def test_the_view_decides_which_input_the_table_depends_on() -> None:
    """PERLA_MAPPO's value depends on the state; PERLA_IPPO's on the own observation, not on that of the others."""
    sizes = (3, 2, 2)
    for view in ("state", "own"):
        critic = critic_of(sizes, view=view, exact="always")
        rows = repeated(critic.spec, some_states(1), random_policies(sizes, 6), 1)
        before = written(critic, rows.clone(), keys.STATE_VALUE)[0, :, 0]
        moved = rows.clone()
        moved[keys.OBSERVATION][:, 1] += 1.0
        by_observation = np.abs(written(critic, moved, keys.STATE_VALUE)[0, :, 0] - before) > 1e-9
        moved = rows.clone()
        moved.set(keys.STATE, moved[keys.STATE] + 1.0)
        by_state = np.abs(written(critic, moved, keys.STATE_VALUE)[0, :, 0] - before) > 1e-9
        assert by_observation.tolist() == [False, view == "own", False]
        assert by_state.tolist() == [view == "state"] * 3


# --- 2: theorem 1 ------------------------------------------------------------------------------------------------------------


def drawn_rows(spec: TeamSpec, states: Tensor, policies: Sequence[list[Array]], rows: int) -> tuple[TensorDict, Array]:
    """Random states and own actions, as theorem 1 takes both for random variables; and which state each row has."""
    draw = np.random.default_rng(8)
    which = draw.integers(len(states), size=rows)
    uniform = draw.random((rows, spec.n_agents))
    actions = np.zeros((rows, spec.n_agents), dtype=np.int64)
    for number, own in enumerate(policies):
        for agent, policy in enumerate(own):
            at = which == number
            actions[at, agent] = np.searchsorted(policy.cumsum()[:-1], uniform[at, agent], side="right")
    beliefs = torch.stack([logits_of(own, spec) for own in policies]).unsqueeze(1)
    return rows_of(spec, states[which], torch.from_numpy(actions), beliefs[which]), which


def moments(found: Sequence[Array], policies: Sequence[list[Array]], agent: int) -> tuple[float, float, float]:
    """Mean and variance of ``f(s, a)``, and variance of ``f~(s, a_i)``, states uniform: by enumeration."""
    share = 1 / len(found)
    mean = square = marginal_square = 0.0
    for table, own in zip(found, policies, strict=True):
        for joint in joints(table.shape):
            mean += share * likelihood(joint, own) * table[joint]
            square += share * likelihood(joint, own) * table[joint] ** 2
        marginal_square += share * float(own[agent] @ marginalised(table, agent, own) ** 2)
    return mean, square - mean**2, marginal_square - mean**2


@pytest.mark.parametrize("style", ["v", "q"])
@pytest.mark.parametrize("sizes", TEAMS)
def test_the_variance_is_that_of_theorem_1(sizes: tuple[int, ...], style: str) -> None:
    """``Var(Q^) = Var(Q) / K + (K - 1) / K Var(Q~)``, and ``Var(Q) >= Var(Q~)``; the exact mean has ``Var(Q~)``."""
    critic = critic_of(sizes, style=style)
    states = some_states(3)
    policies = [random_policies(sizes, seed) for seed in (10, 11, 12)]
    found = [tables(critic, state.unsqueeze(0)) for state in states]
    rows, which = drawn_rows(critic.spec, states, policies, 20000)
    key = keys.STATE_VALUE if style == "v" else keys.ACTION_VALUE
    values = {k: written(with_options(critic, samples=k), rows.clone(), key)[..., 0] for k in (1, 2, 5)}
    exact = written(with_options(critic, exact="always"), rows.clone(), key)[..., 0]
    for agent in range(len(sizes)):
        own = [table[agent] for table in found]
        mean, joint, marginal = moments(own, policies, agent)
        assert joint > marginal * 1.02
        for k, value in values.items():
            variance_within(joint / k + (k - 1) / k * marginal, value[:, agent], mean)
        taken = rows[keys.ACTION][:, agent].numpy()
        means = [marginalised(table, agent, pi) for table, pi in zip(own, policies, strict=True)]
        wanted = np.array([means[number][action] for number, action in zip(which, taken, strict=True)])
        equal(exact[:, agent], wanted)
        variance_within(marginal, exact[:, agent], mean)


# --- 3: theorems 3 and 4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", TEAMS)
def test_the_policy_gradient_has_the_expectation_of_that_with_executed_actions(sizes: tuple[int, ...]) -> None:
    """Theorem 3, of a critic that is wrong, by enumeration; the sampled one within five standard errors."""
    critic = critic_of(sizes, style="q", samples=2)
    policies, state = random_policies(sizes, 20), some_states(1)
    rows = repeated(critic.spec, state, policies, 4000)
    exact = written(with_options(critic, exact="always"), rows[:1].clone(), keys.ACTION_VALUES)[0]
    sampled = written(critic, rows, keys.ACTION_VALUES)
    for agent, table in enumerate(tables(critic, state)):
        own = policies[agent]
        centralised = sum(likelihood(joint, policies) * table[joint] * score(own, joint[agent]) for joint in joints(sizes))
        averaged = sum(own[b] * exact[agent, b] * score(own, b) for b in range(sizes[agent]))
        assert np.abs(centralised).max() > 1e-3
        equal(averaged, centralised)
        weighed = np.stack([own[b] * score(own, b) for b in range(sizes[agent])])
        within(centralised, sampled[:, agent, : sizes[agent]] @ weighed)


@pytest.mark.parametrize("sizes", TEAMS)
def test_the_excess_variance_of_the_policy_gradient_falls_as_one_over_k(sizes: tuple[int, ...]) -> None:
    """The proof of theorem 4: ``Var(g^P) - Var(g^D) = (1/K) E[|grad log pi|^2 Var(Q | a_i)]``, below ``B^2 C^2 / K`` in one step.

    ``C`` is read as the bound of ``|Q|``: the paper prints ``sup Q``, which bounds nothing where values are negative.
    """
    critic = critic_of(sizes, style="q")
    policies, state = [random_policies(sizes, 21)], some_states(1)
    rows, _ = drawn_rows(critic.spec, state, policies, 20000)
    values = {k: written(with_options(critic, samples=k), rows.clone(), keys.ACTION_VALUE)[..., 0] for k in (1, 2, 5)}
    for agent, table in enumerate(tables(critic, state)):
        own = policies[0][agent]
        scores = np.stack([score(own, b) for b in range(sizes[agent])])
        norms = (scores**2).sum(1)
        averaged = marginalised(table, agent, policies[0])
        spread = marginalised(table**2, agent, policies[0]) - averaged**2
        mean = (own * averaged) @ scores
        decentralised = float(own @ (norms * averaged**2) - mean @ mean)
        excess = float(own @ (norms * spread))
        assert excess > 0.05 * decentralised
        taken = rows[keys.ACTION][:, agent].numpy()
        for k, value in values.items():
            gradients = value[:, agent, None] * scores[taken]
            within(decentralised + excess / k, ((gradients - mean) ** 2).sum(1))
            assert excess / k <= norms.max() * np.abs(table).max() ** 2 / k


def test_the_advantage_of_the_value_style_has_the_gradient_of_the_executed_next_value() -> None:
    """Theorem 3 where ``Q(s, a) = r + gamma V(s', a'_-i)``, as in the paper's experiments, through the estimator and its sign.

    The exact advantage ``r + gamma V~(s') - V~(s)`` weighs the score as ``r + gamma V(s', a'_-i)`` does at executed ``a'``.
    """
    sizes, gamma = (2, 3), 0.8
    critic = critic_of(sizes, exact="always")
    here, there = some_states(1), some_states(2, seed=9)
    now, later = random_policies(sizes, 30), [random_policies(sizes, 31), random_policies(sizes, 32)]
    everything = joints(sizes)
    reward = np.random.default_rng(1).normal(size=len(everything))
    arrived = [sum(joint) % 2 for joint in everything]
    values = [
        written(critic, repeated(critic.spec, x.unsqueeze(0), pi, 1), keys.STATE_VALUE)[0]
        for x, pi in zip(there, later, strict=True)
    ]
    first = written(critic, repeated(critic.spec, here, now, 1), keys.STATE_VALUE)[0]
    rollout = rollout_of(
        reward=torch.from_numpy(reward).view(-1, 1, 1, 1).expand(-1, 1, 2, 1).clone(),
        value=torch.from_numpy(first).expand(len(everything), 1, 2, 1).clone(),
        following=torch.from_numpy(np.stack([values[number] for number in arrived])).unsqueeze(1),
    )
    advantage = NStepEstimator(critic.spec, gamma=gamma, n=1)(rollout)[keys.ADVANTAGE][:, 0, :, 0].numpy()
    next_tables = [tables(critic, state.unsqueeze(0)) for state in there]
    for agent in range(2):
        wanted, found = np.zeros(sizes[agent]), np.zeros(sizes[agent])
        for number, joint in enumerate(everything):
            weight = likelihood(joint, now) * score(now[agent], joint[agent])
            table, policies = next_tables[arrived[number]][agent], later[arrived[number]]
            for following in everything:
                wanted += likelihood(following, policies) * weight * (reward[number] + gamma * table[following])
            found += weight * advantage[number, agent]
        assert np.abs(wanted).max() > 1e-3
        equal(found, wanted)


def rollout_of(reward: Tensor, value: Tensor, following: Tensor) -> TensorDict:
    """What an estimator reads, ``[B, T]``, nothing ended."""
    batch = TensorDict({}, batch_size=reward.shape[:2])
    never = torch.zeros(*reward.shape[:2], 1, dtype=torch.bool)
    batch.set(keys.REWARD, reward).set(keys.STATE_VALUE, value).set(keys.following(keys.STATE_VALUE), following)
    return batch.set(keys.TERMINATED, never).set(keys.DONE, never.clone())


# --- 4: algorithm 1 ----------------------------------------------------------------------------------------------------------

GAMMA = 0.99
"""Of the recipes."""
GAME = ["env={type: matrix_game, n_agents: 3, n_actions: 2, num_envs: 3}", "data.steps=3", "trainer.compile=none",
        "actor.hidden=[6]", "critic.hidden=[6]"]  # fmt: skip
TERMINATED_AT, TRUNCATED_AT = (1, 1), (2, 0)
"""Environment and step of a true end and of a cut; environment 0 goes on."""


def learner_of(recipe: str, *overrides: str) -> Learner:
    """The recipe around three agents with two actions; critic, the critic that lags and actor at random."""
    loaded = load_recipe(recipe, [*GAME, *overrides])
    learner = build_learner(loaded, build_environment(loaded, torch.device("cpu"), 0)).double()
    for seed, module in enumerate((learner.actor, learner.critic, learner.targets.critic())):
        randomise(module, seed + 1)
    return learner


def played(learner: Learner) -> TensorDict:
    """Three environments for three steps, ``[3, 3]``, as the actor would play them in states made up here."""
    spec = learner.critic.spec
    generator = torch.Generator().manual_seed(7)
    batch, arrived = TensorDict({}, batch_size=[3, 3]), TensorDict({}, batch_size=[3, 3])
    observed = torch.randn(3, 3, 3, 1, generator=generator, dtype=torch.float64)
    following = torch.cat([observed[:, 1:], torch.randn(3, 1, 3, 1, generator=generator, dtype=torch.float64)], 1)
    for end in (TERMINATED_AT, TRUNCATED_AT):
        following[end] = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    for part, seen in ((batch, observed), (arrived, following)):
        part.set(keys.OBSERVATION, seen).set(keys.STATE, seen.flatten(-2))
        part.set(keys.ACTION_MASK, torch.ones(3, 3, 3, 2, dtype=torch.bool))
        part.set(keys.ALIVE, torch.ones(3, 3, 3, 1, dtype=torch.bool))
        part.set(keys.IS_FIRST, torch.zeros(3, 3, 1, dtype=torch.bool))
    rows = learner.actor(batch.flatten(0, 1))
    batch = rows.unflatten(0, (3, 3)).detach().set("next", arrived)
    batch.set(keys.REWARD, torch.randn(3, 3, spec.n_agents, 1, generator=generator, dtype=torch.float64))
    ends = {keys.TERMINATED: TERMINATED_AT, keys.TRUNCATED: TRUNCATED_AT}
    for key, at in ends.items():
        batch.set(key, torch.zeros(3, 3, 1, dtype=torch.bool))
        batch[key][at] = True
    return batch.set(keys.DONE, batch[keys.TERMINATED] | batch[keys.TRUNCATED])


def policies_in(learner: Learner, seen: TensorDict) -> Array:
    """The actor's probabilities in states ``[B, T]``: ``[B, T, N, A]``."""
    with torch.no_grad():
        found: Tensor = learner.actor.distribution(seen.flatten(0, 1)).parameters()[keys.LOGITS].reshape(3, 3, 3, 2)
    return found.softmax(-1).numpy()


def averaged_values(learner: Learner, critic: MarginalisedCritic, seen: TensorDict) -> Array:
    """``V~_i``, or ``Q~_i`` of each own action, of a critic in states ``[B, T]``, under the policies there: ``[B, T, N, A]``."""
    found, policies = np.zeros((3, 3, 3, 2)), policies_in(learner, seen)
    for b, t in product(range(3), range(3)):
        observation = None if critic.options["view"] == "state" else seen[keys.OBSERVATION][b, t].unsqueeze(0)
        for agent, table in enumerate(tables(critic, seen[keys.STATE][b, t].unsqueeze(0), observation)):
            found[b, t, agent] = marginalised(table, agent, list(policies[b, t]))
    return found


@pytest.mark.parametrize("recipe", ["perla_mappo", "perla_ippo"])
@pytest.mark.parametrize("n", [1, 2, 10])
def test_the_targets_are_those_of_algorithm_1(recipe: str, n: int) -> None:
    """``G = r + gamma V~(s^{t+1})`` and ``A = G - V~(s^t)``, that is ``-delta``; no bootstrap after a true end, one after a cut.

    ``V~`` of the next state is that of the critic that lags (appendix D: a soft target network), under the policies there.
    With ``n`` steps (appendix D: 5 or 10) the rewards of several, up to an end or the end of the rollout.
    """
    learner = learner_of(recipe, f"estimator.n={n}")
    lagging = learner.targets.critic()
    assert isinstance(learner.critic, MarginalisedCritic)
    assert isinstance(lagging, MarginalisedCritic)
    batch = played(learner)
    baseline = averaged_values(learner, learner.critic, batch)[..., 0]
    following = averaged_values(learner, lagging, batch["next"])[..., 0]
    reward = batch[keys.REWARD][..., 0].numpy()
    terminated, done = (batch[key][..., 0].numpy() for key in (keys.TERMINATED, keys.DONE))
    learner.annotate(batch)
    learner.estimate(batch)
    equal(batch[keys.STATE_VALUE][..., 0].numpy(), baseline)
    for b, t in product(range(3), range(3)):
        wanted, weight, last = reward[b, t].copy(), GAMMA, t
        while last + 1 < min(t + n, 3) and not done[b, last]:
            last += 1
            wanted += weight * reward[b, last]
            weight *= GAMMA
        if not terminated[b, last]:
            wanted += weight * following[b, last]
        equal(batch[keys.VALUE_TARGET][b, t, :, 0].numpy(), wanted)
        delta = baseline[b, t] - wanted
        equal(batch[keys.ADVANTAGE][b, t, :, 0].numpy(), -delta)


def test_the_targets_of_own_action_values_are_those_of_algorithm_1() -> None:
    """``G = r + gamma Q~_i(s^{t+1}, a_i^{t+1})`` as printed, own actions executed; the advantage is ``Q~_i`` less its own mean.

    After a cut, and after the last step, the own action is one that the policy chooses.
    """
    learner = learner_of("perla_coma", "estimator.target.lmbda=0", "critic.exact=always", "update.minibatch_size=null")
    lagging = learner.targets.critic()
    assert isinstance(learner.critic, MarginalisedCritic)
    assert isinstance(lagging, MarginalisedCritic)
    batch = played(learner)
    now, policies = averaged_values(learner, learner.critic, batch), policies_in(learner, batch)
    following = averaged_values(learner, lagging, batch["next"])
    learner.annotate(batch)
    learner.estimate(batch)
    for b, t, agent in product(range(3), range(3), range(3)):
        reward, target = (batch[key][b, t, agent, 0].item() for key in (keys.REWARD, keys.VALUE_TARGET))
        if (b, t) == TERMINATED_AT:
            allowed = np.zeros(1)
        elif (b, t) == TRUNCATED_AT or t == 2:
            allowed = following[b, t, agent]
        else:
            allowed = following[b, t, agent, [batch[keys.ACTION][b, t + 1, agent].item()]]
        assert np.abs(reward + GAMMA * allowed - target).min() < 1e-9
        own = now[b, t, agent]
        wanted = own[batch[keys.ACTION][b, t, agent]] - policies[b, t, agent] @ own
        equal(batch[keys.ADVANTAGE][b, t, agent, 0].item(), wanted)


def test_the_policy_ascends_on_the_negative_td_error() -> None:
    """Line 10 of algorithm 1: before the policy has moved, PPO's loss has the gradient of ``mean(delta_i log pi_i(a_i))``."""
    learner = learner_of("perla_mappo", "estimator.n=1", "update.entropy_coef=0")
    lagging = learner.targets.critic()
    assert isinstance(learner.critic, MarginalisedCritic)
    assert isinstance(lagging, MarginalisedCritic)
    batch = played(learner)
    following = averaged_values(learner, lagging, batch["next"])[..., 0]
    following[TERMINATED_AT] = 0.0
    delta = averaged_values(learner, learner.critic, batch)[..., 0] - (batch[keys.REWARD][..., 0].numpy() + GAMMA * following)
    logits = learner.actor.distribution(batch.flatten(0, 1)).parameters()[keys.LOGITS].reshape(3, 3, 3, 2)
    log_prob = logits.log_softmax(-1).gather(-1, batch[keys.ACTION].unsqueeze(-1)).squeeze(-1)
    wanted = gradient(learner.actor, (torch.from_numpy(delta) * log_prob).mean())
    learner.annotate(batch)
    learner.estimate(batch)
    found = gradient(
        learner.actor, loss_of(learner, batch, lambda rows, learning: learner.update.fit_policy(rows, learning, range(3)))
    )
    assert np.abs(wanted).max() > 1e-3
    equal(found, wanted)


def gradient(module: torch.nn.Module, loss: Tensor) -> Array:
    """The gradient of a loss in all parameters of a module, in one row."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    every = [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    return torch.cat(every).numpy()


def loss_of(learner: Learner, batch: TensorDict, fit: Callable[[TensorDictBase, Learning], Metrics]) -> Tensor:
    """The loss that the recipe's update would minimise with its first step."""
    found: list[Tensor] = []

    def keep(loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        found.append(loss)
        return {}

    learning = Learning(learner.actor, learner.critic, learner.opponents, keep, 0.0)
    fit(learner.update.prepare(batch, learning), learning)
    return found[0]


# --- 5: what is regressed ----------------------------------------------------------------------------------------------------


def sampled_counts(table: Array, agent: int, value: float, samples: int) -> dict[tuple[int, ...], int]:
    """How often each joint action of the others was among the samples: the only choice whose mean is ``value``."""
    others = [joint for joint in joints(table.shape) if joint[agent] == 0]
    choices = list(combinations_with_replacement(others, samples))
    apart = np.array([abs(sum(table[joint] for joint in choice) / samples - value) for choice in choices])
    best, second = apart.argsort()[:2]
    assert apart[best] < 1e-9 < 1e-5 < apart[second]
    return {joint: choices[best].count(joint) for joint in set(choices[best])}


@pytest.mark.parametrize("style", ["v", "q"])
@pytest.mark.parametrize("current", ["executed", "sampled"])
def test_the_regression_follows_the_gradient_of_its_squared_error(current: str, style: str) -> None:
    """`executed`: ``(V(x, a_-i) - G)^2`` at what was played; `sampled`, algorithm 1: ``(mean_k V(x, a_-i^(k)) - G)^2``.

    The update minimises half the mean of these. Which samples were drawn is told from the value that they give.
    """
    samples = 3
    options = [f"critic.current={current}", f"critic.style={style}", f"critic.samples={samples}", "critic.exact=never"]
    learner = learner_of("perla_mappo", *options)
    critic = learner.critic
    assert isinstance(critic, MarginalisedCritic)
    batch = played(learner)
    learner.annotate(batch)
    learner.estimate(batch)
    assert not batch[keys.VALUE_TARGET].requires_grad
    value = batch[keys.STATE_VALUE if style == "v" else keys.ACTION_VALUE][..., 0]
    squares: list[Tensor] = []
    for b, t in product(range(3), range(3)):
        entries = differentiable_table(critic, batch[keys.STATE][b, t].unsqueeze(0)).reshape(2, 2, 2, 3)
        executed = tuple(batch[keys.ACTION][b, t].tolist())
        for agent in range(3):
            predicted = entries[(*executed, agent)]
            if current == "sampled":
                fixed = entries[..., agent].select(agent, executed[agent]).unsqueeze(agent)
                counts = sampled_counts(fixed.detach().numpy(), agent, value[b, t, agent].item(), samples)
                predicted = torch.stack([fixed[joint] * count for joint, count in counts.items()]).sum() / samples
            squares.append((predicted - batch[keys.VALUE_TARGET][b, t, agent, 0]).square())
    wanted = gradient(critic, torch.stack(squares).mean() / 2)
    found = gradient(critic, loss_of(learner, batch, learner.update.fit_critic))
    assert np.abs(wanted).max() > 0.1
    equal(found, wanted)


# --- 6: policies that change -------------------------------------------------------------------------------------------------


def learn_table(critic: MarginalisedCritic, payoff: Array) -> None:
    """Regress the value at executed actions on a payoff for every joint action, until it is that."""
    everything = joints(payoff.shape)
    rows = repeated(critic.spec, some_states(1), random_policies(payoff.shape, 0), len(everything), torch.tensor(everything))
    target = torch.tensor([payoff[joint] for joint in everything], dtype=torch.float64).view(-1, 1, 1)
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = (critic.predict(rows) - target).square().mean()
        found.backward()
        return found

    optimizer.step(loss)
    assert loss() < 1e-8


def test_the_value_moves_with_the_others_policies_by_the_enumerated_amount() -> None:
    """The game of table 1 as ``Q``: a critic that has learnt its payoffs gives ``sum_a pi'(a) Q(b, a)`` at once for a new policy.

    No parameter changes between the two, and the agent whose policy changed values its own actions as before.
    """
    sizes = (3, 3)
    payoff = np.array([[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 0.0]])
    critic = critic_of(sizes, style="q", exact="always", hidden=[16])
    learn_table(critic, payoff)
    before, changed = [np.array([0.2, 0.4, 0.4]), np.full(3, 1 / 3)], np.array([0.8, 0.1, 0.1])
    values = [
        written(critic, believed_truly(critic, policies), keys.ACTION_VALUES)[0] for policies in (before, [before[0], changed])
    ]
    np.testing.assert_allclose(values[0][0], payoff @ before[1], atol=1e-3)
    np.testing.assert_allclose(values[1][0] - values[0][0], payoff @ (changed - before[1]), atol=1e-3)
    np.testing.assert_allclose(values[1][1], payoff.T @ before[0], atol=1e-3)


def believed_truly(critic: MarginalisedCritic, policies: Sequence[Array]) -> TensorDict:
    """One row in which the opponents' section `true_policy` passes on what the actor would have written."""
    rows = repeated(critic.spec, some_states(1), policies, 1)
    bare = rows.select(keys.STATE, keys.OBSERVATION, keys.ACTION, keys.LOGITS)
    told: TensorDict = TruePolicyOpponents(critic.spec)(bare)
    return told


@pytest.mark.parametrize("style", ["v", "q"])
@pytest.mark.parametrize("value_norm", [True, False])
def test_a_change_of_one_policy_of_three_moves_the_values_by_its_share(style: str, value_norm: bool) -> None:
    """``sum_{a_-i} (pi'_j - pi_j)(a_j) prod_{k != i, j} pi_k(a_k) f_i(b, a_-i)``, in real units where targets are scaled too."""
    sizes, moved = (3, 2, 2), 1
    critic = critic_of(sizes, style=style, exact="always", value_norm=value_norm)
    critic.learn_scale(torch.linspace(-30, 50, 40, dtype=torch.float64).view(-1, 1, 1))
    before = random_policies(sizes, 40)
    after = [random_policies(sizes, 41)[j] if j == moved else policy for j, policy in enumerate(before)]
    key = keys.STATE_VALUE if style == "v" else keys.ACTION_VALUES
    values = [written(critic, believed_truly(critic, policies), key)[0] for policies in (before, after)]
    for agent, table in enumerate(tables(critic, some_states(1))):
        difference = values[1][agent] - values[0][agent]
        wanted = np.zeros(sizes[agent])
        for joint in joints(sizes):
            if agent != moved:
                rest = np.prod([before[k][joint[k]] for k in range(3) if k not in (agent, moved)])
                wanted[joint[agent]] += (after[moved] - before[moved])[joint[moved]] * rest * table[joint]
        equal(difference[: sizes[agent] if style == "q" else 1], wanted if style == "q" else wanted[:1])
        assert agent == moved or np.abs(wanted).max() > 1e-3
