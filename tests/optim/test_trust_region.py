"""The trust region step: Fisher's matrix, the step's length and direction in closed form, acceptance, and teams (HATRPO)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, fit, learner_of, random_script
from stepping import CONTINUOUS, DISCRETE, B, Descent, N, T, batch_of, changed, learning, log_probs, snapshot
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.actors.transformer import TransformerActor
from marlkit.batches import units
from marlkit.component import Actor, Runtime
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.transformer import TransformerCritic
from marlkit.envs.product_game import ProductGameEnvironment
from marlkit.errors import MarlkitError
from marlkit.functional.reduce import masked_mean
from marlkit.functional.trust_region import hessian_product
from marlkit.learning import Learning, Metrics
from marlkit.nn.distributions import CategoricalTeam, NormalTeam, TeamDistribution
from marlkit.nn.networks import TeamLinear
from marlkit.optim.sequential import SequentialUpdate
from marlkit.optim.trust_region import TrustRegionUpdate
from marlkit.recipe import load_recipe
from marlkit.spec import Continuous, TeamSpec
from marlkit.targets.soft import SoftTargets
from marlkit.training.dry_run import dry_run

SPECS = [pytest.param(DISCRETE, id="discrete"), pytest.param(CONTINUOUS, id="continuous")]
ALL = range(N)


def doubled(batch: TensorDictBase) -> TensorDict:
    return batch.apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def learning_of(actor: Actor, spec: TeamSpec) -> Learning:
    critic = CentralisedCritic(spec, hidden=[4]).to(next(actor.parameters()).dtype)
    return learning(actor, critic, Descent(critic))


def step_of(spec: TeamSpec, **options: Any) -> TrustRegionUpdate:
    return TrustRegionUpdate(spec, **{"normalise_advantage": False, "epochs": 1, **options})


def divergences(spec: TeamSpec, old: TensorDictBase, new: TensorDictBase) -> Tensor:
    """``KL(old || new)`` ``[*, N]`` of two sets of stored parameters, by torch's own distributions or as a sum over actions."""
    if spec.discrete:
        first, second = old[keys.LOGITS].double().softmax(-1), new[keys.LOGITS].double().softmax(-1)
        terms = first * (first.clamp(min=1e-300) / second.clamp(min=1e-300)).log()
        return terms.masked_fill(~old[keys.ACTION_MASK], 0.0).sum(-1)
    first, second = (torch.distributions.Normal(b[keys.LOC].double(), b[keys.SCALE].double()) for b in (old, new))
    return (torch.distributions.kl_divergence(first, second) * old[keys.ACTION_DIMS]).sum(-1)


def played_again(actor: StochasticActor, batch: TensorDict) -> TensorDict:
    """What the actor says of the batch now."""
    with torch.no_grad():
        return actor(batch.clone())


# --- TR-1: Fisher's matrix --------------------------------------------------------------------------------------------------


