"""Learnt beliefs about others: against networks written out, and for opponents with known policies (MOA-1, MOA-2)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, fit, learner_of, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors.deterministic import DeterministicActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.functional.beliefs import mean_of_logits, mean_of_normals, pairs_modelled
from marlkit.learning import Learning
from marlkit.nn.distributions import UNAVAILABLE, NormalTeam, TeamDistribution
from marlkit.opponents import theory_of_mind
from marlkit.opponents._first_trajectories import FirstTrajectories
from marlkit.opponents._latest_steps import LatestSteps
from marlkit.opponents.theory_of_mind import TheoryOfMindOpponents
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import fake_batch, spec_examples

DISCRETE = TeamSpec(3, 4, Discrete(3), action_sizes=(3, 2, 3))
CONTINUOUS = TeamSpec(3, 4, Continuous(2, ((-1.0, 0.0),) * 3, ((3.0, 1.0),) * 3), action_sizes=(2, 1, 2))
SMALL: dict[str, Any] = {
    "memory": 6,
    "memory_layers": 2,
    "hidden": [7, 5],
    "history": 3,
    "characters": 4,
    "character_length": 5,
    "recent": 12,
}
SHARES: list[Any] = ["none", "all", [[0, 2], [1]]]


def model(spec: TeamSpec, **options: Any) -> TheoryOfMindOpponents:
    torch.manual_seed(0)
    return TheoryOfMindOpponents(spec, **{**SMALL, **options})


def livelier(opponents: TheoryOfMindOpponents) -> TheoryOfMindOpponents:
    """Set biases that are not zero and outputs that are not nearly uniform, so that every parameter has an effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in opponents.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return opponents


class Steps:
    """Takes plain optimiser steps."""

    def __init__(self, opponents: TheoryOfMindOpponents, lr: float = 1e-2) -> None:
        self.optimizer = torch.optim.Adam(opponents.parameters(), lr)
        self.limits: list[float | None] = []
        nothing: Any = None
        self.learning = Learning(nothing, nothing, opponents, self.minimise, 0.0)

    def minimise(self, loss: Tensor, max_grad_norm: float | None, adjust: Any = None) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.limits.append(max_grad_norm)
        return {}


def played_batch(spec: TeamSpec, envs: int, steps: int, history: int, seed: int = 0, ends: float = 0.2) -> TensorDict:
    """Random play ``[B, T]``; the recent past is assembled step by step."""
    generator = torch.Generator().manual_seed(seed)
    of_actions = [keys.ACTION_MASK] if spec.discrete else [keys.ACTION_DIMS, keys.LOC]
    wanted = [keys.OBSERVATION, keys.ACTION, keys.ALIVE, *of_actions]
    batch = fake_batch(spec, [envs, steps], wanted, seed)
    is_first = torch.rand(envs, steps, 1, generator=generator) < ends
    is_first[:, 0] = True
    return with_recent(batch.set(keys.IS_FIRST, is_first), history)


def with_recent(batch: TensorDict, history: int) -> TensorDict:
    envs, steps = batch.batch_size
    observation, action, is_first = batch[keys.OBSERVATION], batch[keys.ACTION], batch[keys.IS_FIRST]
    shown = [torch.zeros(envs, steps, history, *x.shape[2:], dtype=x.dtype) for x in (observation, action)]
    valid = torch.zeros(envs, steps, history, dtype=torch.bool)
    for env, step in itertools.product(range(envs), range(steps)):
        past = step
        for place in reversed(range(history)):
            if past == 0 or is_first[env, past]:
                break
            past -= 1
            valid[env, step, place] = True
            for stored, x in zip(shown, (observation, action), strict=True):
                stored[env, step, place] = x[env, past]
    return batch.set(keys.RECENT_OBSERVATION, shown[0]).set(keys.RECENT_ACTION, shown[1]).set(keys.RECENT_VALID, valid)


# --- the networks, written out ----------------------------------------------------------------------------------------------


def affine(layer: Any, network: int, x: Tensor) -> Tensor:
    product = layer.weights[network] @ x
    return product + layer.biases[network] if len(layer.biases) else product


def remember(encoder: Any, network: int, steps: list[Tensor]) -> Tensor:
    """The last hidden state of stacked gated recurrent units over one sequence."""
    width = encoder.layers[0].from_hidden.weights[0].shape[1]
    inputs = steps
    for layer in encoder.layers:
        hidden, outputs = torch.zeros(width, dtype=torch.float64), []
        for x in inputs:
            seen = affine(layer.from_input, network, x).split(width)
            kept = affine(layer.from_hidden, network, hidden).split(width)
            reset, update = torch.sigmoid(seen[0] + kept[0]), torch.sigmoid(seen[1] + kept[1])
            new = torch.tanh(seen[2] + reset * kept[2])
            hidden = (1 - update) * new + update * hidden
            outputs.append(hidden)
        inputs = outputs
    return inputs[-1] if inputs else torch.zeros(width, dtype=torch.float64)


def head(layers: Any, network: int, observation: Tensor, memories: list[Tensor]) -> Tensor:
    entered = affine(layers.seen, network, observation)
    for layer, memory in zip(layers.remembered, memories, strict=True):
        entered = entered + affine(layer, network, memory)
    for layer in layers.rest:
        entered = affine(layer, network, torch.nn.functional.leaky_relu(entered))
    return entered


