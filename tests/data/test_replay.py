"""Replay: stored, drawn and overwritten steps, against the log of all played steps."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from scripted import Script, ScriptedEnvironment, fit, learner_of, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Critic
from marlkit.contract import Contract
from marlkit.data._recent_past import PAST
from marlkit.data.replay import ReplayData
from marlkit.errors import OptionError
from marlkit.estimators.n_step import NStepEstimator
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.training.learner import Learner

B, N, K = 3, 2, 60
DISCRETE = TeamSpec(N, 4, Discrete(3))
CONTINUOUS = TeamSpec(N, 4, Continuous(2))
GAMMA = 0.9


def numbered(spec: TeamSpec, *, envs: int = B, ends: float = 0.25) -> Script:
    """A random script whose reward identifies the step: ``100 env + time``."""
    script = random_script(spec, envs, K, ends=ends)
    number = torch.arange(K).view(K, 1) + 100 * torch.arange(envs)
    script.reward = number.view(K, envs, 1, 1).expand(K, envs, spec.n_agents, 1).float()
    return script


def number_of(batch: TensorDictBase) -> Tensor:
    return batch[keys.REWARD][..., 0, 0].long()


def an_actor(spec: TeamSpec, body: Any = "mlp", length: int = 4) -> StochasticActor:
    return StochasticActor(spec, hidden=[6], body=body, sequence_length=length, output_gain=1.0)


class Play:
    """Plays with a replay and logs all steps."""

    def __init__(self, data: ReplayData, actor: StochasticActor, script: Script) -> None:
        self.data, self.actor = data, actor
        self.env = ScriptedEnvironment(actor.spec, script)
        self.log: list[TensorDict] = []

    def iterate(self, times: int = 1) -> list[TensorDict]:
        """Collect some times; the batches of the last one."""
        for _ in range(times):
            played = self.data.collect(self.env, self.actor)
            self.log.append(played.clone())
        return list(self.data.batches(played, self.actor))

    def step(self, number: int) -> TensorDict:
        """The step of that number as it was played, batch ``[]``."""
        return torch.cat(self.log, 1)[number // 100, number % 100]


def drawn_numbers(data: ReplayData, play: Play) -> set[int]:
    return {int(n) for batch in data.batches(play.log[-1], play.actor) for n in number_of(batch).flatten()}


# --- what is kept and what is drawn ---------------------------------------------------------------------------------------


def test_the_ring_by_hand() -> None:
    """Two environments, room for four steps of each, three steps an iteration."""
    torch.manual_seed(0)
    data = ReplayData(DISCRETE, steps=3, capacity=9, batch_size=64, updates=4, warm_up=0)
    play = Play(data, an_actor(DISCRETE), numbered(DISCRETE, envs=2))
    for times in ([0, 1, 2], [2, 3, 4, 5], [5, 6, 7, 8], [8, 9, 10, 11], [11, 12, 13, 14]):
        play.iterate()
        assert drawn_numbers(data, play) == {*times, *(100 + time for time in times)}


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("body", ["mlp", "gru"])
def test_every_step_drawn_is_as_it_was_played(spec: TeamSpec, body: Any) -> None:
    """With all its keys, hidden states and the log-probability of the policy that played it among them."""
    torch.manual_seed(0)
    data = ReplayData(spec, steps=5, capacity=18 * B, batch_size=40, updates=3, warm_up=0)
    play = Play(data, an_actor(spec, body), numbered(spec))
    seen: set[int] = set()
    for _ in range(6):
        for batch in play.iterate():
            assert batch.batch_size == ((10, 4) if body == "gru" else (40, 1))
            for step in batch.flatten():
                number = int(number_of(step))
                played = play.step(number)
                left_out = {keys.LOGITS} if spec.discrete else {keys.LOC, keys.SCALE}
                assert set(step.keys(True, True)) == set(played.keys(True, True)) - left_out
                for key in step.keys(True, True):
                    assert torch.equal(step[key], played[key]), key
                seen.add(number)
        # The next steps are played by another policy.
        with torch.no_grad():
            for parameter in play.actor.parameters():
                parameter.add_(torch.randn_like(parameter))
    assert len(seen) > 80
    assert (keys.HIDDEN in played.keys(True)) == (body == "gru")


def test_batches_are_time_major_inside() -> None:
    """So that flattening in the learner's order is a view."""
    data = ReplayData(DISCRETE, steps=5, capacity=60, batch_size=40, warm_up=0)
    (batch,) = Play(data, an_actor(DISCRETE, "gru"), numbered(DISCRETE)).iterate()
    assert all(batch[key].transpose(0, 1).is_contiguous() for key in batch.keys(True, True))


