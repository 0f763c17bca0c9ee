"""Actors, critics, opponent models and estimators as parts of TensorDict and TorchRL programs, used as their users would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import ExplorationType, InitTracker, TransformedEnv, VmasEnv, check_env_specs, set_exploration_type
from torchrl.modules import SafeSequential
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Critic
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.local import LocalCritic
from marlkit.critics.marginalised import MarginalisedCritic
from marlkit.estimators.gae import GaeEstimator
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import fake_batch

ENVS, AGENTS, LIMIT, WIDTH = 3, 2, 5, 8
BOUNDS = (((-1.0, -1.0),) * AGENTS, ((1.0, 1.0),) * AGENTS)
SPECS = {
    "continuous": TeamSpec(AGENTS, 16, Continuous(2, *BOUNDS), horizon=LIMIT),
    "discrete": TeamSpec(AGENTS, 16, Discrete(9), horizon=LIMIT),
}
PARAMETERS = {"continuous": {keys.LOC, keys.SCALE}, "discrete": {keys.LOGITS}}
AVAILABLE = {"continuous": keys.ACTION_DIMS, "discrete": keys.ACTION_MASK}


@pytest.fixture(params=sorted(SPECS))
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of actions; the generators are seeded for each."""
    torch.manual_seed(0)
    return str(request.param)


def team_env(kind: str) -> VmasEnv:
    """Two agents with time limits. Samples of a normal policy are not squashed: VMAS is to clamp them."""
    options = {"num_envs": ENVS, "n_agents": AGENTS, "max_steps": LIMIT, "seed": 0}
    return VmasEnv("balance", continuous_actions=kind == "continuous", clamp_actions=True, **options)


def remembering_env(kind: str, actor: StochasticActor) -> TransformedEnv:
    env = TransformedEnv(team_env(kind), InitTracker(init_key="is_first"))
    return env.append_transform(actor.make_tensordict_primer())


def rollout(kind: str, policy: Any, steps: int = 2 * LIMIT + 2) -> TensorDict:
    with torch.no_grad():
        return team_env(kind).rollout(steps, policy=policy, break_when_any_done=False)


def leaves(batch: TensorDict) -> set[Any]:
    return set(batch.keys(include_nested=True, leaves_only=True))


# --- sequences of tensordict ------------------------------------------------------------------------------------------------


def test_a_sequence_of_all_that_plays_and_values(kind: str) -> None:
    spec = SPECS[kind]
    modules = [StochasticActor(spec, hidden=[WIDTH]), TruePolicyOpponents(spec), MarginalisedCritic(spec, hidden=[WIDTH])]
    everything = TensorDictSequential(*modules)
    assert set(everything.in_keys) == {keys.OBSERVATION, AVAILABLE[kind], keys.STATE}
    written = {key for module in modules for key in module.out_keys}
    assert set(everything.out_keys) == written
    assert {keys.ACTION, keys.LOG_PROB, keys.STATE_VALUE, keys.JOINT_ACTION} | PARAMETERS[kind] <= written
    batch = fake_batch(spec, [4], everything.in_keys)
    everything(batch)
    assert leaves(batch) == written | set(everything.in_keys)
    assert batch[keys.STATE_VALUE].shape == (4, AGENTS, 1)


def test_a_part_of_a_sequence_keeps_what_the_value_needs(kind: str) -> None:
    spec = SPECS[kind]
    actor, local = StochasticActor(spec, hidden=[WIDTH]), LocalCritic(spec, hidden=[WIDTH])
    opponents, marginalised = TruePolicyOpponents(spec), MarginalisedCritic(spec, hidden=[WIDTH])
    alone = TensorDictSequential(actor, local).select_subsequence(out_keys=[keys.STATE_VALUE])
    assert list(alone.module) == [local]
    assert alone.in_keys == [keys.OBSERVATION]
    whole = TensorDictSequential(actor, opponents, marginalised).select_subsequence(out_keys=[keys.STATE_VALUE])
    assert list(whole.module) == [actor, opponents, marginalised]
    fed = TensorDictSequential(actor, local).select_subsequence(in_keys=[keys.OBSERVATION])
    assert list(fed.module) == [local]
    both = TensorDictSequential(actor, local).select_subsequence(in_keys=[keys.OBSERVATION, AVAILABLE[kind]])
    assert list(both.module) == [actor, local]