def features(spec: TeamSpec, observation: Tensor, action: Tensor) -> Tensor:
    taken = torch.eye(spec.action_features, dtype=torch.float64)[action] if spec.discrete else action
    return torch.cat([observation, taken])


def written_out(opponents: TheoryOfMindOpponents, network: int, agent: int, row: TensorDict) -> tuple[Tensor, Tensor]:
    """Natural and impromptu output of one network about one agent at one step."""
    nets, spec, store = opponents.networks, opponents.spec, opponents.trajectories
    trajectories = [
        [torch.cat([store.observation[s, t, agent], store.action[s, t, agent]]) for t in range(int(store.length[s]))]
        for s in range(store.begun)
    ]
    character = torch.stack([remember(nets.character_encoder, network, steps) for steps in trajectories]).mean(0)
    recent = [
        features(spec, row[keys.RECENT_OBSERVATION][m, agent], row[keys.RECENT_ACTION][m, agent])
        for m in range(len(row[keys.RECENT_VALID]))
        if row[keys.RECENT_VALID][m]
    ]
    observation = row[keys.OBSERVATION][agent]
    memories = [character, remember(nets.mental_encoder, network, recent)]
    return head(nets.natural_head, network, observation, memories), head(nets.impromptu_head, network, observation, [])


def in_double(batch: TensorDict) -> TensorDict:
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_logits_equal_the_networks_written_out(share: Any) -> None:
    opponents = livelier(model(DISCRETE, share=share)).double()
    batch = in_double(played_batch(DISCRETE, 2, 9, 3))
    opponents.observe(batch)
    assert sorted(set(opponents.trajectories.length.tolist())) != [5], "trajectories of unequal length belong to this test"
    opponents(batch)
    assert batch[keys.OPPONENT_LOGITS].shape == (2, 9, 1 if share == "all" else 3, 3, 3)
    networks = {"none": (0, 1, 2), "all": (0,)}.get(str(share), (0, 1, 0))
    for env, step, (view, network), agent in itertools.product(range(2), (0, 1, 4, 8), enumerate(networks), range(3)):
        natural, impromptu = written_out(opponents, network, agent, batch[env, step])
        own = DISCRETE.own_action_sizes[agent]
        expected = ((natural[:own] + impromptu[:own]) / 2).softmax(-1)
        found = batch[keys.OPPONENT_LOGITS][env, step, view, agent]
        torch.testing.assert_close(found.softmax(-1)[:own], expected, rtol=0, atol=1e-12)
        assert (found[own:] < UNAVAILABLE + 100).all()


def test_normals_equal_the_networks_written_out() -> None:
    opponents = livelier(model(CONTINUOUS)).double()
    batch = in_double(played_batch(CONTINUOUS, 2, 6, 3))
    opponents.observe(batch)
    opponents(batch)
    middle, half = torch.tensor([1.0, 0.5]).double(), torch.tensor([2.0, 0.5]).double()
    for env, step, network, agent in itertools.product(range(2), (0, 3), range(3), range(3)):
        experts = []
        for output in written_out(opponents, network, agent, batch[env, step]):
            mean, log_deviation = output.split(2)
            experts.append((middle + half * mean, half * log_deviation.clamp(-5, 2).exp()))
        precision = [1 / scale**2 for _, scale in experts]
        loc = sum(p * loc for p, (loc, _) in zip(precision, experts, strict=True)) / sum(precision)
        own = CONTINUOUS.own_action_sizes[agent]
        torch.testing.assert_close(batch[keys.OPPONENT_LOC][env, step, network, agent, :own], loc[:own], rtol=0, atol=1e-12)
        scale = (sum(precision) / 2) ** -0.5
        torch.testing.assert_close(batch[keys.OPPONENT_SCALE][env, step, network, agent, :own], scale[:own], rtol=1e-12, atol=0)


def test_beliefs_do_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    opponents = livelier(model(DISCRETE))
    batch = played_batch(DISCRETE, 3, 7, 3)
    opponents.observe(batch)
    whole, character = opponents(batch.clone())[keys.OPPONENT_LOGITS], opponents.character.clone()
    monkeypatch.setitem(theory_of_mind.EVALUATIONS, "cpu", 40)
    torch.testing.assert_close(opponents(batch.clone())[keys.OPPONENT_LOGITS], whole)
    opponents.load_state_dict(opponents.state_dict())
    opponents._refresh_character()
    torch.testing.assert_close(opponents.character, character)


# --- the rules --------------------------------------------------------------------------------------------------------------


def test_mean_of_normals_by_hand_and_by_integration() -> None:
    first, second = (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])), (torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0]))
    loc, scale = mean_of_normals(first, second)
    torch.testing.assert_close(loc, torch.tensor([2.4, 1.0]))
    torch.testing.assert_close(scale, torch.tensor([math.sqrt(0.4), 2.0]))
    grid = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    density = (-0.25 * grid**2 - 0.25 * ((grid - 3) / 0.5) ** 2).exp()
    density /= density.sum()
    assert float((grid * density).sum()) == pytest.approx(2.4, abs=1e-6)
    assert float(((grid - 2.4) ** 2 * density).sum()) == pytest.approx(0.4, abs=1e-6)


def test_mean_of_logits_is_the_geometric_mean() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.4, 0.5])
    root = (p * q).sqrt()
    torch.testing.assert_close(mean_of_logits(p.log() + 3, q.log()).softmax(-1), root / root.sum())
    torch.testing.assert_close(mean_of_logits(p.log(), p.log()).softmax(-1), p)