def chi_squared(counts: Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("body", "length"), [("mlp", 1), ("gru", 3)])
@pytest.mark.parametrize("iterations", [2, 5], ids=["not full", "written over"])
def test_draws_are_uniform(body: Any, length: int, iterations: int) -> None:
    """Chi-squared over every step (or beginning of a sequence) that may be drawn; fixed seed, 99.9 % quantile."""
    torch.manual_seed(3)
    data = ReplayData(DISCRETE, steps=4, capacity=10 * B, batch_size=6000 * length, updates=1, warm_up=0)
    play = Play(data, an_actor(DISCRETE, body, length), numbered(DISCRETE))
    (batch,) = play.iterate(iterations)
    kept = min(10, 4 * iterations)
    possible = [100 * env + 4 * iterations - kept + first for env in range(B) for first in range(kept - length + 1)]
    begins = number_of(batch[:, 0])
    counts = torch.tensor([(begins == number).sum() for number in possible])
    assert counts.sum() == 6000, "nothing else is drawn"
    quantile = {17: 40.79, 23: 49.73, 29: 58.30}[len(possible) - 1]
    assert chi_squared(counts) < quantile
    assert chi_squared(counts) > 2.0, "draws are independent, not dealt out evenly"


def test_sequences_are_consecutive_and_do_not_cross_the_next_slot() -> None:
    torch.manual_seed(0)
    data = ReplayData(DISCRETE, steps=3, capacity=10 * B, batch_size=401, updates=1, warm_up=0)
    play = Play(data, an_actor(DISCRETE, "gru"), numbered(DISCRETE))
    for iteration in range(1, 9):
        batches = play.iterate()
        if iteration == 1:
            assert not batches, "no sequence of four in three steps"
            continue
        numbers = number_of(batches[0])
        assert numbers.shape == (100, 4)
        assert (numbers.diff(dim=1) == 1).all()
        times = numbers % 100
        newest = 3 * iteration - 1
        assert times.max() == newest
        assert times.min() == max(0, newest - 9), "up to the oldest and the newest step"
        assert batches[0][keys.IS_FIRST][:, 1:].any(), "sequences continue after the end of an episode"


def test_batch_does_not_change_when_playing_goes_on() -> None:
    data = ReplayData(DISCRETE, steps=4, capacity=8 * B, batch_size=32, updates=2, warm_up=0)
    data.history = 2
    play = Play(data, an_actor(DISCRETE), numbered(DISCRETE))
    given = play.iterate(2)
    before = [batch.clone() for batch in given]
    play.iterate(3)
    for batch, wanted in zip(given, before, strict=True):
        assert all(torch.equal(batch[key], wanted[key]) for key in wanted.keys(True, True))


def test_writing_into_a_batch_does_not_change_stored_steps() -> None:
    data = ReplayData(DISCRETE, steps=4, capacity=8 * B, batch_size=32, updates=2, warm_up=0)
    play = Play(data, an_actor(DISCRETE), numbered(DISCRETE))
    for batch in play.iterate(2):
        batch[keys.OBSERVATION].fill_(7.0)
        batch.set(keys.STATE_VALUE, torch.zeros(32, 1, N, 1))
    for batch in data.batches(play.log[-1], play.actor):
        assert not (batch[keys.OBSERVATION] == 7.0).any()
        assert keys.STATE_VALUE not in batch.keys(True)


@pytest.mark.parametrize(("warm_up", "silent"), [(0, 0), (1, 0), (12, 0), (13, 1), (36, 2), (37, 3)])
def test_warm_up(warm_up: int, silent: int) -> None:
    """Twelve joint steps an iteration."""
    data = ReplayData(DISCRETE, steps=4, capacity=100, batch_size=5, updates=3, warm_up=warm_up)
    play = Play(data, an_actor(DISCRETE), numbered(DISCRETE))
    assert [len(play.iterate()) for _ in range(5)] == [0] * silent + [3] * (5 - silent)


