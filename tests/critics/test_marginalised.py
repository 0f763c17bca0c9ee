"""The marginalised critic against enumeration (PERLA-3 to PERLA-5, D3, D4)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, learner_of, random_script

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.counterfactual import CounterfactualCritic
from marlkit.critics.local import LocalCritic
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.data.rollout import RolloutData
from marlkit.errors import OptionError, RecipeError
from marlkit.functional import marginal
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.recipe import load_recipe
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import fake_batch
from marlkit.training.dry_run import dry_run

DISCRETE = TeamSpec(3, 4, Discrete(3), action_sizes=(3, 2, 3))
CONTINUOUS = TeamSpec(3, 4, Continuous(2), action_sizes=(2, 1, 2))
BOUNDED = TeamSpec(3, 4, Continuous(2, ((-0.5, -0.2), (0.0, 0.0), (-1.0, 0.1)), ((0.5, 0.3), (0.4, 0.0), (0.0, 0.2))))


def critic(spec: TeamSpec, **options: Any) -> MarginalisedCritic:
    torch.manual_seed(0)
    return MarginalisedCritic(spec, **{"current": "sampled", "hidden": [8, 6], "value_norm": False, **options}).double()


def batch_for(spec: TeamSpec, rows: int = 3, seed: int = 0, views: int = 1) -> Any:
    reads = MarginalisedCritic(spec, current="executed", style="q" if spec.discrete else "v").reads
    batch = fake_batch(spec, [rows], dict.fromkeys([keys.STATE, keys.OBSERVATION, *reads]), seed, views)
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


def value_of(net: Any, view: torch.Tensor, agent: int, actions: torch.Tensor) -> torch.Tensor:
    """V_i(x, a_-i), or Q_i(x, ., a_-i), written out: the own slot zeroed, actions one-hot ``[N, A]`` or real ``[N, D]``."""
    others = actions.clone()
    others[agent] = 0
    layers, group = net.network.layers, net.network.layers[0].groups[agent]
    hidden = layers[0].weights[group] @ view + layers[0].biases[group] + net.action_layer.weights[group] @ others.flatten()
    if net.network.identity is not None:
        hidden = hidden + net.network.identity[agent]
    for layer in layers[1:]:
        hidden = layer.weights[group] @ torch.tanh(hidden) + layer.biases[group]
    return hidden


def enumerated(net: MarginalisedCritic, batch: Any) -> torch.Tensor:
    """Sum over a_-i of pi_-i V_i, or of pi_-i Q_i of each own action, by a plain loop over all joint actions."""
    spec, rows = net.spec, len(batch)
    values = torch.zeros(rows, spec.n_agents, net.outputs, dtype=torch.float64)
    for row, agent in itertools.product(range(rows), range(spec.n_agents)):
        beliefs = batch[keys.OPPONENT_LOGITS][row]
        probabilities = beliefs[agent if len(beliefs) > 1 else 0].softmax(-1)
        view = batch[keys.STATE][row] if net.view == "state" else batch[keys.OBSERVATION][row, agent]
        for joint in itertools.product(range(spec.action_features), repeat=spec.n_agents):
            if joint[agent] != 0:
                continue
            weight = math.prod(float(probabilities[j, a]) for j, a in enumerate(joint) if j != agent)
            one_hot = torch.nn.functional.one_hot(torch.tensor(joint), spec.action_features).double()
            values[row, agent] += weight * value_of(net, view, agent, one_hot)
    return values


@pytest.mark.parametrize("view", ["state", "own"])
@pytest.mark.parametrize("share", ["all", "none", [[0, 2], [1]]], ids=["all", "none", "groups"])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_exact_sum_equals_enumeration(view: str, share: Any, chunk: int) -> None:
    net, batch = critic(DISCRETE, view=view, share=share, exact="always", chunk=chunk), batch_for(DISCRETE)
    torch.testing.assert_close(net.predict(batch), enumerated(net, batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("current", ["sampled", "executed"])
@pytest.mark.parametrize("views", [1, 3])
def test_every_own_action_is_valued_by_enumeration(current: str, views: int) -> None:
    net, batch = critic(DISCRETE, style="q", current=current, exact="always", chunk=7), batch_for(DISCRETE, views=views)
    expected = enumerated(net, batch)
    assert torch.equal(net.action_values(batch)[0], net(batch)[keys.ACTION_VALUES])
    torch.testing.assert_close(batch[keys.ACTION_VALUES], expected, rtol=0, atol=1e-10)
    taken = expected.gather(-1, batch[keys.ACTION].unsqueeze(-1))
    torch.testing.assert_close(batch[keys.ACTION_VALUE], taken, rtol=0, atol=1e-10)
    policy = batch[keys.LOGITS].softmax(-1)
    torch.testing.assert_close(batch[keys.STATE_VALUE], (policy * expected).sum(-1, keepdim=True), rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", ["all", "none", [[0, 2], [1]]], ids=["all", "none", "groups"])
@pytest.mark.parametrize("view", ["state", "own"])
@pytest.mark.parametrize(
    ("spec", "style"),
    [(DISCRETE, "v"), (DISCRETE, "q"), (CONTINUOUS, "v"), (BOUNDED, "v")],
    ids=["v", "q", "continuous", "bounds"],
)
def test_what_is_regressed_is_the_value_at_the_executed_actions(spec: TeamSpec, style: str, view: str, share: Any) -> None:
    net = critic(spec, current="executed", style=style, view=view, share=share)
    for views in (1, 3):
        batch = batch_for(spec, views=views)
        if not spec.discrete:
            batch[keys.JOINT_ACTION].mul_(3)  # beyond the bounds, where there are any
        found = net.predict(batch)
        for row, agent in itertools.product(range(len(batch)), range(3)):
            joint = batch[keys.JOINT_ACTION][row, agent if views > 1 else 0]
            x = batch[keys.STATE][row] if view == "state" else batch[keys.OBSERVATION][row, agent]
            values = value_of(net, x, agent, as_executed(joint, spec, batch[row]))
            wanted = values[batch[keys.ACTION][row, agent]] if style == "q" else values[0]
            torch.testing.assert_close(found[row, agent, 0], wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(net(batch)[keys.EXECUTED_VALUE], found, rtol=0, atol=1e-12)


def as_executed(joint: torch.Tensor, spec: TeamSpec, row: Any) -> torch.Tensor:
    """One-hot actions ``[N, A]``, or real ones ``[N, D]`` as the environment clips them, padding set to zero."""
    if isinstance(spec.action, Discrete):
        return torch.nn.functional.one_hot(joint, spec.action_features).double()
    if spec.action.low is not None:
        joint = torch.minimum(torch.maximum(joint, torch.tensor(spec.action.low)), torch.tensor(spec.action.high))
    return joint.double() * row[keys.ACTION_DIMS]


def samples_of(net: MarginalisedCritic, batch: Any) -> torch.Tensor:
    """The joint actions that each row draws, ``[R, K, N]`` or ``[R, K, N, D]``, rebuilt from the public sampling functions."""
    draws = 1 if net.spec.discrete else net.spec.action_features
    uniform = marginal.counter_uniform(batch[keys.SAMPLE_SEED], 0, net.samples * net.spec.n_agents * draws)
    uniform = uniform.view(len(batch), net.samples, net.spec.n_agents, draws)
    if net.spec.discrete:
        return marginal.categorical_from_uniform(batch[keys.OPPONENT_LOGITS], uniform.squeeze(-1))
    noise = marginal.normal_from_uniform(uniform)
    return batch[keys.OPPONENT_LOC] + batch[keys.OPPONENT_SCALE] * noise


@pytest.mark.parametrize(
    ("spec", "style"),
    [(DISCRETE, "v"), (DISCRETE, "q"), (CONTINUOUS, "v"), (BOUNDED, "v")],
    ids=["v", "q", "continuous", "bounds"],
)
@pytest.mark.parametrize("share", ["all", "none", [[0, 2], [1]]], ids=["all", "none", "groups"])
@pytest.mark.parametrize("chunk", [1, 13, 4096])
def test_sampled_mean_equals_a_loop_over_its_samples(spec: TeamSpec, style: str, share: Any, chunk: int) -> None:
    net, batch = critic(spec, style=style, share=share, samples=9, exact="never", chunk=chunk), batch_for(spec)
    samples = samples_of(net, batch)
    expected = torch.zeros(len(batch), 3, net.outputs, dtype=torch.float64)
    for row, agent, k in itertools.product(range(len(batch)), range(3), range(9)):
        actions = as_executed(samples[row, k], spec, batch[row])
        expected[row, agent] += value_of(net, batch[keys.STATE][row], agent, actions) / 9
    torch.testing.assert_close(net.averaged(batch), expected, rtol=0, atol=1e-6)


def test_samples_enter_as_the_environment_clips_them() -> None:
    net, batch = critic(BOUNDED, samples=50, exact="never"), batch_for(BOUNDED)
    plain = critic(CONTINUOUS, samples=50, exact="never")
    plain.load_state_dict(net.state_dict())
    batch[keys.OPPONENT_LOC].fill_(-9.0)
    clipped = batch.clone()
    clipped[keys.OPPONENT_LOC].copy_(torch.tensor(BOUNDED.action.low))  # type: ignore[union-attr]
    clipped[keys.OPPONENT_SCALE].zero_()
    torch.testing.assert_close(net.averaged(batch), plain.averaged(clipped), rtol=0, atol=1e-10)


@pytest.mark.parametrize("current", ["sampled", "executed"])
@pytest.mark.parametrize(("spec", "style"), [(DISCRETE, "v"), (DISCRETE, "q"), (CONTINUOUS, "v")], ids=["v", "q", "continuous"])
def test_chunks_change_neither_loss_nor_gradient_and_bound_the_rows(spec: TeamSpec, style: str, current: str) -> None:
    batch, gradients, peaks = batch_for(spec), [], []
    for chunk in (12, 10**6):
        net = critic(spec, style=style, current=current, samples=9, exact="never", chunk=chunk)
        rows: list[int] = []
        net.network.layers[1].register_forward_hook(lambda _m, _i, output, seen=rows: seen.append(output[..., 0].numel()))
        with torch.no_grad():
            net(batch.clone())
        (net.predict(batch) - 1).square().mean().backward()
        gradients.append([torch.zeros(0) if p.grad is None else p.grad.clone() for p in net.parameters()])
        peaks.append(max(rows))
    for chunked, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-10)
    assert peaks[0] <= 12 < peaks[1]


def test_sample_mean_converges_to_the_exact_sum() -> None:
    batch, count = batch_for(DISCRETE, rows=1), 4000
    exact = critic(DISCRETE, exact="always").predict(batch)
    net = critic(DISCRETE, samples=count, exact="never")
    joints = samples_of(net, batch)[0]
    one_hot = torch.nn.functional.one_hot(joints, 3).double()
    state = batch[keys.STATE][0]
    spread = torch.stack([torch.stack([value_of(net, state, i, a) for a in one_hot[:400]]).std() for i in range(3)])
    assert ((net.predict(batch) - exact)[0, :, 0].abs() < 5 * spread / math.sqrt(count)).all()


def test_samples_follow_the_policies_and_never_take_a_masked_action() -> None:
    logits = torch.tensor([[0.0, 1.0, -1e10, 2.0], [-1e10, 0.5, 0.5, -1e10]])
    count = 60000
    uniform = marginal.counter_uniform(torch.tensor([[12345]]), 0, 2 * count).view(count, 2)
    drawn = marginal.categorical_from_uniform(logits, uniform)
    for agent in range(2):
        probabilities = logits[agent].softmax(-1)
        observed = torch.bincount(drawn[:, agent], minlength=4).double()
        assert (observed[probabilities == 0] == 0).all()
        expected = probabilities[probabilities > 0].double() * count
        chi_square = ((observed[probabilities > 0] - expected).square() / expected).sum()
        assert float(chi_square) < 25  # 5 sigma and more for at most two degrees of freedom


def test_counter_based_numbers_are_uniform_and_independent() -> None:
    count = 40000
    numbers = marginal.counter_uniform(torch.tensor([[1], [2]]), 0, count).double()
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    deviation = 1 / math.sqrt(12 * count)
    assert (numbers.mean(1) - 0.5).abs().max() < 5 * deviation
    correlation = ((numbers[0] - 0.5) * (numbers[1] - 0.5)).mean() * 12
    lagged = ((numbers[0, 1:] - 0.5) * (numbers[0, :-1] - 0.5)).mean() * 12
    assert max(abs(float(correlation)), abs(float(lagged))) < 5 / math.sqrt(count)
    torch.testing.assert_close(marginal.counter_uniform(torch.tensor([[1]]), 100, 5)[0].double(), numbers[0, 100:105])
    normal = marginal.normal_from_uniform(numbers)
    assert abs(float(normal.std()) - 1) < 5 / math.sqrt(4 * count)


def test_the_ends_of_the_unit_interval_are_never_reached() -> None:
    ends = marginal.unit_interval(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert ends.min().item() == 2.0**-24
    assert ends.max().item() == 1 - 2.0**-24
    assert torch.isfinite(marginal.normal_from_uniform(ends)).all()


def test_repeats_are_counted_once() -> None:
    code = torch.tensor([[5, 3, 5, 5, 3, 9]]).unsqueeze(-1)
    order, count = marginal.repeats(code)
    found = {int(code[0, order[0, slot, 0], 0]): int(count[0, slot, 0]) for slot in range(6) if count[0, slot, 0] > 0}
    assert found == {3: 2, 5: 3, 9: 1}
    assert int(count.sum()) == 6


def test_repeated_samples_are_evaluated_once() -> None:
    net, batch = critic(DISCRETE, samples=50, exact="never", chunk=10**6), batch_for(DISCRETE)
    seen: list[int] = []
    net.network.layers[1].register_forward_hook(lambda _m, _i, output: seen.append(output[..., 0].numel()))
    with torch.no_grad():
        net.predict(batch)
    joints = samples_of(net, batch)
    distinct = sum(
        len({tuple(joint[[j for j in range(3) if j != agent]].tolist()) for joint in joints[row]})
        for row in range(3)
        for agent in range(3)
    )
    assert sum(seen) == distinct < 3 * 3 * 50


def test_without_samples_in_the_gradient_the_rows_do_not_grow_with_them() -> None:
    net, batch, rows = critic(DISCRETE, current="executed", samples=1000, exact="never"), batch_for(DISCRETE), []
    net.network.layers[1].register_forward_hook(lambda _m, _i, output: rows.append(output[..., 0].numel()))
    net.predict(batch).sum().backward()
    assert rows == [3 * len(batch)]


@pytest.mark.parametrize("current", ["sampled", "executed"])
@pytest.mark.parametrize(("view", "base"), [("own", LocalCritic), ("state", CentralisedCritic)])
@pytest.mark.parametrize("action", [Discrete(3), Continuous(2)], ids=["discrete", "continuous"])
def test_alone_it_equals_its_base_bit_for_bit(view: Any, base: Any, action: Any, current: Any) -> None:
    spec = TeamSpec(1, 4, action)
    torch.manual_seed(0)
    marginalised = MarginalisedCritic(spec, view=view, hidden=[8], current=current)
    torch.manual_seed(0)
    plain = base(spec, hidden=[8])
    batch = fake_batch(spec, [5], [keys.STATE, keys.OBSERVATION, *marginalised.reads])
    batch.set(keys.STATE, batch[keys.OBSERVATION].flatten(-2))
    assert torch.equal(marginalised.predict(batch), plain.predict(batch))
    assert torch.equal(marginalised(batch.clone())[keys.STATE_VALUE], plain(batch)[keys.STATE_VALUE])


def test_alone_it_values_own_actions_as_the_counterfactual_critic() -> None:
    spec = TeamSpec(1, 4, Discrete(3))
    torch.manual_seed(0)
    marginalised = MarginalisedCritic(spec, style="q", hidden=[8])
    torch.manual_seed(0)
    plain = CounterfactualCritic(spec, hidden=[8])
    batch = fake_batch(spec, [5], dict.fromkeys([*plain.reads, *marginalised.reads]))
    found, expected = marginalised(batch.clone()), plain(batch.clone())
    for key in plain.writes:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("current", ["sampled", "executed"])
@pytest.mark.parametrize("style", ["v", "q"])
def test_a_critic_that_ignores_the_others_gives_the_base_value(style: str, current: str) -> None:
    net, batch = critic(DISCRETE, style=style, current=current, view="own", samples=7, exact="never"), batch_for(DISCRETE)
    torch.nn.init.zeros_(net.action_layer.weights[0])
    base = net.network(batch[keys.OBSERVATION])
    torch.testing.assert_close(net.averaged(batch), base, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.at_executed(batch), base, rtol=0, atol=1e-12)


@pytest.mark.parametrize("current", ["sampled", "executed"])
@pytest.mark.parametrize("style", ["v", "q"])
def test_a_change_of_one_policy_changes_the_others_values_at_once(style: str, current: str) -> None:
    """PERLA-5: the critic sees a new policy of agent 1 without being trained."""
    net, batch = critic(DISCRETE, style=style, current=current, exact="always"), batch_for(DISCRETE)
    before = net.averaged(batch)
    batch[keys.OPPONENT_LOGITS][:, 0, 1, :2] = torch.tensor([3.0, -1.0], dtype=torch.float64)
    after = net.averaged(batch)
    torch.testing.assert_close(after, enumerated(net, batch), rtol=0, atol=1e-10)
    assert torch.equal(before[:, 1], after[:, 1])
    assert ((before - after)[:, [0, 2]].abs() > 1e-6).all()


def test_true_policies_are_believed_as_they_are_and_carry_no_gradient() -> None:
    opponents = TruePolicyOpponents(DISCRETE)
    batch = fake_batch(DISCRETE, [4], opponents.reads)
    batch[keys.LOGITS].requires_grad_()
    opponents(batch)
    assert torch.equal(batch[keys.OPPONENT_LOGITS][:, 0], batch[keys.LOGITS])
    assert not batch[keys.OPPONENT_LOGITS].requires_grad
    assert len(set(batch[keys.SAMPLE_SEED].flatten().tolist())) == 4


# --- what cannot be summed over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (CONTINUOUS, r"`exact`: continuous actions cannot be summed over; set it to auto or never"),
        (
            TeamSpec(9, 2, Discrete(6)),
            r"`exact`: 8 others with 6 actions each have 1,679,616 joint actions, more than the 1,048,576",
        ),
    ],
    ids=["continuous", "many"],
)
def test_an_exact_sum_that_cannot_be_is_refused(spec: TeamSpec, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        MarginalisedCritic(spec, exact="always")
    for exact in ("auto", "never"):
        assert MarginalisedCritic(spec, exact=exact).table is None


def test_check_refuses_what_needs_discrete_actions_before_anything_is_built() -> None:
    for setting, remedy in (("exact=always", "critic.exact=auto or critic.exact=never"), ("style=q", "critic.style=v")):
        with pytest.raises(RecipeError) as caught:
            load_recipe("perla_mappo_vmas", [f"critic.{setting}"])
        (problem,) = caught.value.problems
        assert "`marginalised` needs the trait `discrete`" in problem.message
        assert problem.remedy == f"Set env.continuous_actions=false. Set {remedy}."
    with pytest.raises(RecipeError) as caught:
        load_recipe("perla_mappo_vmas", ["critic={style: q, exact: always}"])
    assert len(caught.value.problems) == 1


def test_a_dry_run_refuses_too_many_joint_actions_with_the_place() -> None:
    game = "env={type: matrix_game, n_agents: 15, n_actions: 3, num_envs: 4}"
    with pytest.raises(
        RecipeError, match=r"override `critic\.exact=always`: critic\.exact: 14 others with 3 actions each have 4,782,969"
    ):
        dry_run(load_recipe("perla_mappo_vmas", [game, "update.minibatch_size=null", "critic.exact=always"]))


# --- in a training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("current", ["sampled", "executed"])
@pytest.mark.parametrize("style", ["v", "q"])
def test_values_are_bootstrapped_with_means_and_the_regressed_value_is_kept(style: Any, current: Any) -> None:
    """The update clips against what it will predict; returns and advantages read the means alone."""
    torch.manual_seed(0)
    spec = TeamSpec(3, 4, Discrete(3), team_reward=True)
    net = MarginalisedCritic(spec, style=style, current=current, samples=4, exact="never", hidden=[5])
    net.normaliser.update(3 * torch.randn(50) + 2)
    env = ScriptedEnvironment(spec, random_script(spec, envs=2, steps=5))
    learner = learner_of(env, StochasticActor(spec, hidden=[4]), critic=net, data=RolloutData(spec, steps=5))
    batch = learner.collect()
    learner.annotate(batch)
    learner.estimate(batch)
    with torch.no_grad():
        regressed = net.normaliser.denormalise(net.predict(batch))
        means = net.normaliser.denormalise(net.averaged(batch))
    torch.testing.assert_close(batch[net.predicts], regressed, rtol=1e-5, atol=1e-5)
    if style == "q":
        means = (batch[keys.LOGITS].softmax(-1) * means).sum(-1, keepdim=True)
    torch.testing.assert_close(batch[keys.STATE_VALUE], means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch[keys.VALUE_TARGET], batch[keys.ADVANTAGE] + means, rtol=1e-5, atol=1e-5)