def test_pairs_by_hand() -> None:
    assert pairs_modelled([0, 1, 2]).tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert pairs_modelled([0, 0, 0]).tolist() == [[2, 2, 2]]
    assert pairs_modelled([0, 1, 0]).tolist() == [[1, 2, 1], [1, 0, 1]]
    assert pairs_modelled([0]).tolist() == [[0]]


# --- what is played and what is imagined ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("share", SHARES, ids=str)
def test_played_actions_are_copied_and_others_come_from_beliefs(spec: TeamSpec, share: Any) -> None:
    opponents = livelier(model(spec, share=share))
    batch = played_batch(spec, 2, 5, 3)
    action = batch[keys.ACTION].clone()
    assert torch.equal(opponents(batch)[keys.JOINT_ACTION], action.unsqueeze(2))
    imagined = opponents(batch.clone(), played=False)[keys.JOINT_ACTION]
    assert imagined.shape == (2, 5, 3, *action.shape[2:])
    assert imagined.dtype == action.dtype
    for agent in range(3):
        assert torch.equal(imagined[:, :, agent, agent], action[:, :, agent])
    opponents = livelier(model(spec, share=share, noise="behaviour"))
    imagined, again = (opponents(batch.clone(), played=False)[keys.JOINT_ACTION] for _ in range(2))
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert not torch.equal(imagined[:, :, off_diagonal], again[:, :, off_diagonal])
    assert not torch.equal(batch[keys.SAMPLE_SEED], opponents(batch.clone())[keys.SAMPLE_SEED])


def test_imagined_actions_have_the_believed_frequencies() -> None:
    opponents = livelier(model(DISCRETE))
    row = played_batch(DISCRETE, 1, 1, 3)
    imagined = opponents(row.expand(4000, 1).clone(), played=False)
    belief = opponents(row)[keys.OPPONENT_LOGITS][0, 0].softmax(-1)
    frequency = torch.nn.functional.one_hot(imagined[keys.JOINT_ACTION][:, 0], 3).float().mean(0)
    for i, j in itertools.permutations(range(3), 2):
        torch.testing.assert_close(frequency[i, j], belief[i, j], rtol=0, atol=0.035)
    assert not imagined[keys.JOINT_ACTION][..., 1].eq(2).any(), "agent 1 has two actions"


def test_imagined_normal_actions_have_the_believed_moments_and_no_padding() -> None:
    opponents = livelier(model(CONTINUOUS, noise="behaviour"))
    row = played_batch(CONTINUOUS, 1, 1, 3)
    drawn = opponents(row.expand(4000, 1).clone(), played=False)[keys.JOINT_ACTION][:, 0]
    opponents(row)
    loc, scale = (row[key][0, 0] for key in (keys.OPPONENT_LOC, keys.OPPONENT_SCALE))
    for i, j in itertools.permutations(range(3), 2):
        own = CONTINUOUS.own_action_sizes[j]
        standard = (drawn[:, i, j] - loc[i, j]) / scale[i, j]
        torch.testing.assert_close(standard.mean(0)[:own], torch.zeros(own), rtol=0, atol=0.08)
        torch.testing.assert_close(standard.std(0)[:own], torch.ones(own), rtol=0, atol=0.06)
        assert not drawn[:, i, j, own:].any()


class Seer(TheoryOfMindOpponents):
    """Believes what the policies are."""

    contract = dataclasses.replace(
        TheoryOfMindOpponents.contract, reads=(*TheoryOfMindOpponents.contract.reads, keys.LOC, keys.SCALE)
    )

    def beliefs(self, rows: TensorDictBase, character: Tensor) -> tuple[TeamDistribution, TeamDistribution]:
        loc, scale = (rows[key].unsqueeze(1).expand(-1, self.spec.n_agents, -1, -1) for key in (keys.LOC, keys.SCALE))
        belief = NormalTeam(loc, scale, rows[keys.ACTION_DIMS].unsqueeze(1))
        return belief, belief


@pytest.mark.parametrize(("noise", "deviations"), [("chosen", (0.0, 0.2)), ("behaviour", (0.5, 0.5))])
def test_whoever_models_the_others_their_noise_is_the_same(noise: Any, deviations: tuple[float, float]) -> None:
    """Deviation of the others' actions in next states, in half-ranges, without and with noise of the target."""
    spec = TeamSpec(2, 3, Continuous(1, ((-2.0,),) * 2, ((2.0,),) * 2))
    rows = 4000
    for target_noise, wanted in zip((0.0, 0.2), deviations, strict=True):
        torch.manual_seed(0)
        actor = DeterministicActor(spec, hidden=[4], exploration=0.5, target_noise=target_noise, target_noise_limit=2.0)
        seen = fake_batch(spec, [1], [*actor.reads, *model(spec).reads]).expand(rows).clone()
        actor.bootstrap(seen)
        for opponents in (TruePolicyOpponents(spec, noise=noise), Seer(spec, noise=noise, **SMALL)):
            opponents.wanted = frozenset({keys.JOINT_ACTION})
            joint = opponents(seen.clone(), played=False)[keys.JOINT_ACTION].expand(rows, 2, 2, 1)
            assert torch.equal(joint[:, 0, 0], seen[keys.ACTION][:, 0])
            assert torch.equal(joint[:, 1, 1], seen[keys.ACTION][:, 1])
            for view, other in ((0, 1), (1, 0)):
                apart = (joint[:, view, other] - seen[keys.LOC][:, other]) / 2
                assert apart.mean().item() == pytest.approx(0, abs=0.03)
                assert apart.std().item() == pytest.approx(wanted, rel=0.05, abs=1e-6)