def fisher(actor: StochasticActor, batch: TensorDictBase, alive: Tensor) -> Tensor:
    """Mean over what is alive of ``E[grad log p grad log p^T]``, from first derivatives alone, one row and agent at a time."""
    policy = actor.distribution(batch)
    parameters = list(actor.parameters())

    def row(scalar: Tensor) -> Tensor:
        found = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)])

    size = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(size, size, dtype=torch.float64)
    for index in alive.squeeze(-1).nonzero().tolist():
        at = tuple(index)
        if isinstance(policy, NormalTeam):
            for d in range(int(batch[keys.ACTION_DIMS][at].sum())):
                mean, deviation = policy.loc[at][d], policy.parameters()[keys.SCALE][at][d]
                for score, weight in ((row(mean), 1.0), (row(deviation), 2.0)):
                    total += weight * torch.outer(score, score) / deviation.detach() ** 2
            continue
        log_probs = policy.parameters()[keys.LOGITS][at]
        for action in batch[keys.ACTION_MASK][at].nonzero().flatten().tolist():
            score = row(log_probs[action])
            total += log_probs[action].exp().detach() * torch.outer(score, score)
    return total / alive.sum()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "tanh"},
        {"activation": "relu", "layer_norm": True},
        {"activation": "leaky_relu", "share": "none"},
        {"activation": "gelu"},
        {"activation": "elu"},
        {"body": "gru", "sequence_length": 3},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_product_with_the_hessian_of_the_divergence_is_fishers(spec: TeamSpec, options: dict[str, Any]) -> None:
    """In single precision, as in training, where activations write over their arguments."""
    torch.manual_seed(0)
    # Small enough that no deviation is beyond its bounds.
    completed: dict[str, Any] = {"hidden": [3], "output_gain": 0.3, "std": "predicted"} | options
    actor = StochasticActor(spec, **completed)
    exact = StochasticActor(spec, **completed).double()
    exact.load_state_dict(actor.state_dict())
    batch = units(batch_of(actor, shape=(B, 3)), None) if actor.sequence_length is None else recurrent_batch(actor, (B, 3))
    with torch.no_grad():
        old = actor.distribution(batch)
    divergence = masked_mean(old.kl(actor.distribution(batch)), batch[keys.ALIVE])
    parameters = list(actor.parameters())
    product = hessian_product(divergence, parameters, damping=0.25)
    size = sum(parameter.numel() for parameter in parameters)
    columns = torch.stack([product(unit) for unit in torch.eye(size)], -1).double()
    expected = fisher(exact, doubled(batch), batch[keys.ALIVE]) + 0.25 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(columns, expected, rtol=1e-4, atol=2e-5)


def recurrent_batch(actor: StochasticActor, shape: tuple[int, int]) -> TensorDict:
    """A batch of sequences that start from hidden states that are not zero."""
    spec = actor.spec
    batch = TensorDict({}, batch_size=list(shape))
    batch.set(keys.OBSERVATION, torch.randn(*shape, N, spec.observation))
    batch.set(keys.STATE, torch.randn(*shape, spec.state_size))
    has = torch.arange(spec.action_features) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)
    batch.set(keys.ACTION_MASK if spec.discrete else keys.ACTION_DIMS, has.expand(*shape, -1, -1).clone())
    batch.set(keys.ALIVE, torch.rand(*shape, N, 1) < 0.7)
    batch.set(keys.IS_FIRST, torch.rand(*shape, 1) < 0.3)
    hidden = actor.initial_state(math.prod(shape))[keys.HIDDEN]
    batch.set(keys.HIDDEN, torch.randn_like(hidden).unflatten(0, shape))
    for key in (keys.ADVANTAGE, keys.VALUE_TARGET, keys.STATE_VALUE):
        batch.set(key, torch.randn(*shape, N, 1))
    with torch.no_grad():
        policy = actor.distribution(batch)
        batch.set(keys.ACTION, policy.sample()).set(keys.LOG_PROB, policy.log_prob(batch[keys.ACTION]))
    return batch


def test_fisher_of_logits_is_diagonal_minus_outer_product() -> None:
    probability = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    logits = (probability.log() + 7).requires_grad_()
    divergence = CategoricalTeam(logits.detach()).kl(CategoricalTeam(logits)).sum()
    product = hessian_product(divergence, [logits], damping=0.0)
    columns = torch.stack([product(unit) for unit in torch.eye(3, dtype=torch.float64)], -1)
    torch.testing.assert_close(columns, probability.diag() - torch.outer(probability, probability), rtol=0, atol=1e-12)


# --- TR-4: closed form ------------------------------------------------------------------------------------------------------


def means_only(spec: TeamSpec, deviations: Sequence[float]) -> StochasticActor:
    """Independent normal policies of which only the means learn, the biases of one layer."""
    actor = StochasticActor(spec, hidden=[], share="none").double()
    layer = actor.network.layers[0]
    assert isinstance(layer, TeamLinear)
    with torch.no_grad():
        for weight, deviation in zip(layer.weights, actor.log_deviation, strict=True):
            weight.zero_().requires_grad_(False)
            deviation.copy_(torch.tensor(deviations).log()).requires_grad_(False)
    return actor