def test_keys_can_be_left_out_and_brought_back(kind: str) -> None:
    spec = SPECS[kind]
    actor: Any = StochasticActor(spec, hidden=[WIDTH])  # as tensordict has no types, so have its methods
    batch = fake_batch(spec, [4], actor.in_keys)
    everything = list(actor.out_keys)
    actor.select_out_keys(keys.ACTION)
    assert actor.out_keys == [keys.ACTION]
    assert leaves(actor(batch.clone())) == {*actor.in_keys, keys.ACTION}
    assert actor.reset_out_keys().out_keys == everything
    assert leaves(actor(batch.clone())) == {*actor.in_keys, *everything}


def test_torchrls_own_sequences_take_them(kind: str) -> None:
    spec = SPECS[kind]
    both = SafeSequential(StochasticActor(spec, hidden=[WIDTH]), LocalCritic(spec, hidden=[WIDTH]))
    assert both(fake_batch(spec, [4], both.in_keys))[keys.STATE_VALUE].shape == (4, AGENTS, 1)


# --- playing in TorchRL's environments --------------------------------------------------------------------------------------


def test_an_actor_plays_an_environment_of_torchrl(kind: str) -> None:
    actor = StochasticActor(SPECS[kind], hidden=[WIDTH])
    played = rollout(kind, actor)
    assert played.batch_size == (ENVS, 2 * LIMIT + 2)
    assert {keys.ACTION, keys.LOG_PROB} | PARAMETERS[kind] <= leaves(played)
    assert played[keys.LOG_PROB].shape == (ENVS, 2 * LIMIT + 2, AGENTS, 1)
    again = actor.get_dist(played)
    torch.testing.assert_close(again.log_prob(played[keys.ACTION]), played[keys.LOG_PROB])
    assert played["next", "done"].sum() == 2 * ENVS, "the episodes ended twice"


def test_torchrl_decides_whether_an_actor_explores(kind: str) -> None:
    actor = StochasticActor(SPECS[kind], hidden=[WIDTH])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        likely = rollout(kind, actor)
        said = actor(likely.clone(), deterministic=False)
    torch.testing.assert_close(likely[keys.ACTION], actor.get_dist(likely).mode)
    for sampled in (said, rollout(kind, actor)):
        assert not torch.allclose(sampled[keys.ACTION], actor.get_dist(sampled).mode, atol=0.1)


def test_a_hidden_state_is_carried_and_starts_anew_with_each_episode(kind: str) -> None:
    actor = StochasticActor(SPECS[kind], hidden=[WIDTH], body="gru")
    env = remembering_env(kind, actor)
    check_env_specs(env)
    with torch.no_grad():
        played = env.rollout(2 * LIMIT + 2, policy=actor, break_when_any_done=False)
        assert [bool(first) for first in played["is_first"][0]] == [step % LIMIT == 0 for step in range(2 * LIMIT + 2)]
        hidden = actor.initial_state(ENVS)[keys.HIDDEN]
        for step in range(2 * LIMIT + 2):
            hidden = torch.zeros_like(hidden) if step % LIMIT == 0 else hidden
            assert torch.equal(played[:, step][keys.HIDDEN], hidden)
            row = TensorDict({}, batch_size=[ENVS]).set(keys.OBSERVATION, played[keys.OBSERVATION][:, step])
            actor(row.set(keys.IS_FIRST, played["is_first"][:, step]).set(keys.HIDDEN, hidden))
            hidden = row[keys.following(keys.HIDDEN)]
            for key in PARAMETERS[kind]:
                torch.testing.assert_close(row[key], played[key][:, step])
        assert hidden.abs().sum() > 0
        # As one sequence, which is how it is trained.
        torch.testing.assert_close(actor.get_dist(played).log_prob(played[keys.ACTION]), played[keys.LOG_PROB])


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("body", ["mlp", "gru"])
def test_a_collector_plays_an_actor(kind: str, body: Any, use_buffers: bool) -> None:
    actor = StochasticActor(SPECS[kind], hidden=[WIDTH], body=body)
    env = team_env(kind) if body == "mlp" else remembering_env(kind, actor)
    frames = {"frames_per_batch": ENVS * 6, "total_frames": ENVS * 12}
    collector = Collector(env, actor, use_buffers=use_buffers, auto_register_policy_transforms=False, **frames)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    assert [batch.batch_size for batch in batches] == [(ENVS, 6)] * 2
    for batch in batches:
        assert {keys.ACTION, keys.LOG_PROB} | PARAMETERS[kind] <= leaves(batch)
        torch.testing.assert_close(actor.get_dist(batch).log_prob(batch[keys.ACTION]), batch[keys.LOG_PROB])
    if body == "gru":
        assert torch.equal(batches[1][keys.HIDDEN][:, 0], batches[0][keys.following(keys.HIDDEN)][:, -1])