def test_true_policies_that_are_drawn_from_have_their_frequencies() -> None:
    rows = fake_batch(DISCRETE, [1], [keys.ACTION, keys.LOGITS]).expand(4000).clone()
    joint = TruePolicyOpponents(DISCRETE, noise="behaviour")(rows, played=False)[keys.JOINT_ACTION]
    frequency = torch.nn.functional.one_hot(joint, 3).float().mean(0)
    for i, j in itertools.product(range(3), repeat=2):
        chosen = torch.nn.functional.one_hot(rows[keys.ACTION][0, j], 3).float()
        expected = chosen if i == j else rows[keys.LOGITS][0, j].softmax(-1)
        torch.testing.assert_close(frequency[i, j], expected, rtol=0, atol=0.035)


def test_a_masked_action_has_no_belief() -> None:
    opponents = livelier(model(DISCRETE))
    batch = played_batch(DISCRETE, 4, 6, 3)
    batch[keys.ACTION_MASK][..., 2, 0] = False
    logits = opponents(batch, played=False)[keys.OPPONENT_LOGITS]
    assert (logits[..., 2, 0] == UNAVAILABLE).all()
    assert (logits[..., 0, 0] > UNAVAILABLE).all()
    assert not batch[keys.JOINT_ACTION][:, :, :2, 2].eq(0).any()


def test_the_present_action_does_not_enter() -> None:
    opponents = livelier(model(DISCRETE))
    batch = played_batch(DISCRETE, 2, 6, 3, ends=0.0)
    opponents.observe(batch)
    before = opponents(batch.clone())[keys.OPPONENT_LOGITS]
    other = batch.clone()
    other[keys.ACTION][:, 4] = (other[keys.ACTION][:, 4] + 1) % 2
    # The recent past of the later steps is what it was: only the present action has changed.
    assert torch.equal(opponents(other)[keys.OPPONENT_LOGITS], before)
    with_recent(other, 3)
    changed = (opponents(other)[keys.OPPONENT_LOGITS] != before).flatten(2).any(-1)
    assert changed.all(0).tolist() == [False] * 5 + [True]


# --- what is kept -----------------------------------------------------------------------------------------------------------


def numbered(firsts: list[list[int]]) -> TensorDict:
    """Two environments with observations ``10 env + step`` and actions 0; episodes begin at ``firsts``."""
    spec = TeamSpec(2, 1, Discrete(2))
    steps = len(firsts[0])
    batch = fake_batch(spec, [2, steps], [keys.OBSERVATION, keys.ACTION, keys.ALIVE, keys.ACTION_MASK])
    count = 10 * torch.arange(2).view(2, 1, 1, 1) + torch.arange(steps).view(1, steps, 1, 1)
    batch.set(keys.OBSERVATION, count.float().expand(2, steps, 2, 1).clone())
    batch.set(keys.ACTION, (count.squeeze(-1) % 2).expand(2, steps, 2).clone())
    return batch.set(keys.IS_FIRST, torch.tensor(firsts).bool().unsqueeze(-1))


def kept(store: FirstTrajectories) -> list[list[int]]:
    return [store.observation[s, : int(store.length[s]), 0, 0].int().tolist() for s in range(store.begun)]


@pytest.mark.parametrize("cuts", [[8], [1] * 8, [3, 5]], ids=str)
def test_trajectories_are_cut_where_episodes_end_and_not_where_rollouts_do(cuts: list[int]) -> None:
    batch = numbered([[1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 1, 0]])
    store = FirstTrajectories(TeamSpec(2, 1, Discrete(2)), count=5, length=4)
    for part in batch.split(cuts, 1):
        store.record(part)
    # Environment 0 is cut after four steps each; environment 1 where episodes begin; the fifth place goes to who is first.
    assert kept(store) == [[0, 1, 2, 3], [10, 11], [12, 13, 14, 15], [4, 5, 6, 7], [16, 17]]
    assert store.owner.tolist() == [-1, -1, -1, -1, 1]
    assert store.action[2, :4].argmax(-1)[:, 0].tolist() == [0, 1, 0, 1]
    store.record(numbered([[1, 0, 0], [0, 0, 0]]))
    assert kept(store)[4] == [16, 17, 10, 11]
    assert store.complete
    before = copy.deepcopy(store.state_dict())
    store.record(batch)
    assert all(torch.equal(before[name], value) for name, value in store.state_dict().items())


def test_more_environments_than_trajectories() -> None:
    store = FirstTrajectories(TeamSpec(2, 1, Discrete(2)), count=1, length=2)
    store.record(numbered([[1, 0, 0], [1, 0, 0]]))
    assert kept(store) == [[0, 1]]
    assert store.complete


def test_the_latest_steps_replace_the_oldest() -> None:
    ring = LatestSteps(TeamSpec(2, 1, Discrete(2)), 5)
    assert not ring.steps()[keys.ALIVE].any()
    batch = numbered([[1, 0, 0], [1, 0, 0]])
    ring.record(batch[:, :2])
    assert ring.steps()[keys.OBSERVATION][:, 0, 0].tolist() == [0, 10, 1, 11, 0]
    assert ring.steps()[keys.ALIVE][:, 0, 0].tolist() == [True] * 4 + [False]
    ring.record(batch[:, 2:])
    assert ring.steps()[keys.OBSERVATION][:, 0, 0].tolist() == [12, 10, 1, 11, 2]
    assert ring.steps()[keys.ACTION][:, 1].tolist() == [0, 0, 1, 1, 0]
    ring.record(batch)
    assert sorted(ring.steps()[keys.OBSERVATION][:, 0, 0].tolist()) == [1, 2, 10, 11, 12]


