"""One iteration from the inside: what is evaluated where, what is stored, what stops a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from scripted import Script, ScriptedEnvironment, learner_of, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys, run
from marlkit.actors.stochastic import StochasticActor
from marlkit.batches import units
from marlkit.component import Critic
from marlkit.contract import Contract
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.local import LocalCritic
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.data.rollout import RolloutData
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.errors import NonFiniteError
from marlkit.estimators.gae import GaeEstimator
from marlkit.estimators.n_step import NStepEstimator
from marlkit.functional import losses
from marlkit.learning import Adjust, Learning, Metrics
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.recipe import Recipe, load_recipe
from marlkit.run.checkpoint_io import load_checkpoint
from marlkit.run.checkpoints import LAST
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.training.episode_returns import EpisodeReturns
from marlkit.training.learner import Learner, _switch, refuse_non_finite

B, T, N = 3, 12, 2
DISCRETE = TeamSpec(N, 4, Discrete(3))
CONTINUOUS = TeamSpec(N, 4, Continuous(2))
SPECS = [pytest.param(DISCRETE, id="discrete"), pytest.param(CONTINUOUS, id="continuous")]
GAMMA, LMBDA = 0.9, 0.8


class FirstFeatureCritic(Critic):
    """Believes that an agent's value is the first number that it sees."""

    contract = Contract(reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)

    def predict(self, batch: TensorDictBase) -> Tensor:
        return batch[keys.OBSERVATION][..., :1]


def scripted(
    spec: TeamSpec, script: Script, *, body: Any = "mlp", critic: Critic | None = None, estimator: Any = None, steps: int = T
) -> Learner:
    actor = StochasticActor(spec, hidden=[6], body=body, sequence_length=4, output_gain=1.0)
    env = ScriptedEnvironment(spec, script)
    return learner_of(env, actor, critic=critic, estimator=estimator, data=RolloutData(spec, steps=steps))


def annotated(learner: Learner) -> TensorDict:
    batch = learner.data.collect(learner.env, learner.actor)
    learner.annotate(batch)
    return batch


# --- values of the next states --------------------------------------------------------------------------------------------


def advantages_by_episode(script: Script, lmbda: float = LMBDA) -> Tensor:
    """GAE of every step by its definition, a sum over the rest of its episode, from the script alone: ``[B, K, N, 1]``."""
    steps, envs, agents, _ = script.reward.shape
    done = script.terminated | script.truncated
    found = torch.zeros(envs, steps, agents, 1, dtype=torch.float64)
    for b in range(envs):
        for t in range(steps):
            for later in range(t, steps):
                starts = later == 0 or bool(done[later - 1, b])
                now = (script.fresh if starts else script.arriving[[later - 1]])[later if starts else 0, b, :, :1]
                following = 0 if script.terminated[later, b] else script.arriving[later, b, :, :1].double()
                error = script.reward[later, b].double() + GAMMA * following - now.double()
                found[b, t] += (GAMMA * lmbda) ** (later - t) * error
                if done[later, b]:
                    break
    return found


def advantages(script: Script, estimator: Any = None) -> Tensor:
    estimator = estimator or GaeEstimator(DISCRETE, gamma=GAMMA, lmbda=LMBDA)
    learner = scripted(DISCRETE, script, critic=FirstFeatureCritic(DISCRETE), estimator=estimator)
    batch = annotated(learner)
    estimator(batch)
    found: Tensor = batch[keys.ADVANTAGE]
    return found