@pytest.mark.parametrize("damping", [1e-9, 0.1, 2.0])
@pytest.mark.parametrize("agent", ALL)
def test_step_of_a_normal_policy_in_closed_form(damping: float, agent: int) -> None:
    """``F = diag(1 / sigma^2)``: without damping the whitened step is ``sqrt(2 delta)`` long and points along ``sigma g``."""
    torch.manual_seed(agent)
    spec, limit = TeamSpec(N, 2, Continuous(2), team_reward=True), 0.002
    sigma = torch.tensor([0.5, 3.0], dtype=torch.float64)
    actor = means_only(spec, sigma.tolist())
    batch = doubled(batch_of(actor.float(), shape=(40, 5)))
    actor.double()
    # An advantage that pulls on both dimensions, so that no step can fail to gain.
    batch.set(keys.ADVANTAGE, batch[keys.ACTION] @ torch.tensor([[0.7], [-1.1]], dtype=torch.float64))
    batch.set(keys.LOG_PROB, log_probs(actor, batch).detach().unsqueeze(-1))
    before = [p.detach().clone() for p in actor.agent_parameters([agent]) if p.requires_grad]
    metrics = step_of(spec, kl_limit=limit, damping=damping).fit_policy(batch, learning_of(actor, spec), [agent])
    after = [p.detach() for p in actor.agent_parameters([agent]) if p.requires_grad]
    assert len(after) == 1
    alive = batch[keys.ALIVE][:, :, agent, 0]
    action, advantage = batch[keys.ACTION][:, :, agent][alive], batch[keys.ADVANTAGE][:, :, agent][alive]
    slope = (advantage * action / sigma**2).mean(0)
    x = slope / (1 / sigma**2 + damping)
    step = x * (2 * limit / (x @ slope)).sqrt()
    torch.testing.assert_close(after[0] - before[0], step, rtol=1e-6, atol=0)
    if damping < 1e-3:
        whitened = math.sqrt(2 * limit) * (sigma * slope) / (sigma * slope).norm()
        torch.testing.assert_close((after[0] - before[0]) / sigma, whitened, rtol=1e-6, atol=0)
        assert metrics["actor/kl"].item() == pytest.approx(limit, rel=1e-6)
    assert metrics["actor/step_fraction"].item() == 1.0
    assert metrics["actor/grad_norm"].item() == pytest.approx(slope.norm().item(), rel=1e-6)


def test_one_agent_in_turn_or_at_once_is_plain_trpo() -> None:
    """With Fisher's matrix in full and a linear solver, on a network of which everything learns."""
    torch.manual_seed(0)
    for spec in (TeamSpec(1, 3, DISCRETE.action, team_reward=True), TeamSpec(1, 3, CONTINUOUS.action, team_reward=True)):
        start = StochasticActor(spec, hidden=[3], share="none", output_gain=1.0).double()
        batch = solo_batch(start)
        alive = torch.ones(*batch.batch_size, 1, 1, dtype=torch.bool)
        gain = (log_probs(start, batch) * batch[keys.ADVANTAGE][..., 0]).mean()
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(gain, list(start.parameters()))])
        matrix = fisher(start, batch, alive) + 0.1 * torch.eye(len(slope), dtype=torch.float64)
        x = torch.linalg.solve(matrix, slope)
        step = x * (2 * 1e-4 / (x @ slope)).sqrt()
        expected = nn.utils.parameters_to_vector(start.parameters()).detach() + step
        for sequential in (False, True):
            actor = StochasticActor(spec, hidden=[3], share="none").double()
            actor.load_state_dict(start.state_dict())
            update = step_of(spec, kl_limit=1e-4, cg_iterations=200)
            (SequentialUpdate(spec, step=update) if sequential else update).update(batch.clone(), learning_of(actor, spec))
            found = nn.utils.parameters_to_vector(actor.parameters()).detach()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert (step.abs() > 1e-4).any()