def test_characters_are_recomputed_after_a_fit_and_before_the_first() -> None:
    opponents = livelier(model(DISCRETE))
    batch = played_batch(DISCRETE, 2, 9, 3)
    assert not opponents.character.any()
    opponents.observe(batch)
    first = opponents.character.clone()
    opponents.fit(batch, Steps(opponents).learning)
    assert opponents.trajectories.begun == 4
    everything = opponents.networks.characters(*opponents.trajectories.steps(torch.arange(4))).mean(0)
    torch.testing.assert_close(opponents.character, everything)
    assert not torch.allclose(first, everything)


def test_a_fit_trains_the_characters_through_a_few_trajectories() -> None:
    opponents = livelier(model(DISCRETE, character_batch=2))
    opponents.observe(played_batch(DISCRETE, 2, 9, 3))
    each = opponents.networks.characters(*opponents.trajectories.steps(torch.arange(4)))
    pairs = [(each[a] + each[b]) / 2 for a, b in itertools.combinations(range(4), 2)]
    drawn: set[int] = set()
    for _ in range(20):
        character = opponents._trained_character(opponents._some_trajectories())
        assert character.requires_grad
        drawn.update(place for place, pair in enumerate(pairs) if torch.allclose(pair, character, atol=1e-6))
    assert len(drawn) > 2


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_a_loaded_model_continues_as_the_saved_one(spec: TeamSpec) -> None:
    batches = played_batch(spec, 2, 18, 3, ends=0.1).split(3, 1)
    options = {"character_batch": 2, "fit_rows": 4, "every": 2, "recent": 30}

    def train(opponents: TheoryOfMindOpponents, steps: Steps, some: list[TensorDict]) -> None:
        for batch in some:
            opponents.observe(batch)
            opponents.fit(batch, steps.learning)

    torch.manual_seed(5)
    whole = model(spec, **options)
    steps = Steps(whole)
    train(whole, steps, batches[:3])
    rows = batches[0]
    believed = whole(rows.clone())["opponents"].exclude("sample_seed")
    saved = copy.deepcopy((whole.state_dict(), steps.optimizer.state_dict(), torch.get_rng_state()))
    train(whole, steps, batches[3:])
    assert (saved[0]["trajectories.owner"] >= 0).any(), "a trajectory that still grows belongs to this test"
    assert saved[0]["latest.position"] > 0
    resumed = TheoryOfMindOpponents(spec, **{**SMALL, **options})
    resumed.load_state_dict(saved[0])
    assert (resumed(rows.clone())["opponents"].exclude("sample_seed") == believed).all()
    later = Steps(resumed)
    later.optimizer.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    train(resumed, later, batches[3:])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# --- the loss ---------------------------------------------------------------------------------------------------------------


def test_cross_entropies_accuracy_and_divergence_by_hand() -> None:
    """Against loops over rows, modelling agents and modelled agents."""
    opponents = livelier(model(DISCRETE, share=[[0, 2], [1]], character_batch=99, head_coef=0.5)).double()
    batch = in_double(played_batch(DISCRETE, 2, 4, 3))
    batch[keys.ALIVE][0, 1, 2] = False
    opponents.observe(batch)
    rows = batch.reshape(-1).set(keys.LOGITS, fake_batch(DISCRETE, [8], [keys.LOGITS], 3)[keys.LOGITS].double())
    torch.manual_seed(0)
    loss, metrics = opponents.loss(rows, opponents._some_trajectories())
    opponents.requires_grad_(False)
    sums: dict[str, float] = dict.fromkeys(["belief", "natural", "impromptu", "hit", "kl"], 0.0)
    count = 0
    for row, i, j in itertools.product(range(8), range(3), range(3)):
        if i == j or not rows[keys.ALIVE][row, j]:
            continue
        own = DISCRETE.own_action_sizes[j]
        natural, impromptu = (x[:own].log_softmax(-1) for x in written_out(opponents, (0, 1, 0)[i], j, rows[row]))
        belief = ((natural + impromptu) / 2).log_softmax(-1)
        true = rows[keys.LOGITS][row, j, :own].log_softmax(-1)
        action = int(rows[keys.ACTION][row, j])
        for name, log_probs in (("belief", belief), ("natural", natural), ("impromptu", impromptu)):
            sums[name] -= float(log_probs[action])
        sums["hit"] += float(belief.argmax() == action)
        sums["kl"] += float((true.exp() * (true - belief)).sum())
        count += 1
    mean = {name: total / count for name, total in sums.items()}
    # The ring of 12 pairs keeps 4 joint steps of 3 agents, the latest of the 8.
    latest = opponents.latest.steps()
    assert torch.equal(latest[keys.ACTION], batch[keys.ACTION].transpose(0, 1).flatten(0, 1)[-4:])
    recent = []
    for row, (i, j) in itertools.product((2, 3, 6, 7), itertools.permutations(range(3), 2)):
        _, impromptu = written_out(opponents, (0, 1, 0)[i], j, rows[row])
        recent.append(-float(impromptu[: DISCRETE.own_action_sizes[j]].log_softmax(-1)[rows[keys.ACTION][row, j]]))
    recent_mean = sum(recent) / len(recent)
    assert float(metrics["opponents/cross_entropy"]) == pytest.approx(mean["belief"], abs=1e-10)
    assert float(metrics["opponents/natural_cross_entropy"]) == pytest.approx(mean["natural"], abs=1e-10)
    assert float(metrics["opponents/impromptu_cross_entropy"]) == pytest.approx(recent_mean, abs=1e-10)
    assert float(metrics["opponents/accuracy"]) == pytest.approx(mean["hit"], abs=1e-10)
    assert float(metrics["opponents/kl"]) == pytest.approx(mean["kl"], abs=1e-10)
    assert float(loss.detach()) == pytest.approx(mean["belief"] + 0.5 * (mean["natural"] + recent_mean), abs=1e-10)