def no_step(loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
    return {}


def test_advantages_of_episodes_that_end_either_way_within_a_rollout() -> None:
    script = random_script(DISCRETE, B, T)
    ended = (script.terminated.sum().item(), script.truncated.sum().item())
    assert min(ended) >= 3, "the script ends episodes in both ways"
    torch.testing.assert_close(advantages(script).double(), advantages_by_episode(script), rtol=1e-4, atol=1e-5)
    one_step = advantages(script, NStepEstimator(DISCRETE, gamma=GAMMA, n=1)).double()
    torch.testing.assert_close(one_step, advantages_by_episode(script, lmbda=0.0), rtol=1e-4, atol=1e-5)


ABSURD = 1e6


def absurd(script: Script, at: str) -> Script:
    """The same script with an absurd value at every reset, or wherever an episode ends in one of the ways."""
    changed = Script(**{name: tensor.clone() for name, tensor in vars(script).items()})
    if at == "reset":
        changed.fresh[..., 0] = ABSURD
        return changed
    flag = changed.terminated if at == "terminated" else changed.truncated
    changed.arriving[..., :1] = torch.where(flag.unsqueeze(-1), ABSURD, changed.arriving[..., :1])
    return changed


def test_the_value_of_a_reset_state_does_not_leak_into_the_episode_before() -> None:
    """GAE-3: it is the baseline of the first step of its own episode, and nothing else."""
    script = random_script(DISCRETE, B, T)
    plain, other = advantages(script), advantages(absurd(script, "reset"))
    done = (script.terminated | script.truncated).transpose(0, 1)[..., 0]
    first = torch.cat([torch.ones(B, 1, dtype=torch.bool), done[:, :-1]], 1)
    assert torch.equal(plain[~first], other[~first])
    assert (other[first] < -0.9 * ABSURD).all()


def test_the_value_after_a_true_end_is_never_used() -> None:
    script = random_script(DISCRETE, B, T)
    assert torch.equal(advantages(script), advantages(absurd(script, "terminated")))


def test_the_value_where_an_episode_was_cut_is_bootstrapped() -> None:
    script = random_script(DISCRETE, B, T)
    plain, other = advantages(script), advantages(absurd(script, "truncated"))
    cut = script.truncated.transpose(0, 1)[..., 0]
    assert ((other - plain)[cut] > 0.8 * GAMMA * ABSURD).all()
    torch.testing.assert_close(other.double(), advantages_by_episode(absurd(script, "truncated")), rtol=1e-4, atol=0.3)


def critics(spec: TeamSpec) -> dict[str, Callable[[], Critic]]:
    exact: Any = {"exact": "always", "hidden": [5]}
    found: dict[str, Callable[[], Critic]] = {
        "local": lambda: LocalCritic(spec, hidden=[5]),
        "centralised": lambda: CentralisedCritic(spec, hidden=[5], share="none"),
        "marginalised-state": lambda: MarginalisedCritic(spec, view="state", **exact),
        "marginalised-own": lambda: MarginalisedCritic(spec, view="own", share="none", **exact),
    }
    return found


@pytest.mark.parametrize("body", ["mlp", "gru"])
@pytest.mark.parametrize("name", critics(DISCRETE))
def test_next_values_are_those_of_the_next_states(name: str, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although most are taken from the step after: evaluating every `next` says the same; after a true end there is nothing."""
    torch.manual_seed(0)
    monkeypatch.setattr("marlkit.training.annotation.ANNOTATED_ROWS", 7)  # several blocks
    learner = scripted(DISCRETE, random_script(DISCRETE, B, 2 * T), critic=critics(DISCRETE)[name](), body=body)
    for _ in range(2):  # the second rollout goes on in the middle of episodes
        batch = annotated(learner)
        current, following = batch.clone(), batch["next"].clone()
        rows = following.reshape(B * T)
        with torch.no_grad():
            learner.actor(rows)
            learner.opponents(rows)
            expected = learner.critic(rows)[keys.STATE_VALUE].reshape(B, T, N, 1)
            now = learner.critic(current.reshape(B * T))[keys.STATE_VALUE].reshape(B, T, N, 1)
        expected = expected.masked_fill(batch[keys.TERMINATED].unsqueeze(-1), 0.0)
        torch.testing.assert_close(batch[keys.following(keys.STATE_VALUE)], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch[keys.STATE_VALUE], now, rtol=1e-5, atol=1e-6)


def test_samples_of_the_others_are_drawn_anew_for_every_rollout_and_kept_within_it() -> None:
    learner = scripted(
        DISCRETE, random_script(DISCRETE, B, T), critic=MarginalisedCritic(DISCRETE, current="sampled", samples=3, exact="never")
    )
    seeds = [annotated(learner)[keys.SAMPLE_SEED].clone() for _ in range(2)]
    assert len(torch.cat(seeds).unique()) == 2 * B * T
    batch = annotated(learner)
    with torch.no_grad():
        again = learner.critic.normaliser.denormalise(learner.critic.predict(batch))
    torch.testing.assert_close(again, batch[keys.STATE_VALUE], rtol=1e-5, atol=1e-6)


# --- collecting -----------------------------------------------------------------------------------------------------------


def collected_by_hand(learner: Learner, rollouts: int) -> list[TensorDict]:
    """What collecting should store, gathered step by step in the plainest way."""
    env, actor = learner.env, learner.actor
    current, hidden = env.reset(), actor.initial_state(B).get(keys.HIDDEN)
    found = []
    for _ in range(rollouts):
        steps = []
        for _ in range(T):
            step = current.clone()
            if hidden is not None:
                step.set(keys.HIDDEN, hidden.clone())
            with torch.no_grad():
                actor(step)
            carried = step.get(keys.following(keys.HIDDEN), None)
            arrived, current = env.step(step[keys.ACTION])
            step.set("next", arrived.clone())
            if carried is not None:
                step.set(keys.following(keys.HIDDEN), carried)
                hidden = carried
            steps.append(step)
        found.append(torch.stack(steps, 1))
    return found


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("body", ["mlp", "gru"])
def test_rollouts_are_what_happened_step_by_step(spec: TeamSpec, body: Any) -> None:
    learner = scripted(spec, random_script(spec, B, 3 * T), body=body)
    torch.manual_seed(1)
    expected = collected_by_hand(learner, 2)
    torch.manual_seed(1)
    for wanted in expected:
        batch = learner.data.collect(learner.env, learner.actor)
        assert batch.batch_size == torch.Size([B, T])
        assert set(batch.keys(True, True)) == set(wanted.keys(True, True))
        for key in wanted.keys(True, True):
            assert torch.equal(batch[key], wanted[key]), key
            assert batch[key].transpose(0, 1).is_contiguous(), "stored time-major"


@pytest.mark.parametrize("spec", SPECS)
def test_a_recurrent_policy_says_the_same_of_sequences_as_when_it_acted(spec: TeamSpec) -> None:
    """Also where episodes end in the middle of a sequence, and where a rollout begins in the middle of an episode."""
    torch.manual_seed(0)
    script = random_script(spec, B, 3 * T)
    learner = scripted(spec, script, body="gru")
    update = PpoClipUpdate(spec, epochs=1, clip_epsilon=1e-4)
    for start in range(0, 3 * T, T):
        batch = annotated(learner)
        learner.estimator(batch)
        done = (script.terminated | script.truncated)[start : start + T, :, 0]
        assert done.view(3, 4, B)[:, :3].any(), "an episode ends in the middle of a sequence"
        sequences = units(batch, learner.actor.sequence_length)
        log_prob = learner.actor.distribution(sequences).log_prob(sequences[keys.ACTION])
        torch.testing.assert_close(log_prob, sequences[keys.LOG_PROB], rtol=1e-5, atol=1e-5)
        without_ends = sequences.clone().set(keys.IS_FIRST, torch.zeros_like(sequences[keys.IS_FIRST]))
        mixed_up = learner.actor.distribution(without_ends).log_prob(sequences[keys.ACTION])
        assert (mixed_up - sequences[keys.LOG_PROB]).abs().max() > 1e-3, "the memory matters here"
        metrics = update.update(batch, Learning(learner.actor, learner.critic, learner.opponents, no_step, 0.0))
        assert metrics["actor/clip_fraction"].item() == 0
        assert metrics["actor/kl"].item() == pytest.approx(0, abs=1e-8)


# --- episode returns ------------------------------------------------------------------------------------------------------


def test_episode_returns_span_rollouts() -> None:
    """Against a walk through every environment's whole history."""
    spec, rollouts, steps = DISCRETE, 5, 4
    script = random_script(spec, B, rollouts * steps, seed=3, ends=0.15)
    learner = scripted(spec, script, steps=steps)
    returns, found = EpisodeReturns(), []
    for index in range(rollouts):
        found.append(returns.take(learner.data.collect(learner.env, learner.actor)))
        if index == 1:  # a stop between rollouts changes nothing
            saved, returns = returns.state_dict(), EpisodeReturns()
            returns.load_state_dict(saved)
    ended: dict[int, list[tuple[float, int]]] = {index: [] for index in range(rollouts)}
    done = script.terminated | script.truncated
    for b in range(B):
        total, length = 0.0, 0
        for t in range(rollouts * steps):
            total, length = total + script.reward[t, b].mean().item(), length + 1
            if done[t, b]:
                ended[t // steps].append((total, length))
                total, length = 0.0, 0
    assert sum(length > steps for episodes in ended.values() for _, length in episodes) >= 2
    assert any(not episodes for episodes in ended.values()), "a rollout in which no episode ends"
    for index, logged in enumerate(found):
        assert logged["episode/count"] == len(ended[index])
        wanted = script.reward[index * steps : (index + 1) * steps].mean().item()
        assert logged["episode/reward"] == pytest.approx(wanted, abs=1e-5)
        if not ended[index]:
            assert set(logged) == {"episode/count", "episode/reward"}
            continue
        sums, lengths = zip(*ended[index], strict=True)
        assert logged["episode/return"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)
        assert logged["episode/length"] == pytest.approx(sum(lengths) / len(lengths))


# --- what is not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("poisoned", "metrics", "named"),
    [
        ([keys.REWARD, keys.STATE_VALUE, keys.ADVANTAGE], {}, r"`next.agents.reward`, written by env \(ScriptedEnvironment\)"),
        ([keys.OBSERVATION, keys.LOG_PROB], {}, r"`agents.observation`, written by env"),
        ([keys.LOG_PROB, keys.STATE_VALUE], {}, r"`agents.log_prob`, written by actor \(StochasticActor\)"),
        ([keys.STATE_VALUE, keys.ADVANTAGE], {}, r"`agents.state_value`, written by critic \(LocalCritic\)"),
        ([keys.ADVANTAGE, keys.VALUE_TARGET], {}, r"`agents.advantage`, written by estimator \(GaeEstimator\)"),
        ([keys.VALUE_TARGET], {"actor/loss": math.nan}, r"`agents.value_target`, written by estimator"),
        ([], {"actor/kl": 0.0, "critic/loss": -math.inf}, r"`critic/loss`, written by update \(PpoClipUpdate\)"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(
    poisoned: list[keys.Key], metrics: dict[str, float], named: str, value: float
) -> None:
    learner = scripted(DISCRETE, random_script(DISCRETE, B, T))
    batch = annotated(learner)
    learner.estimator(batch)
    scalars = {name: torch.tensor(number) for name, number in metrics.items()}
    if not metrics:
        refuse_non_finite(batch, {"actor/loss": torch.zeros(())}, learner)
    for key in poisoned:
        batch[key][-1, -1] = value
    with pytest.raises(NonFiniteError, match=named):
        refuse_non_finite(batch, scalars, learner)


def tiny(*overrides: str) -> Recipe:
    common = [
        "env={type: matrix_game, num_envs: 8}", "data.steps=4", "actor.hidden=[4]", "critic.hidden=[4]", "update.epochs=2",
        "update.minibatch_size=16", "trainer.iterations=4", "trainer.evaluation_interval=1", "trainer.evaluation_episodes=2",
        "trainer.video=false", "trainer.checkpoint_seconds=0",
    ]  # fmt: skip
    return load_recipe("mappo", [*common, *overrides])


def spoil(target: str, poison: Callable[[Any], Any], iteration: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison what a function returns in one iteration of a training."""
    now = {"iteration": -1}
    training_step = Learner.training_step

    def step(self: Learner, *arguments: Any) -> None:
        now["iteration"] = self.iteration
        training_step(self, *arguments)

    path, _, name = target.rpartition(".")
    owner: Any = {"env": MatrixGameEnvironment, "critic": CentralisedCritic, "losses": losses}[path]
    original = getattr(owner, name)

    def spoilt(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        return poison(result) if now["iteration"] == iteration else result

    monkeypatch.setattr(Learner, "training_step", step)
    monkeypatch.setattr(owner, name, spoilt)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("env.payoff", r"iteration 2: `next.agents.reward`, written by env \(MatrixGameEnvironment\)"),
        ("critic.predict", r"iteration 2: `agents.state_value`, written by critic \(CentralisedCritic\)"),
        ("losses.ppo_clip_loss", r"iteration 2: `actor/loss`, written by update \(PpoClipUpdate\)"),
        ("losses.value_loss", r"iteration 2: `critic/loss`, written by update \(PpoClipUpdate\)"),
    ],
)
def test_a_training_that_goes_astray_stops_and_keeps_its_last_good_checkpoint(
    target: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil(target, lambda tensor: tensor * math.nan, 2, patch)
        with pytest.raises(NonFiniteError, match=named):
            run.train(tiny("trainer.compile=none"), tmp_path, progress=False)  # a replay calls nothing that could be spoilt
    (folder,) = (tmp_path / "mappo").iterdir()
    saved = load_checkpoint(folder / "checkpoints" / LAST)
    assert saved["marlkit"]["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    run.resume(folder, progress=False)
    assert load_checkpoint(folder / "checkpoints" / LAST)["marlkit"]["iteration"] == 4


class Frozen(nn.Sequential):
    """Whose second part never trains."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize(("kind", "second"), [(nn.Sequential, True), (Frozen, False)])
def test_the_switch_does_what_the_method_does(kind: type[nn.Sequential], second: bool) -> None:
    module = nn.Sequential(nn.Linear(1, 1), kind(nn.Dropout(), nn.BatchNorm1d(1)))
    switch = _switch(module)
    for mode, expected in ((False, [False] * 5), (True, [True, True, True, True, second])):
        switch(mode)
        assert [part.training for part in module.modules()] == expected
