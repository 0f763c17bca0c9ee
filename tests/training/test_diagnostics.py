"""Diagnostics against values by hand and by enumeration, and trainings with them against trainings without."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, fit, learner_of, random_script
from small_runs import KilledError, killed_at, same, small, states, without_times
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys, rng, run
from marlkit.actors.stochastic import StochasticActor
from marlkit.actors.transformer import TransformerActor
from marlkit.component import Critic, Estimator, Update
from marlkit.contract import Contract
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.counterfactual import CounterfactualCritic
from marlkit.critics.joint import JointCritic
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.errors import MarlkitError, RecipeError
from marlkit.estimators.counterfactual import CounterfactualEstimator
from marlkit.estimators.td_lambda import TdLambdaEstimator
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.ranks import ALONE
from marlkit.recipe import load_recipe, shipped
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import fake_batch
from marlkit.training.assembly import build_environment, build_learner
from marlkit.training.diagnostics import Diagnostics
from marlkit.training.dry_run import dry_run
from marlkit.training.learner import Learner

SPEC = TeamSpec(2, 3, Discrete(2))


class TableCritic(Critic):
    """``Q_i(s, a) = table[i, s, a_i, a_other]`` of two agents, the state being a number."""

    contract = Contract(
        reads=(keys.STATE, keys.ACTION, keys.JOINT_ACTION), writes=(keys.ACTION_VALUE,), predicts=keys.ACTION_VALUE
    )

    def __init__(self, spec: TeamSpec, table: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)
        self.table = torch.nn.Parameter(table)

    def predict(self, batch: TensorDictBase) -> Tensor:
        state, own, joint = batch[keys.STATE][..., :1].long(), batch[keys.ACTION], batch[keys.JOINT_ACTION]
        assert torch.equal(joint.diagonal(dim1=-2, dim2=-1), own)
        other = torch.stack([joint[..., 0, 1], joint[..., 1, 0]], -1)
        return self.table[torch.arange(2), state, own, other].unsqueeze(-1)


def learner(
    critic: Critic | None = None, update: Update | None = None, spec: TeamSpec = SPEC, transformer: bool = False, **options: Any
) -> Learner:
    """A learner of four environments, which is not trained."""
    torch.manual_seed(0)
    env = ScriptedEnvironment(spec, random_script(spec, 4, 6))
    independent = StochasticActor(spec, hidden=[4], output_gain=2.0, **options)
    actor = TransformerActor(spec, embedding=4) if transformer else independent
    return learner_of(env, actor, critic=critic or CentralisedCritic(spec, hidden=[4]), update=update)


def batch_of(of: Learner, batch_size: tuple[int, int], *more: keys.Key) -> TensorDict:
    wanted = {*of.actor.reads, *of.actor.writes, *of.opponents.reads, *of.critic.reads, *of.update.reads, *more}
    return fake_batch(of.env.spec, batch_size, sorted(wanted, key=str))


def measured(of: Learner, batch: TensorDictBase, *wanted: str, seed: int = 0) -> dict[str, float]:
    """What is measured of a batch before it is learnt from."""
    diagnostics = Diagnostics(wanted, estimator=of.estimator, critic=of.critic, seed=seed)
    diagnostics.before(batch, of.learning(), of.estimator, of.update, 0)
    return diagnostics.take(ALONE)


@pytest.fixture(autouse=True)
def _no_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Learner.learning`` schedules an optimiser, which only a training has."""
    monkeypatch.setattr(Learner, "_torch_optimizer", lambda self: torch.optim.SGD(self.parameters(), 0.1))
    monkeypatch.setattr("marlkit.optim.adam.AdamOptimizer.schedule", lambda *_: None)


# --- the critic's error ---------------------------------------------------------------------------------------------------


def ended(batch: TensorDict, agents: bool) -> TensorDict:
    terminated = torch.tensor([[[False], [True]], [[False], [False]]])
    batch.set(keys.TERMINATED, terminated).set(keys.DONE, terminated)
    if agents:
        batch.set(keys.AGENT_TERMINATED, torch.tensor([[[0, 0], [1, 1]], [[1, 0], [0, 0]]]).bool().unsqueeze(-1))
    return batch


