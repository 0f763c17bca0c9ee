"""Why agents update one after another (Kuba et al. 2022), by enumeration.

The advantage decomposition, the compound factor, the product game in which simultaneous trust regions fail, monotone returns.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import marlkit
from marlkit.functional.losses import approximate_kl, policy_gradient_loss, ppo_clip_loss
from marlkit.functional.reduce import masked_mean
from marlkit.functional.sequential import compound
from marlkit.recipe import load_recipe

assert_exact = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)

SIZES = (2, 3, 4)
ORDERS = list(itertools.permutations(range(3)))
LETTERS = "abc"


def random_policies(generator: np.random.Generator, sizes: Sequence[int], states: int | None = None) -> list[np.ndarray]:
    shape = () if states is None else (states,)
    return [generator.dirichlet(np.ones(size), size=shape or None) for size in sizes]


class OneStateGame:
    """Three unequal agents in one state: a table of action values, policies before and after, every joint action a row."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.action_value = generator.normal(size=SIZES)
        self.old, self.new = random_policies(generator, SIZES), random_policies(generator, SIZES)
        self.value = self.mean_of(self.action_value, self.old)
        self.actions = torch.cartesian_prod(*(torch.arange(size) for size in SIZES))
        self.old_log_prob = [torch.from_numpy(p).log()[self.actions[:, i], None] for i, p in enumerate(self.old)]
        self.new_log_prob = [torch.from_numpy(p).log()[self.actions[:, i], None] for i, p in enumerate(self.new)]
        self.weight = torch.cat(self.old_log_prob, -1).sum(-1, keepdim=True).exp()
        self.advantage = torch.from_numpy(self.action_value - self.value).flatten().unsqueeze(-1)
        self.alive = torch.ones_like(self.weight, dtype=torch.bool)

    @staticmethod
    def mean_of(table: np.ndarray, policies: Sequence[np.ndarray]) -> float:
        return float(np.einsum("abc,a,b,c->", table, *policies))

    def prefix_value(self, prefix: Sequence[int]) -> np.ndarray:
        """Action value of the agents in ``prefix``, the others averaged under their old policies; axes in agent order."""
        averaged = [i for i in range(3) if i not in prefix]
        kept = "".join(LETTERS[i] for i in sorted(prefix))
        operands = ",".join(["abc", *(LETTERS[i] for i in averaged)])
        return np.einsum(f"{operands}->{kept}", self.action_value, *(self.old[i] for i in averaged))

    def advantage_of_prefix(self, prefix: Sequence[int], action: Sequence[int]) -> float:
        """``E_old[M_{1:m}]`` where each agent of ``prefix`` moves to the policy that always takes its entry of ``action``."""
        factor = self.advantage
        for agent in prefix:
            certain = (self.actions[:, agent, None] == action[agent]).to(torch.float64).log()
            factor = compound(factor, certain, self.old_log_prob[agent], self.alive)
        return masked_mean(factor, self.weight).item()