def solo_batch(actor: StochasticActor) -> TensorDict:
    spec, shape = actor.spec, (30, 4)
    batch = TensorDict({}, batch_size=list(shape))
    batch.set(keys.OBSERVATION, torch.randn(*shape, 1, spec.observation, dtype=torch.float64))
    batch.set(keys.STATE, torch.randn(*shape, spec.state_size, dtype=torch.float64))
    mask = keys.ACTION_MASK if spec.discrete else keys.ACTION_DIMS
    batch.set(mask, torch.ones(*shape, 1, spec.action_features, dtype=torch.bool))
    batch.set(keys.ALIVE, torch.ones(*shape, 1, 1, dtype=torch.bool))
    for key in (keys.ADVANTAGE, keys.VALUE_TARGET, keys.STATE_VALUE):
        batch.set(key, torch.randn(*shape, 1, 1, dtype=torch.float64))
    with torch.no_grad():
        return actor(batch)


# --- TR-3: what is accepted, and what is left alone -------------------------------------------------------------------------


def gain_of(actor: StochasticActor, batch: TensorDict, agents: Sequence[int]) -> float:
    """``mean(rho A)`` over ``agents`` where alive, by plain arithmetic."""
    ratio = (log_probs(actor, batch).detach() - batch[keys.LOG_PROB][..., 0]).exp() * batch[keys.ADVANTAGE][..., 0]
    alive = batch[keys.ALIVE][..., 0]
    return sum(ratio[..., i][alive[..., i]].sum().item() for i in agents) / sum(int(alive[..., i].sum()) for i in agents)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("agents", [None, [0], [2]])
@pytest.mark.parametrize(("limit", "far"), [(0.01, False), (0.5, True)])
def test_accepted_step_is_the_longest_that_stays_inside_and_gains(
    spec: TeamSpec, agents: list[int] | None, limit: float, far: bool
) -> None:
    torch.manual_seed(3)
    actor = StochasticActor(spec, hidden=[7], share="none", output_gain=1.0).double()
    batch = doubled(batch_of(actor.float(), seed=4, shape=(20, 6)))
    actor.double()
    batch = played_again(actor, batch)
    of = list(ALL) if agents is None else agents
    start = nn.utils.parameters_to_vector(actor.parameters()).detach().clone()
    before = gain_of(actor, batch, of)
    step, learn = step_of(spec, kl_limit=limit, damping=1e-3, cg_iterations=15, backtracks=20), learning_of(actor, spec)
    metrics = step.update(batch, learn) if agents is None else step.fit_policy(batch, learn, agents)
    end = nn.utils.parameters_to_vector(actor.parameters()).detach().clone()
    alive = batch[keys.ALIVE][..., of, 0]

    def there(fraction: float) -> tuple[float, float]:
        nn.utils.vector_to_parameters(start + fraction * (end - start), actor.parameters())
        kl = divergences(spec, batch, played_again(actor, batch))[..., of]
        return kl[alive].mean().item(), gain_of(actor, batch, of) - before

    divergence, gain = there(1.0)
    assert (0 if far else 0.3 * limit) < divergence <= limit
    assert gain > 0
    assert metrics["actor/kl"].item() == pytest.approx(divergence, rel=1e-6)
    assert metrics["actor/gain"].item() == pytest.approx(gain, rel=1e-6)
    trials = round(math.log(metrics["actor/step_fraction"].item(), 0.8))
    assert metrics["actor/step_fraction"].item() == pytest.approx(0.8**trials)
    assert trials > 0 or not far
    if trials > 0:
        # A move of the parameters small enough to be linear tells the slope along the step.
        slope = there(1e-6)[1] / 1e-6
        longer, more = there(1 / 0.8)
        assert longer > limit or more < 0.5 * slope / 0.8


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fault", ["zero advantage", "advantage that is no number", "no agent alive"])
@pytest.mark.parametrize("sequential", [False, True])
def test_policy_stays_bit_for_bit_where_there_is_no_step(spec: TeamSpec, fault: str, sequential: bool) -> None:
    actor = StochasticActor(spec, hidden=[7], share="none", output_gain=1.0)
    batch = batch_of(actor)
    if fault == "no agent alive":
        batch[keys.ALIVE].zero_()
    else:
        batch[keys.ADVANTAGE].fill_(math.nan if "number" in fault else 0.0)
    learn = learning_of(actor, spec)
    start = snapshot(actor)
    step = step_of(spec)
    metrics = (SequentialUpdate(spec, step=step) if sequential else step).update(batch, learn)
    assert not changed(start, actor)
    assert metrics["actor/step_fraction"].item() == 0
    assert metrics["actor/kl"].item() == 0
    assert all(parameter.grad is not None for parameter in actor.parameters()), "the policy is known to be within reach"