def test_warm_up_that_fills_the_whole_ring_ends() -> None:
    data = ReplayData(DISCRETE, steps=4, capacity=24, batch_size=5, updates=1, warm_up=24)
    play = Play(data, an_actor(DISCRETE), numbered(DISCRETE))
    assert [len(play.iterate()) for _ in range(4)] == [0, 1, 1, 1]


# --- resuming -------------------------------------------------------------------------------------------------------------


def same(a: TensorDictBase, b: TensorDictBase) -> bool:
    names = set(a.keys(True, True))
    return names == set(b.keys(True, True)) and all(torch.equal(a[key], b[key]) for key in names)


@pytest.mark.parametrize("body", ["mlp", "gru"])
@pytest.mark.parametrize("before", [0, 1, 3, 6], ids=["unused", "not full", "nearly full", "written over"])
@pytest.mark.parametrize("history", [0, 3])
def test_killed_and_resumed_equals_uninterrupted(body: Any, before: int, history: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"steps": 4, "capacity": 13 * B + 2, "batch_size": 16, "updates": 2, "warm_up": 2}
    actor, script = an_actor(DISCRETE, body), numbered(DISCRETE)
    whole = Play(ReplayData(DISCRETE, **options), actor, script)
    whole.data.history = history
    if before:
        whole.iterate(before)
    file = io.BytesIO()
    torch.save(whole.data.state_dict(), file)
    generator, now = torch.get_rng_state(), whole.env.now
    expected = [whole.iterate() for _ in range(4)]
    cut = Play(ReplayData(DISCRETE, **options), actor, script)
    cut.data.history = history
    cut.iterate(3)  # whatever was there before is replaced
    cut.log.clear()
    file.seek(0)
    cut.data.load_state_dict(torch.load(file, weights_only=True))
    cut.env.now = now
    torch.set_rng_state(generator)
    for wanted in expected:
        found = cut.iterate()
        assert len(found) == len(wanted) == 2
        assert all(map(same, found, wanted))
    assert all(map(same, cut.log, whole.log[before:]))


def test_state_holds_the_stored_steps_only_and_does_not_change() -> None:
    data = ReplayData(DISCRETE, steps=4, capacity=1000 * B, batch_size=16, warm_up=0)
    play = Play(data, an_actor(DISCRETE), numbered(DISCRETE))
    assert data.state_dict() == {"player": {}}
    play.iterate(2)
    state = data.state_dict()
    kept = state["kept"]["agents"]["observation"]
    assert kept.shape == (8, B, N, 4)
    assert kept.untyped_storage().nbytes() == 4 * kept.numel()
    small = ReplayData(DISCRETE, steps=4, capacity=8 * B, batch_size=16, warm_up=0)
    play = Play(small, an_actor(DISCRETE), numbered(DISCRETE))
    play.iterate(2)
    state = small.state_dict()
    before = state["kept"]["next"]["agents"]["reward"].clone()
    play.iterate()
    assert torch.equal(state["kept"]["next"]["agents"]["reward"], before)


# --- in the learner -------------------------------------------------------------------------------------------------------


class FirstFeatureCritic(Critic):
    """Predicts the first number of an agent's observation."""

    contract = Contract(reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)

    def predict(self, batch: TensorDictBase) -> Tensor:
        return batch[keys.OBSERVATION][..., :1]


class BeliefCritic(FirstFeatureCritic):
    """Reads beliefs about opponents, so that the policy's distribution is evaluated."""

    contract = Contract(reads=(keys.OBSERVATION, keys.OPPONENT_LOGITS), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)


def a_learner(script: Script, body: Any = "mlp", critic: Critic | None = None, **options: Any) -> Learner:
    chosen = {"steps": 12, "capacity": 12 * B, "batch_size": 400, "updates": 1, "warm_up": 0} | options
    return learner_of(
        ScriptedEnvironment(DISCRETE, script),
        an_actor(DISCRETE, body),
        critic=critic or FirstFeatureCritic(DISCRETE),
        estimator=NStepEstimator(DISCRETE, gamma=GAMMA, n=1),
        data=ReplayData(DISCRETE, **chosen),
    )