@pytest.mark.parametrize("agents", [False, True], ids=["episodes end", "agents end"])
def test_td_error_of_state_values(agents: bool) -> None:
    of = learner()
    value, after = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 1e6], [-2.0, 0.5]])
    batch = ended(batch_of(of, (2, 2)), agents)
    batch.set(keys.REWARD, torch.ones(2, 2, 2, 1))
    batch.set(keys.STATE_VALUE, value.view(2, 2, 1, 1).expand(2, 2, 2, 1))
    batch.set(keys.following(keys.STATE_VALUE), after.view(2, 2, 1, 1).expand(2, 2, 2, 1))
    errors = [1 + 0.99 * 5 - 1] * 2 + [1 - 2] * 2 + [1 - 0.99 * 2 - 3] * 2 + [1 + 0.99 * 0.5 - 4] * 2
    if agents:
        errors[4] = 1 - 3
    expected = sum(abs(error) for error in errors) / 8
    assert measured(of, batch, "td_error")["critic/td_error"] == pytest.approx(expected, rel=1e-6)


def test_td_error_of_action_values_bootstraps_with_the_policys_mean() -> None:
    of = learner(CounterfactualCritic(SPEC, hidden=[4]))
    of.estimator = CounterfactualEstimator(SPEC, target=TdLambdaEstimator(SPEC, gamma=0.5, bootstrap="action_value"))
    batch = ended(batch_of(of, (2, 2)), False)
    batch.set(keys.REWARD, torch.zeros(2, 2, 2, 1))
    for key, number in ((keys.STATE_VALUE, 7.0), (keys.ACTION_VALUE, 1.0)):
        batch.set(key, torch.full((2, 2, 2, 1), number)).set(keys.following(key), torch.full((2, 2, 2, 1), 3 * number))
    expected = (3 * abs(0.5 * 21 - 1) + abs(0.0 - 1)) / 4
    assert measured(of, batch, "td_error")["critic/td_error"] == pytest.approx(expected)


def test_td_error_in_real_units_where_the_present_value_was_not_annotated() -> None:
    of = learner(JointCritic(SPEC, hidden=[4]))
    of.critic.normaliser.update(torch.randn(100, 1) * 50 + 300, ALONE)
    batch = ended(batch_of(of, (2, 2), keys.JOINT_ACTION), False).set(keys.REWARD, torch.randn(2, 2, 2, 1))
    batch.set(keys.following(keys.ACTION_VALUE), torch.randn(2, 2, 2, 1) * 100)
    value = of.critic.normaliser.denormalise(of.critic.predict(batch))
    bootstrap = 0.99 * batch[keys.following(keys.ACTION_VALUE)] * ~batch[keys.TERMINATED].unsqueeze(-1)
    expected = (batch[keys.REWARD] + bootstrap - value).abs().mean().item()
    assert value.mean() > 100
    assert measured(of, batch, "td_error")["critic/td_error"] == pytest.approx(expected, rel=1e-5)


def test_td_error_of_standardised_rewards_is_in_their_units() -> None:
    of = learner()
    of.estimator = CounterfactualEstimator(SPEC, target=TdLambdaEstimator(SPEC, gamma=0.5, standardise_reward="scale"))
    batch = ended(batch_of(of, (2, 2)), False).set(keys.REWARD, torch.tensor([3.0, -3.0]).view(1, 2, 1, 1).expand(2, 2, 2, 1))
    of.estimator.observe(batch)
    batch.set(keys.STATE_VALUE, torch.zeros(2, 2, 2, 1)).set(keys.following(keys.STATE_VALUE), torch.zeros(2, 2, 2, 1))
    assert measured(of, batch, "td_error")["critic/td_error"] == pytest.approx(1.0)


def test_td_errors_are_summed_over_the_training() -> None:
    of = learner()
    diagnostics = Diagnostics(["td_error"], estimator=of.estimator, critic=of.critic, seed=0)
    sums = []
    for number in (1.0, 2.5):
        for reward in (number - 0.5, number + 0.5):  # two batches of one iteration
            batch = batch_of(of, (2, 2), keys.TERMINATED).set(keys.REWARD, torch.full((2, 2, 2, 1), reward))
            batch.set(keys.STATE_VALUE, torch.zeros(2, 2, 2, 1)).set(keys.following(keys.STATE_VALUE), torch.zeros(2, 2, 2, 1))
            diagnostics.before(batch, of.learning(), of.estimator, of.update, 0)
            diagnostics.after(batch, of.actor)
        sums.append(diagnostics.take(ALONE)["critic/td_error_sum"])
    sums.append(diagnostics.take(ALONE)["critic/td_error_sum"])  # an iteration without a batch
    assert sums == [1.0, 3.5, 3.5]


# --- the variance of its estimate -----------------------------------------------------------------------------------------


def policy_of(of: Learner, batch: TensorDictBase) -> Tensor:
    """``pi_i(a)`` of each row, ``[R, N, A]``."""
    return of.actor.distribution(batch.flatten()).parameters()[keys.LOGITS].softmax(-1).detach().double()