def test_every_network_learns_from_its_own_beliefs_alone_and_of_others_only() -> None:
    opponents = livelier(model(DISCRETE, character_batch=99))
    batch = played_batch(DISCRETE, 2, 6, 3)
    opponents.observe(batch)

    def gradients(rows: TensorDict) -> list[list[Tensor]]:
        """By network."""
        opponents.latest.record(rows.unsqueeze(0))
        opponents.zero_grad(set_to_none=True)
        opponents.loss(rows, opponents._some_trajectories())[0].backward()
        lists = [m for m in opponents.modules() if isinstance(m, torch.nn.ParameterList) and len(m)]
        return [[parameters[network].grad.clone() for parameters in lists] for network in range(3)]

    rows = batch.reshape(-1)
    before = gradients(rows)
    assert all(gradient.abs().sum() > 0 for network in before for gradient in network)
    changed = rows.clone()
    changed[keys.ACTION][:, 0] = (changed[keys.ACTION][:, 0] + 1) % 3
    after = gradients(changed)
    same = [all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]
    assert same == [True, False, False]
    opponents.zero_grad(set_to_none=True)
    belief, natural = opponents.beliefs(rows, opponents._trained_character(opponents._some_trajectories()))
    (belief.log_prob(opponents._executed(rows))[:, 1].sum() + natural.entropy()[:, 1].sum()).backward()
    for parameters in (m for m in opponents.modules() if isinstance(m, torch.nn.ParameterList) and len(m)):
        assert not parameters[0].grad.any()
        assert parameters[1].grad.any()
        assert not parameters[2].grad.any()


def test_actions_of_agents_that_are_not_alive_are_not_learnt() -> None:
    opponents = livelier(model(DISCRETE, character_batch=99))
    batch = played_batch(DISCRETE, 2, 6, 3)
    batch[keys.ALIVE][..., 1, :] = False
    opponents.observe(batch)
    losses = []
    for offset in range(2):
        changed = batch.reshape(-1).clone()
        changed[keys.ACTION][:, 1] = (changed[keys.ACTION][:, 1] + offset) % 2
        losses.append(opponents.loss(changed, opponents._some_trajectories())[0])
    assert torch.equal(losses[0], losses[1])


def test_other_losses_do_not_train_it_and_its_own_trains_nothing_else() -> None:
    opponents = livelier(model(CONTINUOUS))
    batch = played_batch(CONTINUOUS, 2, 4, 3)
    opponents.observe(batch)
    leaf = batch[keys.OBSERVATION].requires_grad_()
    weight = torch.ones((), requires_grad=True)
    batch.set(keys.ACTION, batch[keys.ACTION] * weight)
    for played in (True, False):
        rows = opponents(batch.copy(), played=played)
        written = [rows[key] for key in opponents.writes if rows[key].is_floating_point()]
        assert len(written) == 3
        assert not any(tensor.requires_grad for tensor in written)
        (weight * sum(tensor.sum() for tensor in written)).backward()
    assert all(parameter.grad is None for parameter in opponents.parameters())
    weight.grad = None
    opponents.fit(batch, Steps(opponents).learning)
    assert leaf.grad is None
    assert weight.grad is None


def test_it_fits_at_its_interval_on_at_most_fit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    opponents = model(DISCRETE, every=3, fit_rows=5, max_grad_norm=2.5)
    batch = played_batch(DISCRETE, 2, 6, 3)
    opponents.observe(batch)
    seen: list[TensorDict] = []
    loss = opponents.loss

    def seeing(rows: TensorDict, *others: Any) -> Any:
        seen.append(rows)
        return loss(rows, *others)

    monkeypatch.setattr(opponents, "loss", seeing)
    steps = Steps(opponents)
    metrics = [opponents.fit(batch, steps.learning) for _ in range(7)]
    assert [bool(found) for found in metrics] == [True, False, False, True, False, False, True]
    assert steps.limits == [2.5] * 3
    assert [rows.batch_size for rows in seen] == [torch.Size([5])] * 3
    everything = batch.reshape(-1)[keys.OBSERVATION].flatten(1)
    for rows in seen:
        drawn = torch.cdist(rows[keys.OBSERVATION].flatten(1), everything).argmin(1)
        assert len(set(drawn.tolist())) == 5
        torch.testing.assert_close(everything[drawn], rows[keys.OBSERVATION].flatten(1), rtol=0, atol=0)
        assert torch.equal(batch.reshape(-1)[keys.ACTION][drawn], rows[keys.ACTION])
    assert not torch.equal(seen[0][keys.OBSERVATION], seen[1][keys.OBSERVATION])
    assert "opponents/kl" not in metrics[0]