def one_batch(learner: Learner) -> TensorDict:
    played = learner.data.collect(learner.env, learner.actor)
    (batch,) = learner.data.batches(played, learner.actor)
    learner.annotate(batch)
    learner.estimator(batch)
    return batch


def absurd(script: Script, at: str) -> Script:
    """1e6 as the first number of the observation at every reset, or at every end of an episode of one kind."""
    changed = Script(**{name: tensor.clone() for name, tensor in vars(script).items()})
    if at == "reset":
        changed.fresh[..., 0] = 1e6
        return changed
    flag = changed.terminated if at == "terminated" else changed.truncated
    changed.arriving[..., :1] = torch.where(flag.unsqueeze(-1), 1e6, changed.arriving[..., :1])
    return changed


@pytest.mark.parametrize("body", ["mlp", "gru"])
@pytest.mark.parametrize("at", ["nowhere", "reset", "terminated", "truncated"])
def test_only_the_state_before_a_reset_is_bootstrapped(body: Any, at: str) -> None:
    """GAE-3 for replay, each value and target by its definition from the script alone."""
    torch.manual_seed(0)
    plain = numbered(DISCRETE, ends=0.4)
    script = plain if at == "nowhere" else absurd(plain, at)
    learner = a_learner(script, body)
    learner.data.shown = None  # more than this learner reads
    batch = one_batch(learner).flatten()
    env, time = number_of(batch) // 100, number_of(batch) % 100
    terminated, truncated = script.terminated[time, env], script.truncated[time, env]
    assert min(terminated.sum(), truncated.sum(), batch[keys.IS_FIRST].sum()) > 30
    following = script.arriving[time, env][..., :1].masked_fill(terminated.unsqueeze(-1), 0.0)
    assert torch.equal(batch[keys.following(keys.STATE_VALUE)], following)
    target = script.reward[time, env] + GAMMA * following
    torch.testing.assert_close(batch[keys.VALUE_TARGET], target)
    leaked = (following == 1e6).flatten(1).all(1)
    assert torch.equal(leaked, truncated.squeeze(-1) if at == "truncated" else torch.zeros_like(leaked))
    first = batch[keys.IS_FIRST].squeeze(-1)
    fresh = batch[keys.STATE_VALUE].flatten(1)[first]
    assert torch.equal(fresh == 1e6, torch.full_like(fresh, at == "reset", dtype=torch.bool)), "the value of the state itself"


def test_the_distribution_is_that_of_the_current_policy_and_the_log_probability_that_of_the_behaviour() -> None:
    torch.manual_seed(0)
    learner = a_learner(numbered(DISCRETE), critic=BeliefCritic(DISCRETE))
    played = learner.data.collect(learner.env, learner.actor)
    (batch,) = learner.data.batches(played, learner.actor)
    stored = batch[keys.LOG_PROB].clone()
    with torch.no_grad():
        behaviour = learner.actor.distribution(batch.flatten()).log_prob(batch.flatten()[keys.ACTION])
        torch.testing.assert_close(behaviour.view_as(stored), stored)
        for parameter in learner.actor.parameters():
            parameter.add_(torch.randn_like(parameter))
        learner.annotate(batch)
        current = learner.actor.distribution(batch.flatten())
    assert torch.equal(batch[keys.LOG_PROB], stored)
    assert (current.log_prob(batch.flatten()[keys.ACTION]).view_as(stored) - stored).abs().max() > 0.1
    torch.testing.assert_close(batch.flatten()[keys.LOGITS], current.parameters()[keys.LOGITS])


UNREAD = keys.following(keys.IS_FIRST)


def test_keys_that_no_component_reads_are_neither_stored_nor_drawn() -> None:
    torch.manual_seed(0)
    learner = a_learner(numbered(DISCRETE))
    read = learner.data.shown
    assert read is not None
    assert {keys.OBSERVATION, keys.following(keys.OBSERVATION), keys.REWARD, keys.TERMINATED} <= read
    assert not {keys.IS_FIRST, UNREAD} & read
    played = learner.data.collect(learner.env, learner.actor)
    (batch,) = learner.data.batches(played, learner.actor)
    here = {*played.keys(include_nested=True, leaves_only=True)}
    assert {*batch.keys(include_nested=True, leaves_only=True)} == here & read
    kept = TensorDict(learner.data.state_dict()["kept"]).keys(include_nested=True, leaves_only=True)
    assert {*kept} == here & {*read, *PAST}