def test_a_collector_finds_the_primer_of_a_recurrent_actor(kind: str) -> None:
    actor = StochasticActor(SPECS[kind], hidden=[WIDTH], body="gru")
    env = TransformedEnv(team_env(kind), InitTracker(init_key="is_first"))
    (batch,) = Collector(env, actor, frames_per_batch=ENVS * 4, total_frames=ENVS * 4, auto_register_policy_transforms=True)
    assert torch.equal(batch[keys.HIDDEN][:, 1:], batch[keys.following(keys.HIDDEN)][:, :-1])


# --- advantages -------------------------------------------------------------------------------------------------------------


class WithState(nn.Module):
    """The joint observation, which is the state of an environment that has none."""

    def forward(self, observation: Tensor) -> Tensor:
        return observation.flatten(-2)


def value_network(name: str, spec: TeamSpec, value_norm: bool = False) -> tuple[TensorDictSequential, Critic]:
    """A critic behind what makes its state."""
    critic: Critic
    if name == "local":
        critic = LocalCritic(spec, hidden=[WIDTH, WIDTH], value_norm=value_norm)
        return TensorDictSequential(critic), critic
    critic = CentralisedCritic(spec, hidden=[WIDTH, WIDTH], value_norm=value_norm)
    return TensorDictSequential(TensorDictModule(WithState(), [keys.OBSERVATION], [keys.STATE]), critic), critic


def with_done_of_agents(played: TensorDict) -> TensorDict:
    """TorchRL's estimators ask for ends of the shape of the rewards."""
    batch = played.clone()
    for name in ("done", "terminated"):
        batch["next", "agents", name] = batch["next", name].unsqueeze(-1).expand_as(batch[keys.REWARD])
    return batch


def torchrls_gae(value: TensorDictSequential, **options: Any) -> GAE:
    found = GAE(gamma=0.9, lmbda=0.8, value_network=value, **options)
    found.set_keys(
        value=keys.STATE_VALUE,
        advantage=keys.ADVANTAGE,
        value_target=keys.VALUE_TARGET,
        reward=("agents", "reward"),
        done=("agents", "done"),
        terminated=("agents", "terminated"),
    )
    return found


@pytest.mark.parametrize("options", [{}, {"deactivate_vmap": True}, {"shifted": True}], ids=["vmap", "no vmap", "shifted"])
@pytest.mark.parametrize("value_norm", [False, True], ids=["real units", "normalised units"])
@pytest.mark.parametrize("name", ["local", "centralised"])
def test_both_estimators_agree_on_a_rollout(kind: str, name: str, value_norm: bool, options: dict[str, Any]) -> None:
    spec = SPECS[kind]
    value, critic = value_network(name, spec, value_norm)
    critic.normaliser.update(torch.tensor([-3.0, 5.0]))
    played = rollout(kind, StochasticActor(spec, hidden=[WIDTH]))
    theirs, ours = with_done_of_agents(played), played.clone()
    torchrls_gae(value, **options)(theirs)
    with torch.no_grad():
        value(ours)
        value(ours["next"])
    GaeEstimator(spec, gamma=0.9, lmbda=0.8)(ours)
    assert ours["next", "done"][:, :-1].any(), "an episode ended on the way"
    for key in (keys.ADVANTAGE, keys.VALUE_TARGET):
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-5, atol=1e-5)