@pytest.mark.parametrize("spec", [TeamSpec(1, 3, Discrete(2)), TeamSpec(1, 3, Continuous(2))], ids=["discrete", "continuous"])
def test_a_single_agent_has_no_other_to_model(spec: TeamSpec) -> None:
    opponents = model(spec)
    batch = played_batch(spec, 2, 4, 3)
    before = copy.deepcopy(opponents.state_dict())
    opponents.observe(batch)
    steps = Steps(opponents)
    assert opponents.fit(batch, steps.learning) == {}
    assert steps.limits == []
    assert all(torch.equal(before[name], value) for name, value in opponents.state_dict().items())
    for played in (True, False):
        rows = opponents(batch.clone(), played=played)
        assert torch.equal(rows[keys.JOINT_ACTION].squeeze(2), batch[keys.ACTION])
        assert all(torch.isfinite(rows[key]).all() for key in opponents.writes)


# --- opponents whose policies are known -------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "memory": 8, "memory_layers": 1, "hidden": [16], "characters": 48, "character_length": 12, "character_batch": 48,
    "fit_rows": 512, "recent": 3000,
}  # fmt: skip


def team_play(actions: Tensor, history: int, observation: Tensor | None = None, actions_each: int = 3) -> TensorDict:
    """Play ``[B, T]`` of one episode each, from the actions ``[B, T, N]``; every observation is zero, or ``observation``."""
    envs, steps, n_agents = actions.shape[:3]
    if observation is None:
        observation = torch.zeros(envs, steps, n_agents, 1)
    is_first = torch.zeros(envs, steps, 1, dtype=torch.bool)
    is_first[:, 0] = True
    content = {
        keys.OBSERVATION: observation,
        keys.ACTION: actions,
        keys.ALIVE: torch.ones(envs, steps, n_agents, 1, dtype=torch.bool),
        keys.IS_FIRST: is_first,
        keys.ACTION_MASK: torch.ones(envs, steps, n_agents, actions_each, dtype=torch.bool),
    }
    batch = TensorDict(content, batch_size=[envs, steps])
    shown: dict[Any, Tensor] = {
        keys.RECENT_OBSERVATION: observation,
        keys.RECENT_ACTION: actions,
        keys.RECENT_VALID: torch.ones(envs, steps, dtype=torch.bool),
    }
    for key, x in shown.items():
        padded = torch.cat([torch.zeros_like(x[:, :1])] * history + [x], 1)
        batch.set(key, torch.stack([padded[:, m : m + steps] for m in range(history)], 2))
    return batch


def entropy(p: Tensor) -> float:
    return float(-(p * p.clamp(min=1e-30).log()).sum())


def population_optimum(policies: Tensor, head_coef: float) -> tuple[Tensor, Tensor]:
    """Natural predictions and beliefs that minimise the expected loss with uninformative observations, by descent on logits."""
    natural = torch.zeros_like(policies, requires_grad=True)
    impromptu = torch.zeros_like(policies[0], requires_grad=True)
    descent = torch.optim.LBFGS([natural, impromptu], max_iter=500, tolerance_grad=1e-9)

    def loss() -> Tensor:
        descent.zero_grad()
        logits = [(natural + impromptu) / 2, natural, impromptu.expand_as(natural)]
        parts = [-(policies * x.log_softmax(-1)).sum(-1).mean() for x in logits]
        total = parts[0] + head_coef * (parts[1] + parts[2])
        total.backward()
        return total

    descent.step(loss)
    return natural.detach().softmax(-1), ((natural + impromptu) / 2).detach().softmax(-1)


def stationary(policies: Tensor, envs: int, steps: int) -> Tensor:
    drawn = torch.distributions.Categorical(policies).sample(torch.Size((envs, steps)))
    assert isinstance(drawn, Tensor)
    return drawn