class MirroredActor(StochasticActor):
    """Acts, once its parameters have moved, as if they had moved the other way."""

    home: dict[str, Tensor]
    evaluations = 0

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        self.evaluations += 1
        now = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(now[name] if torch.equal(now[name], self.home[name]) else 2 * self.home[name] - now[name])
        policy = super().distribution(batch, agents)
        if not torch.is_grad_enabled():
            for name, parameter in self.named_parameters():
                parameter.copy_(now[name])
        return policy


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backtracks", [1, 10])
def test_parameters_return_bit_for_bit_after_a_search_that_found_nothing(spec: TeamSpec, backtracks: int) -> None:
    actor = MirroredActor(spec, hidden=[7], share="none", output_gain=1.0)
    actor.home = {name: parameter.detach().clone() for name, parameter in actor.named_parameters()}
    batch = batch_of(actor)
    start, actor.evaluations = snapshot(actor), 0
    metrics = step_of(spec, backtracks=backtracks).update(batch, learning_of(actor, spec))
    assert actor.evaluations >= backtracks + 2, "it did search"
    assert not changed(start, actor)
    assert metrics["actor/step_fraction"].item() == 0
    honest = StochasticActor(spec, hidden=[7], share="none")
    honest.load_state_dict(actor.state_dict())
    assert step_of(spec).update(batch, learning_of(honest, spec))["actor/step_fraction"].item() > 0


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_of_the_advantage_do_not_matter(spec: TeamSpec, scale: float) -> None:
    ends = []
    for factor in (1.0, scale):
        torch.manual_seed(1)
        actor = StochasticActor(spec, hidden=[5], output_gain=1.0)
        batch = batch_of(actor)
        batch[keys.ADVANTAGE].mul_(factor)
        step_of(spec).update(batch, learning_of(actor, spec))
        ends.append(nn.utils.parameters_to_vector(actor.parameters()).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


def test_the_advantage_is_normalised_over_what_is_alive() -> None:
    ends = []
    for normalised in (False, True):
        torch.manual_seed(1)
        actor = StochasticActor(DISCRETE, hidden=[5], output_gain=1.0)
        batch = batch_of(actor)
        alive = batch[keys.ALIVE]
        if not normalised:
            values = batch[keys.ADVANTAGE][alive]
            batch.set(keys.ADVANTAGE, (batch[keys.ADVANTAGE] - values.mean()) / values.std(correction=0))
        step_of(DISCRETE, normalise_advantage=normalised).update(batch, learning_of(actor, DISCRETE))
        ends.append(nn.utils.parameters_to_vector(actor.parameters()).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


def test_recurrent_policy_stays_in_the_region_of_its_sequences() -> None:
    torch.manual_seed(0)
    actor = StochasticActor(CONTINUOUS, hidden=[6], body="gru", sequence_length=3, share="none", output_gain=1.0)
    batch = recurrent_batch(actor, (B, T))
    pieces = [batch[b : b + 1, t : t + 3].clone() for b in range(B) for t in range(0, T, 3)]

    def evaluated() -> list[TensorDict]:
        with torch.no_grad():
            return [piece.clone().update(actor.distribution(piece).parameters()) for piece in pieces]

    before = evaluated()
    start = snapshot(actor)
    metrics = step_of(CONTINUOUS, kl_limit=0.02).update(batch, learning_of(actor, CONTINUOUS))
    assert len(changed(start, actor)) == len(start)
    divergence = [divergences(CONTINUOUS, a, b)[a[keys.ALIVE][..., 0]] for a, b in zip(before, evaluated(), strict=True)]
    assert metrics["actor/kl"].item() == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-3)
    assert 0.004 < metrics["actor/kl"].item() <= 0.02


# --- teams ------------------------------------------------------------------------------------------------------------------


def product_game_after(order: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Means of two normal policies after one update on r = a1 a2 that started from (-0.25, 0.25); at once without an order.

    The batch is a grid of quantiles, so that its means are those of the policies and not an estimate of them.
    """
    spec = ProductGameEnvironment(Runtime(torch.device("cpu"), 0), num_envs=1).spec
    actor = StochasticActor(spec, hidden=[], share="none").double()
    layer = actor.network.layers[0]
    assert isinstance(layer, TeamLinear)
    with torch.no_grad():
        for weight, bias, mean in zip(layer.weights, layer.biases, (-0.25, 0.25), strict=True):
            weight.zero_()
            bias.fill_(mean)
    actor.log_deviation.requires_grad_(False)
    points = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    grid = torch.cartesian_prod(points, points) + torch.tensor([-0.25, 0.25], dtype=torch.float64)
    shape = (len(grid), 1)
    batch = TensorDict({}, batch_size=list(shape))
    batch.set(keys.OBSERVATION, torch.ones(*shape, 2, 1, dtype=torch.float64))
    batch.set(keys.STATE, torch.ones(*shape, spec.state_size, dtype=torch.float64))
    for key in (keys.ALIVE, keys.ACTION_DIMS):
        batch.set(key, torch.ones(*shape, 2, 1, dtype=torch.bool))
    batch.set(keys.ACTION, grid.view(*shape, 2, 1))
    batch.set(keys.LOG_PROB, torch.distributions.Normal(0.0, 1.0).log_prob(batch[keys.ACTION] - torch.tensor([[-0.25], [0.25]])))
    for key in (keys.ADVANTAGE, keys.VALUE_TARGET, keys.STATE_VALUE):
        batch.set(key, grid.prod(-1).view(*shape, 1, 1).expand(*shape, 2, 1))
    step = step_of(spec, kl_limit=0.5, damping=1e-3)
    if order is None:
        step.update(batch, learning_of(actor, spec))
    else:
        monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
        SequentialUpdate(spec, step=step).update(batch, learning_of(actor, spec))
    first, second = (weight.item() + bias.item() for weight, bias in zip(layer.weights, layer.biases, strict=True))
    return first, second


@pytest.mark.parametrize(
    ("order", "means", "payoff"),
    [(None, (0.75, -0.75), -0.5625), ((0, 1), (0.75, 1.25), 0.9375), ((1, 0), (-1.25, -0.75), 0.9375)],
)
def test_regions_at_once_make_the_team_worse_and_in_turn_better(
    order: tuple[int, ...] | None, means: tuple[float, float], payoff: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HA-1 through the updates themselves; the product of the means was -0.0625."""
    found = product_game_after(order, monkeypatch)
    assert found == pytest.approx(means, abs=5e-3)
    assert math.prod(found) == pytest.approx(payoff, abs=1e-2)


@pytest.mark.parametrize("spec", SPECS)
def test_each_agent_in_turn_stays_in_its_own_region(spec: TeamSpec) -> None:
    torch.manual_seed(0)
    actor = StochasticActor(spec, hidden=[7], share="none", output_gain=1.0)
    batch = batch_of(actor, shape=(20, 6))
    batch.set(keys.LOG_PROB, log_probs(actor, batch).detach().unsqueeze(-1))
    SequentialUpdate(spec, step=step_of(spec, kl_limit=0.01)).update(batch, learning_of(actor, spec))
    kl = divergences(spec, batch, played_again(actor, batch))
    for agent in ALL:
        assert 0.001 < kl[..., agent][batch[keys.ALIVE][..., agent, 0]].mean().item() <= 0.01 * (1 + 1e-4)


# --- beside the other components --------------------------------------------------------------------------------------------


def test_targets_follow_a_policy_that_no_optimiser_moved() -> None:
    torch.manual_seed(0)
    actor = StochasticActor(DISCRETE, hidden=[5])
    env = ScriptedEnvironment(DISCRETE, random_script(DISCRETE, envs=3, steps=8))
    targets = SoftTargets(DISCRETE, tau=0.25, actor=True)
    learner = learner_of(env, actor, update=step_of(DISCRETE, epochs=4), targets=targets)
    start = nn.utils.parameters_to_vector(actor.parameters()).detach().clone()
    fit(learner, 1)
    end = nn.utils.parameters_to_vector(actor.parameters()).detach()
    assert (end - start).abs().max() > 1e-3
    copied = nn.utils.parameters_to_vector(targets.actor().parameters())
    torch.testing.assert_close(copied, 0.75 * start + 0.25 * end)


@pytest.mark.parametrize("spec", SPECS)
def test_a_shared_encoder_is_the_policys_alone(spec: TeamSpec) -> None:
    """The critic is fitted to the encoding of the policy as it has become, and leaves it as it is."""
    torch.manual_seed(0)
    actor = TransformerActor(spec, embedding=8, blocks=1, heads=2)
    start = {name: value.clone() for name, value in actor.state_dict().items()}
    values = TransformerCritic(spec, encoder="actor", embedding=8, hidden=[8])
    first = {name: value.clone() for name, value in values.state_dict().items()}
    batch = batch_of(actor, shape=(10, 6))
    ends = []
    for stale in (False, True):
        actor.load_state_dict(start)
        values.load_state_dict(first)
        descent = Descent(nn.ModuleList([actor, values]), lr=0.1)
        learn = learning(actor, values, descent)
        step = step_of(spec, kl_limit=0.01)
        prepared = step.prepare(batch.clone(), learn)
        if stale:
            prepared.set(keys.ENCODING, torch.randn_like(prepared[keys.ENCODING]))
        metrics = step._fit_policy(prepared, learn, None)
        moved = snapshot(actor)
        step.fit_critic(prepared, learn)
        assert 0 < metrics["actor/kl"].item() <= 0.01
        assert not changed(moved, actor)
        ends.append(snapshot(values))
    assert any(not torch.equal(value, first[name.removeprefix("0.")]) for name, value in ends[0].items())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


class Nudge(TrustRegionUpdate):
    """Changes the policy in a way that leaves no gradient."""

    size = 1.0

    def _fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int] | None) -> Metrics:
        with torch.no_grad():
            for parameter in learning.actor.parameters():
                parameter.add_(self.size)
        return {}


class NoNudge(Nudge):
    """Leaves the policy as it is."""

    size = 0.0


def test_a_trial_sees_what_changes_without_a_gradient_and_what_never_would() -> None:
    dry_run(load_recipe("mappo", [f"update={__name__}.Nudge"]))
    with pytest.raises(MarlkitError, match="no gradient reaches actor"):
        dry_run(load_recipe("mappo", [f"update={__name__}.NoNudge"]))


@pytest.mark.parametrize(
    "overrides", list(itertools.product(["env.continuous_actions=true", "env.continuous_actions=false"], ["mlp", "gru"]))
)
def test_recipe_runs(overrides: tuple[str, str]) -> None:
    dry_run(load_recipe("hatrpo", [overrides[0], f"actor.body={overrides[1]}"]))