def test_stored_keys_that_are_no_longer_read_are_skipped() -> None:
    torch.manual_seed(0)
    everything, some = a_learner(numbered(DISCRETE)), a_learner(numbered(DISCRETE))
    everything.data.shown = None
    everything.data.collect(everything.env, everything.actor)
    some.data.load_state_dict(everything.data.state_dict())
    some.data.collect(some.env, some.actor)
    assert UNREAD in TensorDict(everything.data.state_dict()["kept"]).keys(include_nested=True)
    assert UNREAD not in TensorDict(some.data.state_dict()["kept"]).keys(include_nested=True)


@pytest.mark.parametrize("body", ["mlp", "gru"])
def test_nothing_is_learnt_before_the_warm_up_ends(body: Any) -> None:
    torch.manual_seed(0)
    learner = a_learner(numbered(DISCRETE), body, steps=4, batch_size=16, updates=2, warm_up=4 * B * 2 + 1)
    before = {name: value.clone() for name, value in learner.actor.state_dict().items()}
    fit(learner, 2)
    assert all(torch.equal(value, before[name]) for name, value in learner.actor.state_dict().items())
    assert learner.frames == 2 * 4 * B
    learner.iterations = 4
    fit(learner, 3)
    assert any(not torch.equal(value, before[name]) for name, value in learner.actor.state_dict().items())


# --- options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steps", "capacity", "batch_size", "updates"])
def test_no_option_may_be_zero(name: str) -> None:
    with pytest.raises(OptionError, match=f"`{name}`: must be at least 1"):
        ReplayData(DISCRETE, **{name: 0})


def test_warm_up_beyond_the_capacity_is_refused() -> None:
    with pytest.raises(OptionError, match="`warm_up`: must be at most the capacity, 50, got 51"):
        ReplayData(DISCRETE, capacity=50, warm_up=51)
    ReplayData(DISCRETE, capacity=50, warm_up=50)


@pytest.mark.parametrize(
    ("options", "body", "message"),
    [
        (
            {"capacity": 11},
            "mlp",
            "`capacity`: 11 joint steps are 3 of each of 3 environments, fewer than the 4 that",
        ),
        ({"capacity": 17}, "gru", r"fewer than the 6 that a sequence has; set data.capacity=18 or more"),
        ({"capacity": 14, "warm_up": 13}, "mlp", "`warm_up`: must be at most 12, the 4 steps kept of each of 3 environments"),
    ],
)
def test_capacity_that_is_too_small_for_the_environments_is_refused(options: dict[str, int], body: Any, message: str) -> None:
    data = ReplayData(DISCRETE, **{"steps": 4, "batch_size": 12, "warm_up": 0} | options)
    with pytest.raises(OptionError, match=message):
        Play(data, an_actor(DISCRETE, body, 6), numbered(DISCRETE)).iterate()


def test_sequence_longer_than_a_batch_is_refused() -> None:
    data = ReplayData(DISCRETE, batch_size=9)
    message = "`sequence_length`: must be at most data.batch_size, the 9 steps of a batch, got 10"
    with pytest.raises(OptionError, match=re.escape(message)):
        data.refuse_unfit(4, 1000, 10)
    data.refuse_unfit(4, 1000, 9)
    data.refuse_unfit(4, 1000, None)


def test_a_warm_up_longer_than_the_training_is_refused() -> None:
    data = ReplayData(DISCRETE, steps=10, warm_up=121)
    with pytest.raises(OptionError, match="`warm_up`: must be at most 120, all joint steps of 3 iterations: nothing is learnt"):
        data.refuse_unfit(4, 3, None)
    data.refuse_unfit(4, 4, None)


@pytest.mark.parametrize("body", ["mlp", "gru"])
def test_a_trial_draws_a_batch_at_once(body: Any) -> None:
    data = ReplayData(DISCRETE, **ReplayData.brief(5))
    data.refuse_unfit(2, 1, 5)
    (batch,) = Play(data, an_actor(DISCRETE, body, 5), numbered(DISCRETE, envs=2)).iterate()
    assert batch.batch_size == ((2, 5) if body == "gru" else (10, 1))