def parts_of(q: Tensor, own: Tensor, other: Tensor) -> dict[str, float]:
    """Exact parts for ``q`` ``[R, A, A]``, own action first, and the two policies ``[R, A]``."""
    marginal = torch.einsum("rab,rb->ra", q, other)
    value = (marginal * own).sum(-1)
    others = torch.einsum("ra,rb,rab->r", own, other, (q - marginal.unsqueeze(-1)).square()).mean()
    parts = {"own": (own * (marginal - value.unsqueeze(-1)).square()).sum(-1).mean(), "others": others, "state": value.var()}
    return {name: part.item() for name, part in parts.items()}


def averages(of: Learner, batch: TensorDictBase, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Means and standard errors of what is measured with different draws."""
    found = [measured(of, batch, "variance", seed=seed) for seed in range(repeats)]
    stacked = {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}
    return (
        {name: values.mean().item() for name, values in stacked.items()},
        {name: values.std().item() / math.sqrt(repeats) for name, values in stacked.items()},
    )


def test_variance_of_a_tabular_critic_splits_as_enumeration_does() -> None:
    table = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    of = learner(TableCritic(SPEC, table))
    batch = batch_of(of, (10, 3), keys.JOINT_ACTION)
    batch[keys.STATE][..., 0] = torch.arange(30).view(10, 3) % 3
    policy, state = policy_of(of, batch), batch[keys.STATE].flatten(0, 1)[:, 0].long()
    exact = [parts_of(table[i, state].double(), policy[:, i], policy[:, 1 - i]) for i in (0, 1)]
    means, errors = averages(of, batch, 60)
    for part in ("own", "others", "state"):
        expected = (exact[0][part] + exact[1][part]) / 2
        assert abs(means[f"critic/variance_{part}"] - expected) < 5 * errors[f"critic/variance_{part}"] + 1e-6
        assert expected > 10 * errors[f"critic/variance_{part}"]
    total = sum(means[f"critic/variance_{part}"] for part in ("own", "others", "state"))
    assert means["critic/variance"] == pytest.approx(total)
    assert "critic/variance_averaged" not in means


@pytest.mark.parametrize("style", ["v", "q"])
@pytest.mark.parametrize(("samples", "exact"), [(1, "never"), (3, "never"), (3, "always")])
def test_theorem_1_of_the_marginalised_critic(samples: int, exact: Any, style: Any) -> None:
    """The value at certain beliefs is enumerated; observed and predicted variance of the mean over K both meet it."""
    of = learner(MarginalisedCritic(SPEC, hidden=[4], samples=samples, exact=exact, style=style, initialisation="uniform"))
    with torch.no_grad():
        of.critic.action_layer.weights[0] *= 8  # type: ignore[operator, union-attr, index]
    batch = batch_of(of, (10, 3))
    rows = of.opponents(of.actor(batch.flatten()))
    policy, key = policy_of(of, batch), keys.ACTION_VALUES if style == "q" else keys.STATE_VALUE
    certain = [rows.copy().set(keys.OPPONENT_LOGITS, torch.eye(2)[other].expand(30, 1, 2, 2) * 1e4) for other in (0, 1)]
    q = torch.stack([of.critic(each)[key].detach().double() for each in certain], -1)
    own = policy if style == "q" else torch.ones(30, 2, 1)
    parts = [parts_of(q[:, i], own[:, i], policy[:, 1 - i]) for i in (0, 1)]
    expected = {part: (parts[0][part] + parts[1][part]) / 2 for part in ("own", "others", "state")}
    expected["averaged"] = expected["own"] + expected["state"]
    expected["averaged"] += expected["others"] / (math.inf if exact == "always" else samples)
    expected["averaged_predicted"] = expected["averaged"]
    means, errors = averages(of, rows.reshape(10, 3), 60)
    assert ("critic/variance_own" in means) == (style == "q")
    for name in ("others", "state", "averaged", "averaged_predicted", *(["own"] if style == "q" else [])):
        error = errors[f"critic/variance_{name}"]
        assert abs(means[f"critic/variance_{name}"] - expected[name]) < 5 * error + 1e-6, name
        assert expected[name] > 5 * error, name


def test_a_critic_of_continuous_samples_is_valued_at_certain_actions() -> None:
    """Whatever its samples and their seeds: with certain beliefs the mean over K is the value at one action."""
    spec = TeamSpec(2, 3, Continuous(2))
    one, many = (learner(MarginalisedCritic(spec, hidden=[4], samples=samples), spec=spec) for samples in (1, 50))
    many.critic.load_state_dict(one.critic.state_dict())
    found = [measured(of, batch_of(of, (4, 3)), "variance") for of in (one, many)]
    for part in ("critic/variance", "critic/variance_others", "critic/variance_state"):
        assert found[0][part] == pytest.approx(found[1][part], rel=1e-4)
    fewer = found[0]["critic/variance_averaged_predicted"] - found[1]["critic/variance_averaged_predicted"]
    assert fewer == pytest.approx(found[0]["critic/variance_others"] * (1 - 1 / 50), rel=1e-3)


def test_a_critic_without_actions_varies_with_the_state_only() -> None:
    of = learner()
    batch = batch_of(of, (5, 4))
    found = measured(of, batch, "variance")
    assert found.keys() == {"critic/variance", "critic/variance_state"}
    value = of.critic(batch.flatten())[keys.STATE_VALUE]
    assert found["critic/variance"] == pytest.approx(value.var(0).mean().item(), rel=1e-5)


def test_the_variance_over_actions_needs_agents_that_choose_alone() -> None:
    joint, state = learner(JointCritic(SPEC, hidden=[4]), transformer=True), learner(transformer=True)
    assert measured(joint, batch_of(joint, (2, 2), keys.JOINT_ACTION), "variance") == {}
    assert measured(state, batch_of(state, (2, 2)), "variance").keys() == {"critic/variance", "critic/variance_state"}


# --- the policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["none", "all"])
def test_variance_of_the_policy_gradient_between_environments(share: str) -> None:
    """Against gradients of the formula, environment by environment; the variance of the mean over four."""
    update = PolicyGradientUpdate(SPEC, entropy_coef=0.0, epochs=3, minibatch_size=4)
    of = learner(update=update, share=share)
    batch = batch_of(of, (4, 8), keys.VALUE_TARGET, keys.STATE_VALUE)
    samples = []
    for env in range(4):
        log_prob = of.actor.distribution(batch[env]).log_prob(batch[env][keys.ACTION])
        loss = -(log_prob * batch[env][keys.ADVANTAGE]).mean()
        samples.append(torch.autograd.grad(loss, list(of.actor.parameters())))
    found = measured(of, batch, "gradient")
    of_agent = (
        {f"actor/gradient_variance/agent_{i}": list(of.actor.agent_parameters([i])) for i in (0, 1)} if share == "none" else {}
    )
    owners = of_agent or {"actor/gradient_variance": list(of.actor.parameters())}
    assert found.keys() == owners.keys()
    for name, parameters in owners.items():
        own = {id(parameter) for parameter in parameters}
        each = [torch.cat([g.flatten() for p, g in zip(of.actor.parameters(), s, strict=True) if id(p) in own]) for s in samples]
        mean = torch.stack(each).mean(0)
        expected = sum((gradient - mean).square().sum().item() for gradient in each) / 3 / 4
        assert found[name] == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_one_environment_varies_between_its_sequences() -> None:
    """Of 6 sequences of 4 steps each: as the gradients of six environments that play one sequence each."""
    of = learner(body="gru", sequence_length=4)
    batch = batch_of(of, (1, 24), keys.VALUE_TARGET, keys.STATE_VALUE)
    one, six = (measured(of, each, "gradient") for each in (batch, batch.reshape(6, 4)))
    assert one == pytest.approx(six, rel=1e-4)
    assert measured(of, batch[:, :4], "gradient") == {}


def test_divergence_between_the_policies_before_and_after() -> None:
    of = learner()
    batch = batch_of(of, (3, 4))
    batch[keys.ALIVE][0, 0, 1] = False
    diagnostics = Diagnostics(["kl"], estimator=of.estimator, critic=of.critic, seed=0)
    diagnostics.before(batch, of.learning(), of.estimator, of.update, 0)
    old = policy_of(of, batch)
    with torch.no_grad():
        for parameter in of.actor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    diagnostics.after(batch, of.actor)
    new = policy_of(of, batch)
    total = 0.0
    for row, agent in itertools.product(range(12), range(2)):
        if (row, agent) != (0, 1):
            total += sum(float(p) * math.log(float(p) / float(q)) for p, q in zip(old[row, agent], new[row, agent], strict=True))
    assert diagnostics.take(ALONE)["actor/kl_update"] == pytest.approx(total / 23, rel=1e-4)


def test_measuring_changes_no_parameter_no_batch_and_no_generator() -> None:
    of = learner(update=PpoClipUpdate(SPEC, epochs=2, minibatch_size=4))
    more = (keys.VALUE_TARGET, keys.REWARD, keys.TERMINATED, keys.STATE_VALUE, keys.following(keys.STATE_VALUE))
    batch = batch_of(of, (4, 4), *more)
    before, kept, state = rng.state(), batch.clone(), {name: value.clone() for name, value in of.state_dict().items()}
    measured(of, batch, "td_error", "variance", "gradient", "kl")
    assert not rng.drawn_since(before)
    assert (batch == kept).all()
    assert set(batch.keys(True, True)) == set(kept.keys(True, True))
    assert same(of.state_dict(), state)
    assert all(parameter.grad is None for parameter in of.parameters())


# --- trainings ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


NAMES = {"critic/td_error", "critic/td_error_sum", "critic/variance", "actor/kl_update"}


def trained(name: str, *overrides: str) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """State, last metrics and generators after two iterations."""
    recipe = load_recipe(name, small(name, *overrides))
    learner = build_learner(recipe, build_environment(recipe, torch.device("cpu"), recipe.seed), compile="record")
    with rng.isolated(0):
        fit(learner, 2)
        generators = rng.state()
    state = learner.state_dict() | {"optimizer": learner._torch_optimizer().state_dict()}
    told = {key: value.item() for key, value in learner.trainer.callback_metrics.items() if not key.startswith("time/")}
    return {key: value for key, value in state.items() if not key.startswith("diagnostics.")}, told, generators


@pytest.mark.usefixtures("with_optimizer")
@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_training_with_diagnostics_is_the_same_training(name: str) -> None:
    plain, measured = trained(name), trained(name, "trainer.diagnostics=all")
    assert same(measured[0], plain[0])
    assert same(measured[2], plain[2])
    assert {key: measured[1][key] for key in plain[1]} == plain[1]
    new = measured[1].keys() - plain[1].keys()
    assert new >= NAMES if "actor/entropy" in plain[1] else new >= NAMES - {"actor/kl_update"}
    assert any(key.startswith("actor/gradient_variance") for key in new)
    assert all(math.isfinite(measured[1][key]) for key in new)


@pytest.mark.usefixtures("with_optimizer")
def test_sums_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("maddpg", small("maddpg", "trainer.diagnostics=all"))
    whole = run.train(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(KilledError):
            run.train(recipe, tmp_path / "cut", progress=False)
    (cut,) = (tmp_path / "cut" / "maddpg").iterdir()
    run.resume(cut, progress=False)
    assert without_times(cut) == without_times(whole)
    assert same(states(cut)["state_dict"], states(whole)["state_dict"])
    run.load_policy(cut)


def test_what_cannot_be_measured_is_refused_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Estimator, "discount", None)
    recipe = load_recipe("mappo", small("mappo", "trainer.diagnostics=[kl, td_error]"))
    message = r"trainer\.diagnostics: cannot measure `td_error`.*no discount factor.*Leave that out of \[td_error, kl\]"
    with pytest.raises(RecipeError, match=message):
        build_learner(recipe, build_environment(recipe, torch.device("cpu"), 0))


def test_a_misspelt_diagnostic_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"trainer\.diagnostics"):
        load_recipe("mappo", ["trainer.diagnostics=[td_eror]"])


def test_what_is_not_asked_for_is_not_there() -> None:
    assert learner().diagnostics is None


@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_dry_run_measures_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[dict[str, Tensor]] = []
    before = Diagnostics.before

    def noted(self: Diagnostics, *given: Any) -> None:
        before(self, *given)
        measured.extend(self._found)

    monkeypatch.setattr(Diagnostics, "before", noted)
    dry_run(load_recipe(name, [*small(name), "trainer.diagnostics=all"]))
    assert len(measured) == 1
    assert "critic/td_error" in measured[0]


def test_what_diagnostics_cannot_do_with_a_critic_is_found_by_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers_twice(self: CentralisedCritic, batch: TensorDictBase) -> TensorDictBase:
        if len(asked) == 2:
            raise ValueError("answers twice only")
        asked.append(batch)
        return forward(self, batch)

    asked: list[TensorDictBase] = []
    forward = CentralisedCritic.forward
    monkeypatch.setattr(CentralisedCritic, "forward", answers_twice)
    dry_run(load_recipe("mappo", small("mappo")))
    assert len(asked) == 2
    asked.clear()
    recipe = ["trainer.diagnostics=[variance]", *small("mappo")]
    with pytest.raises(MarlkitError, match=r"dry run: .*CentralisedCritic.*answers twice only"):
        dry_run(load_recipe("mappo", recipe))