# --- the clipped objective --------------------------------------------------------------------------------------------------

EPSILON, ENTROPY, CRITIC = 0.2, 0.05, 0.5


def clipped_loss(actor: StochasticActor, value: TensorDictSequential, *, functional: bool) -> ClipPPOLoss:
    weights = {"clip_epsilon": EPSILON, "entropy_coeff": ENTROPY, "critic_coeff": CRITIC, "loss_critic_type": "l2"}
    loss = ClipPPOLoss(actor, value, functional=functional, **weights)
    loss.set_keys(
        action=keys.ACTION,
        sample_log_prob=keys.LOG_PROB,
        value=keys.STATE_VALUE,
        advantage=keys.ADVANTAGE,
        value_target=keys.VALUE_TARGET,
        reward=("agents", "reward"),
    )
    return loss


def total(found: TensorDict) -> Tensor:
    return found["loss_objective"] + found["loss_entropy"] + found["loss_critic"]


def by_hand(actor: StochasticActor, value: TensorDictSequential, batch: TensorDict) -> dict[str, Tensor]:
    """The three terms, each a mean over agents and steps."""
    policy = actor.distribution(batch)
    ratio = (policy.log_prob(batch[keys.ACTION]) - batch[keys.LOG_PROB]).exp()
    advantage = batch[keys.ADVANTAGE]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    error = value(batch.clone())[keys.STATE_VALUE] - batch[keys.VALUE_TARGET]
    return {
        "loss_objective": -gain.mean(),
        "loss_entropy": -ENTROPY * policy.entropy().mean(),
        "loss_critic": CRITIC * error.square().mean(),
    }


@pytest.mark.parametrize("functional", [True, False], ids=["functional", "in place"])
@pytest.mark.parametrize(("body", "name"), [("mlp", "local"), ("mlp", "centralised"), ("gru", "local")])
def test_the_clipped_objective_of_torchrl(kind: str, body: Any, name: str, functional: bool) -> None:
    spec = SPECS[kind]
    actor = StochasticActor(spec, hidden=[WIDTH, WIDTH], body=body)
    value, critic = value_network(name, spec)
    env = team_env(kind) if body == "mlp" else remembering_env(kind, actor)
    with torch.no_grad():
        played = env.rollout(2 * LIMIT + 2, policy=actor, break_when_any_done=False)
    batch = torchrls_gae(value)(with_done_of_agents(played)).detach()
    loss = clipped_loss(actor, value, functional=functional)
    first = loss(batch.clone())
    torch.testing.assert_close(first["mean_ratio"], torch.tensor(1.0))
    torch.testing.assert_close(first["max_ratio"], torch.tensor(1.0))
    torch.testing.assert_close(first["loss_objective"], -batch[keys.ADVANTAGE].mean())
    for term, expected in by_hand(actor, value, batch).items():
        torch.testing.assert_close(first[term], expected)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.003)
    total(first).backward()
    reached = dict(loss.named_parameters())
    assert len(reached) == len([*actor.parameters(), *critic.parameters()])
    assert [name for name, parameter in reached.items() if parameter.grad is None or not parameter.grad.any()] == []
    optimizer.step()
    assert total(loss(batch.clone())) < total(first)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(torch.randn_like(parameter))
    far = loss(batch.clone())
    assert 0 < far["clip_fraction"] < 1
    for term, expected in by_hand(actor, value, batch).items():
        torch.testing.assert_close(far[term], expected, rtol=1e-4, atol=1e-5)