@pytest.mark.parametrize("order", ORDERS)
def test_advantages_of_agents_in_turn_sum_to_the_joint_advantage(order: tuple[int, ...]) -> None:
    game = OneStateGame(seed=1)
    for action in itertools.product(*(range(size) for size in SIZES)):
        total = 0.0
        for position, agent in enumerate(order):
            before, after = order[:position], order[: position + 1]
            marginal = game.advantage_of_prefix(after, action) - game.advantage_of_prefix(before, action)
            values = [game.prefix_value(prefix)[tuple(action[i] for i in sorted(prefix))] for prefix in (after, before)]
            assert marginal == pytest.approx(values[0] - values[1], abs=1e-10), (action, agent)
            total += marginal
        assert total == pytest.approx(game.action_value[action] - game.value, abs=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_advantage_in_turn_is_zero_on_average_over_the_own_old_policy(order: tuple[int, ...]) -> None:
    game = OneStateGame(seed=2)
    for position, agent in enumerate(order):
        before, after = order[:position], order[: position + 1]
        for fixed in itertools.product(*(range(SIZES[i]) for i in before)):
            action = [0, 0, 0]
            for i, choice in zip(before, fixed, strict=True):
                action[i] = choice
            base = game.advantage_of_prefix(before, action)
            moved = [[*action[:agent], own, *action[agent + 1 :]] for own in range(SIZES[agent])]
            gains = [game.advantage_of_prefix(after, choice) - base for choice in moved]
            assert np.dot(game.old[agent], gains) == pytest.approx(0.0, abs=1e-10)
            assert np.ptp(gains) > 1e-3


def test_divergence_of_the_joint_policy_is_the_sum_over_agents() -> None:
    game = OneStateGame(seed=3)
    joint_old, joint_new = (np.einsum("a,b,c->abc", *policies) for policies in (game.old, game.new))
    exact = float(np.sum(joint_old * np.log(joint_old / joint_new)))
    sum_new, sum_old = (torch.stack(parts, 1).sum(1) for parts in (game.new_log_prob, game.old_log_prob))
    assert approximate_kl(sum_new, sum_old, game.weight).item() == pytest.approx(exact, abs=1e-10)
    pairs = zip(game.new_log_prob, game.old_log_prob, strict=True)
    assert sum(approximate_kl(new, old, game.weight).item() for new, old in pairs) == pytest.approx(exact, abs=1e-10)
    new_of_agents, old_of_agents = (torch.stack(parts, 1) for parts in (game.new_log_prob, game.old_log_prob))
    assert 3 * approximate_kl(new_of_agents, old_of_agents, game.weight.unsqueeze(1)).item() == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize("dead", [None, 0, 1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_mean_of_the_factor_is_the_advantage_of_the_new_policies(order: tuple[int, ...], dead: int | None) -> None:
    game = OneStateGame(seed=4)
    policies, factor, ratio = list(game.old), game.advantage, np.ones(SIZES)
    for agent in order:
        alive = torch.full_like(game.alive, agent != dead)
        factor = compound(factor, game.new_log_prob[agent], game.old_log_prob[agent], alive)
        if agent != dead:
            policies[agent] = game.new[agent]
            shape = [SIZES[i] if i == agent else 1 for i in range(3)]
            ratio = ratio * (game.new[agent] / game.old[agent]).reshape(shape)
        expected = game.mean_of(game.action_value - game.value, policies)
        assert masked_mean(factor, game.weight).item() == pytest.approx(expected, abs=1e-10)
    assert_exact(factor, torch.from_numpy((game.action_value - game.value) * ratio).flatten().unsqueeze(-1))


@pytest.mark.parametrize("order", ORDERS)
def test_loss_of_an_agent_in_turn_is_the_return_given_those_before_it(order: tuple[int, ...]) -> None:
    """Value and gradient of the surrogate, at parameters of the agent in turn away from its old policy."""
    game = OneStateGame(seed=5)
    policies, factor = list(game.old), game.advantage
    for agent in order:
        logits = torch.from_numpy(game.new[agent]).log().requires_grad_()
        log_prob = logits.log_softmax(-1)[game.actions[:, agent], None]
        loss = ppo_clip_loss(log_prob, game.old_log_prob[agent], factor, game.weight, clip_epsilon=math.inf)
        policies[agent] = game.new[agent]
        expected = game.mean_of(game.action_value - game.value, policies)
        assert -loss.item() == pytest.approx(expected, abs=1e-10)
        others = [torch.from_numpy(p) for i, p in enumerate(policies) if i != agent]
        letters = [LETTERS[i] for i in range(3) if i != agent]
        table = torch.from_numpy(game.action_value)
        own = torch.einsum(f"abc,{letters[0]},{letters[1]}->{LETTERS[agent]}", table, *others)
        policy = torch.from_numpy(game.new[agent])
        slope = policy * (own - policy @ own)
        assert_exact(-torch.autograd.grad(loss, logits)[0], slope)
        factor = compound(factor, game.new_log_prob[agent], game.old_log_prob[agent], game.alive)


class ProductGame:
    """Reward ``a_1 * a_2`` of two normal actions with deviation one; integrals by quadrature, exact to 1e-10 here."""

    def __init__(self, mean: tuple[float, float] = (-0.25, 0.25), nodes: int = 40) -> None:
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        grid = np.stack(np.meshgrid(points, points, indexing="ij"), -1).reshape(-1, 2)
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.action = torch.from_numpy(grid) + self.mean
        self.weight = torch.from_numpy(np.outer(weights, weights).reshape(-1, 1) / (2 * math.pi))
        self.reward = self.action.prod(-1, keepdim=True)
        self.alive = torch.ones_like(self.reward, dtype=torch.bool)

    def log_prob(self, agent: int, mean: Tensor) -> Tensor:
        return -0.5 * (self.action[:, agent, None] - mean).square()

    def gradient(self, agent: int, factor: Tensor, *, ppo: bool) -> float:
        mean = self.mean[agent].clone().requires_grad_()
        log_prob = self.log_prob(agent, mean)
        if ppo:
            loss = ppo_clip_loss(log_prob, log_prob.detach(), factor, self.weight, clip_epsilon=math.inf)
        else:
            loss = policy_gradient_loss(log_prob, factor, self.weight)
        return -float(torch.autograd.grad(loss, mean)[0])

    def trust_region_step(self, agent: int, factor: Tensor, radius: float, *, ppo: bool) -> Tensor:
        """KL = step^2 / 2 <= radius: the exact solution goes the whole way in the gradient's direction."""
        direction = np.sign(self.gradient(agent, factor, ppo=ppo))
        return self.mean[agent] + math.sqrt(2 * radius) * direction

    def past(self, agent: int, mean: Tensor, factor: Tensor) -> Tensor:
        return compound(factor, self.log_prob(agent, mean), self.log_prob(agent, self.mean[agent]), self.alive)


@pytest.mark.parametrize("ppo", [False, True])
def test_simultaneous_trust_region_steps_can_make_the_team_worse(ppo: bool) -> None:
    game = ProductGame()
    assert masked_mean(game.reward, game.weight).item() == pytest.approx(-0.0625, abs=1e-10)
    assert [game.gradient(i, game.reward, ppo=ppo) for i in range(2)] == pytest.approx([0.25, -0.25], abs=1e-10)
    moved = [game.trust_region_step(i, game.reward, 0.5, ppo=ppo).item() for i in range(2)]
    assert moved == pytest.approx([0.75, -0.75], abs=1e-12)
    assert moved[0] * moved[1] == pytest.approx(-0.5625, abs=1e-12)


@pytest.mark.parametrize("ppo", [False, True])
@pytest.mark.parametrize(("order", "expected"), [((0, 1), (0.75, 1.25)), ((1, 0), (-1.25, -0.75))])
def test_sequential_trust_region_steps_make_it_better(order: tuple[int, int], expected: tuple[float, float], ppo: bool) -> None:
    game = ProductGame()
    factor, mean = game.reward, game.mean.clone()
    for agent in order:
        mean[agent] = game.trust_region_step(agent, factor, 0.5, ppo=ppo)
        factor = game.past(agent, mean[agent], factor)
        assert masked_mean(factor, game.weight).item() == pytest.approx(mean.prod().item(), abs=1e-9)
    assert mean.tolist() == pytest.approx(expected, abs=1e-12)
    assert mean.prod().item() == pytest.approx(0.9375, abs=1e-12)


def test_small_simultaneous_gradient_steps_do_not_show_the_failure() -> None:
    """J(eta) = -0.0625 (1 - eta)^2 after a step of size eta improves until eta = 2."""
    game = ProductGame()
    gradient = torch.tensor([game.gradient(i, game.reward, ppo=False) for i in range(2)], dtype=torch.float64)
    for eta in (0.1, 0.5, 1.0, 1.5, 1.99, 2.01, 3.0):
        after = (game.mean + eta * gradient).prod().item()
        assert after == pytest.approx(-0.0625 * (1 - eta) ** 2, abs=1e-10)
        assert (after > -0.0625) == (eta < 2)


def test_a_few_clipped_simultaneous_epochs_do_not_show_it_either() -> None:
    game = ProductGame()
    mean = game.mean.clone().requires_grad_()
    old = [game.log_prob(i, game.mean[i]) for i in range(2)]
    for _ in range(5):
        losses = [ppo_clip_loss(game.log_prob(i, mean[i]), old[i], game.reward, game.weight, clip_epsilon=0.2) for i in range(2)]
        slope = torch.autograd.grad(losses[0] + losses[1], mean)[0]
        mean = (mean - 0.3 * slope).detach().requires_grad_()
    assert -0.0625 < mean.prod().item() < 0


class RandomDecisionProcess:
    """A small team decision process with everything exact: values by linear solve, state distribution, advantages."""

    gamma = 0.5

    def __init__(self, seed: int, agents: int, states: int = 3, actions: int = 2) -> None:
        generator = np.random.default_rng(seed)
        self.agents, self.states, self.n_actions = agents, states, actions
        self.joint = list(itertools.product(range(actions), repeat=agents))
        self.transition = generator.dirichlet(np.full(states, 0.5), size=(states, len(self.joint)))
        self.reward = generator.normal(size=(states, len(self.joint)))
        self.start = np.full(states, 1 / states)
        self.policies = np.stack(random_policies(generator, [actions] * agents, states))
        self.row_state = torch.arange(states).repeat_interleave(len(self.joint))
        self.row_action = torch.tensor(self.joint * states)

    def joint_policy(self, policies: np.ndarray) -> np.ndarray:
        chosen = [[[policies[i, s, a[i]] for i in range(self.agents)] for a in self.joint] for s in range(self.states)]
        return np.prod(np.array(chosen), axis=-1)

    def evaluate(self, policies: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Exact return, discounted state distribution (sums to one) and advantages ``[S, joint actions]``."""
        joint = self.joint_policy(policies)
        moves = np.einsum("sa,sat->st", joint, self.transition)
        resolvent = np.linalg.inv(np.eye(self.states) - self.gamma * moves)
        value = resolvent @ np.sum(joint * self.reward, -1)
        advantage = self.reward + self.gamma * self.transition @ value - value[:, None]
        return float(self.start @ value), (1 - self.gamma) * self.start @ resolvent, advantage

    def log_prob(self, table: Tensor, agent: int) -> Tensor:
        return table[self.row_state, self.row_action[:, agent]].unsqueeze(-1)


def penalised_step(
    process: RandomDecisionProcess, agent: int, policy: np.ndarray, factor: Tensor, weight: Tensor, penalty: float
) -> tuple[np.ndarray, float, float]:
    """The best of some policies that lean towards the surrogate, its surrogate gain and its penalised gain (never negative)."""
    old = process.log_prob(torch.from_numpy(policy).log(), agent)

    def surrogate(table: Tensor) -> Tensor:
        loss = ppo_clip_loss(process.log_prob(table, agent), old, factor, weight, clip_epsilon=math.inf)
        return -loss / (1 - process.gamma)

    start = torch.from_numpy(policy).log().requires_grad_()
    base = surrogate(start)
    visits = torch.zeros(policy.shape, dtype=torch.float64)
    visits.index_put_((process.row_state, process.row_action[:, agent]), weight.squeeze(-1), accumulate=True)
    direction = (torch.autograd.grad(base, start)[0] / visits).numpy()
    best = (policy, 0.0, 0.0)
    for lean in np.concatenate([[0.0], np.logspace(-4, 1, 16)]):
        tilted = policy * np.exp(lean * (direction - direction.max(-1, keepdims=True)))
        tilted = tilted / tilted.sum(-1, keepdims=True)
        gain = (surrogate(torch.from_numpy(tilted).log()) - base).item()
        divergence = np.sum(policy * np.log(policy / tilted), -1).max()
        if gain - penalty * divergence > best[2]:
            best = (tilted, gain, gain - penalty * divergence)
    return best


def iterate(process: RandomDecisionProcess, policies: np.ndarray, order: Iterable[int], caution: float) -> tuple[float, float]:
    """One iteration of algorithm 1 on the policies, in place: the agents' surrogate gains and their penalised gains.

    The penalty is ``caution`` times that of the theory.
    """
    _, visits, advantage = process.evaluate(policies)
    penalty = caution * 4 * process.gamma * np.abs(advantage).max() / (1 - process.gamma) ** 2
    weight = torch.from_numpy(visits[:, None] * process.joint_policy(policies)).reshape(-1, 1)
    factor, gains, bound = torch.from_numpy(advantage).reshape(-1, 1), 0.0, 0.0
    for agent in order:
        old = process.log_prob(torch.from_numpy(policies[agent]).log(), agent)
        policies[agent], gain, penalised = penalised_step(process, agent, policies[agent], factor, weight, penalty)
        new = process.log_prob(torch.from_numpy(policies[agent]).log(), agent)
        factor = compound(factor, new, old, torch.ones_like(factor, dtype=torch.bool))
        gains, bound = gains + gain, bound + penalised
    return gains, bound


@pytest.mark.parametrize(("seed", "agents"), [(0, 2), (1, 2), (2, 3), (3, 3)])
def test_sequential_penalised_updates_never_lower_the_return(seed: int, agents: int) -> None:
    process, generator = RandomDecisionProcess(seed, agents), np.random.default_rng(seed)
    policies = process.policies.copy()
    first, _, _ = process.evaluate(policies)
    for _ in range(100):
        old = policies.copy()
        before, visits, advantage = process.evaluate(old)
        gains, bound = iterate(process, policies, generator.permutation(agents), caution=1.0)
        after, _, _ = process.evaluate(policies)
        expected_gain = np.sum(visits[:, None] * process.joint_policy(policies) * advantage) / (1 - process.gamma)
        assert gains == pytest.approx(expected_gain, abs=1e-10)
        assert after - before >= bound - 1e-12
        assert bound >= 0
    assert after - first > 0.1


def best_response_gain(process: RandomDecisionProcess, policies: np.ndarray, agent: int) -> float:
    """How much more the team would get if one agent alone did what is best, by policy iteration in its own process."""
    value, _, _ = process.evaluate(policies)
    answer, best = policies.copy(), -math.inf
    for _ in range(50):
        found, _, advantage = process.evaluate(answer)
        if found <= best + 1e-14:
            break
        best = found
        others = answer.copy()
        others[agent] = 1.0
        weighted = process.joint_policy(others) * advantage
        own = [weighted[:, np.array(process.joint)[:, agent] == action].sum(-1) for action in range(process.n_actions)]
        answer[agent] = np.eye(process.n_actions)[np.argmax(own, 0)]
    return best - value


@pytest.mark.parametrize(("seed", "agents"), [(0, 2), (1, 2), (2, 3)])
def test_sequential_updates_in_random_order_end_where_no_agent_gains_alone(seed: int, agents: int) -> None:
    """Theorem 3: every limit is a Nash equilibrium. A hundredth of the penalty gets there in reasonable time."""
    process, generator = RandomDecisionProcess(seed, agents), np.random.default_rng(seed)
    in_turn, first_only = process.policies.copy(), process.policies.copy()

    def most(policies: np.ndarray) -> float:
        return max(best_response_gain(process, policies, agent) for agent in range(agents))

    assert most(in_turn) > 0.1
    for _ in range(60):
        iterate(process, in_turn, generator.permutation(agents), caution=0.01)
        iterate(process, first_only, [0], caution=0.01)
    assert most(in_turn) < 1e-3
    assert most(first_only) > 0.1


RADIUS = ["kl_limit=0.5", "damping=0.001", "backtrack_factor=0.99", "epochs=1", "minibatch_size=null"]
"""A trust region in which a mean moves by one deviation: KL = 1/2."""


@pytest.mark.parametrize(
    ("recipe", "means", "expected"),
    [
        (["mappo", "actor.share=none", "update=trust_region", *(f"update.{o}" for o in RADIUS)], (0.75, -0.75), -0.5625),
        (["hatrpo", "update.order=[0,1]", *(f"update.step.{o}" for o in RADIUS)], (0.75, 1.25), 0.9375),
        (["hatrpo", "update.order=[1,0]", *(f"update.step.{o}" for o in RADIUS)], (-1.25, -0.75), 0.9375),
    ],
    ids=["at once", "first first", "second first"],
)
def test_the_figures_of_the_product_game_come_out_of_a_recipe(
    recipe: list[str], means: tuple[float, float], expected: float, tmp_path: Path
) -> None:
    """HA-1, by an iteration of training from (-0.25, 0.25), where the expected reward is -0.0625; up to sampling."""
    name, *overrides = recipe
    start = [-0.25, 0.25]
    game = f"env={{type: product_game, start: {start}, num_envs: 40000}}"
    short = ["data.steps=1", "actor.hidden=[]", "critic.hidden=[4]", "trainer.iterations=1", "trainer.video=false"]
    short += ["trainer.evaluation_episodes=2"]
    folder = marlkit.train(load_recipe(name, [game, *short, *overrides]), tmp_path, progress=False)
    chosen = marlkit.load_policy(folder, "last")(torch.ones(1, 2, 1))
    reached = [own + moved for own, moved in zip(start, chosen.flatten().tolist(), strict=True)]
    assert reached == pytest.approx(means, abs=0.05)
    assert reached[0] * reached[1] == pytest.approx(expected, abs=0.08)