@pytest.mark.parametrize("head_coef", [1.0, 0.05])
def test_characters_distinguish_agents_with_equal_observations(head_coef: float) -> None:
    """MOA-1: equal observations, different policies. Agent 0 models agents 1 and 2 with one network."""
    policies = torch.tensor([[0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    opponents = model(TeamSpec(3, 1, Discrete(3)), **QUICK, history=2, head_coef=head_coef)
    steps = Steps(opponents, 2e-2)
    for _ in range(120):
        batch = team_play(stationary(policies, 48, 12), 2)
        opponents.observe(batch)
        opponents.fit(batch, steps.learning)
    rows = team_play(stationary(policies, 8, 8), 2).reshape(-1)
    with torch.no_grad():
        belief, natural = opponents.beliefs(rows, opponents.character)
        impromptu = opponents.impromptu(rows)
    others = [1, 2]
    expected_natural, expected_belief = population_optimum(policies[others], head_coef)
    for place, j in enumerate(others):
        found = [each.parameters()[keys.LOGITS][:, 0, j].softmax(-1).mean(0) for each in (natural, belief, impromptu)]
        torch.testing.assert_close(found[0], expected_natural[place], rtol=0, atol=0.06)
        torch.testing.assert_close(found[1], expected_belief[place], rtol=0, atol=0.06)
        torch.testing.assert_close(found[2][1], policies[others].mean(0)[1], rtol=0, atol=0.06)
    observed = {
        name: -float((policies[others] * each.parameters()[keys.LOGITS][:, 0, others].mean(0)).sum(-1).mean())
        for name, each in (("natural", natural), ("belief", belief), ("impromptu", impromptu))
    }
    own = sum(entropy(p) for p in policies[others]) / 2
    mixture = entropy(policies[others].mean(0))
    assert own < 0.81
    assert mixture > 1.05
    assert observed["impromptu"] > mixture - 1e-3
    if head_coef == 1.0:
        # The predictions disagree for ever, and the belief stands between them.
        assert observed["natural"] < own + 0.03
        assert observed["belief"] < own + 0.045
    else:
        assert observed["belief"] < own + 0.015


def test_mental_states_predict_from_the_recent_past() -> None:
    """MOA-1: agent 1 mostly repeats its last action, which only the recent past shows."""
    stay = 0.9

    def play() -> TensorDict:
        actions = torch.randint(3, (48, 12, 2))
        for step in range(1, 12):
            kept_up = torch.rand(48) < stay
            actions[:, step, 1] = torch.where(kept_up, actions[:, step - 1, 1], actions[:, step, 1])
        return team_play(actions, 3)

    opponents = model(TeamSpec(2, 1, Discrete(3)), **QUICK, history=3)
    steps = Steps(opponents, 2e-2)
    for _ in range(100):
        batch = play()
        opponents.observe(batch)
        opponents.fit(batch, steps.learning)
    rows = batch[:, 1:].reshape(-1)
    with torch.no_grad():
        belief, natural = opponents.beliefs(rows, opponents.character)
        impromptu = opponents.impromptu(rows)
    repeated = torch.tensor([stay + (1 - stay) / 3, (1 - stay) / 3, (1 - stay) / 3])
    last = batch[:, :-1][keys.ACTION][..., 1].reshape(-1, 1)
    truth = torch.full((len(rows), 3), (1 - stay) / 3).scatter(1, last, float(repeated[0]))
    cross = [-float((truth * each.parameters()[keys.LOGITS][:, 0, 1]).sum(-1).mean()) for each in (natural, belief, impromptu)]
    assert cross[0] < entropy(repeated) + 0.06
    assert cross[2] > math.log(3) - 0.02
    assert max(cross[:2]) < cross[2] - 0.4


@pytest.mark.parametrize("share", ["none", "all"])
def test_stationary_policies_are_learnt(share: str) -> None:
    """MOA-2: policies that depend on the observation; the divergence from them falls below 0.01."""
    torch.manual_seed(4)
    policies = torch.softmax(1.5 * torch.randn(4, 3), -1)
    opponents = model(TeamSpec(2, 4, Discrete(3)), **QUICK, history=2, share=share)
    steps = Steps(opponents, 1e-2)
    divergences = []
    for _ in range(100):
        context = torch.randint(4, (64, 16, 2))
        actions = torch.distributions.Categorical(policies[context]).sample()
        batch = team_play(actions, 2, torch.nn.functional.one_hot(context, 4).float())
        opponents.observe(batch)
        divergences.append(float(opponents.fit(batch.set(keys.LOGITS, policies[context].log()), steps.learning)["opponents/kl"]))
    assert divergences[0] > 0.1
    assert sum(divergences[-5:]) / 5 < 0.01


def test_stationary_normal_policies_are_learnt() -> None:
    """MOA-2 for continuous actions: the mean follows the observation."""
    torch.manual_seed(4)
    spec = TeamSpec(2, 1, Continuous(1))
    opponents = model(spec, **QUICK, history=2)
    steps = Steps(opponents, 1e-2)
    divergences = []
    for _ in range(120):
        observation = torch.rand(64, 16, 2, 1) * 2 - 1
        batch = team_play(0.8 * observation + 0.3 * torch.randn(64, 16, 2, 1), 2, observation)
        batch.set(keys.ACTION_DIMS, torch.ones(64, 16, 2, 1, dtype=torch.bool))
        opponents.observe(batch)
        batch.set(keys.LOC, 0.8 * observation).set(keys.SCALE, torch.full_like(observation, 0.3))
        metrics = opponents.fit(batch, steps.learning)
        divergences.append(float(metrics["opponents/kl"]))
    assert divergences[0] > 0.5
    assert sum(divergences[-5:]) / 5 < 0.01
    assert "opponents/accuracy" not in metrics


# --- in a training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_it_is_trained_beside_the_policy(spec: TeamSpec) -> None:
    torch.manual_seed(0)
    opponents = model(spec)
    critic = MarginalisedCritic(spec, hidden=[4], samples=2)
    env = ScriptedEnvironment(spec, random_script(spec, 3, 12))
    learner = learner_of(env, StochasticActor(spec, hidden=[4]), critic=critic, opponents=opponents)
    assert learner.data.history == 3
    before = [parameter.clone() for parameter in opponents.parameters()]
    fit(learner, 3)
    moved = [not torch.equal(old, new) for old, new in zip(before, opponents.parameters(), strict=True)]
    assert all(moved)
    assert opponents.trajectories.begun == 4
    assert int(opponents.updates) == 3


def test_beliefs_that_no_component_reads_are_not_computed_for_played_steps() -> None:
    opponents = TheoryOfMindOpponents(spec_examples()[0], memory=4, hidden=[4], characters=2)
    batch = fake_batch(opponents.spec, [3], opponents.reads)
    opponents.wanted = frozenset({keys.JOINT_ACTION})
    assert keys.OPPONENT_LOGITS not in opponents(batch.clone()).keys(True, True)
    opponents.wanted = frozenset({keys.JOINT_ACTION, keys.OPPONENT_LOGITS})
    assert keys.OPPONENT_LOGITS in opponents(batch.clone()).keys(True, True)
