"""A trained policy outside training: its inputs and outputs, and that it is the policy that was evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import marlkit
from marlkit import keys, rng, run
from marlkit.component import Environment
from marlkit.errors import MarlkitError
from marlkit.recipe import load_recipe
from marlkit.run.policy import Policy
from marlkit.run.use import EVALUATION_SEED
from marlkit.spec import Continuous
from marlkit.training.assembly import build_environment

TINY = [
    "env.num_envs=4", "env.max_steps=6", "data.steps=6", "actor.hidden=[8]", "actor.output_gain=1.0", "actor.sequence_length=3",
    "critic.hidden=[8]", "update.epochs=1", "update.minibatch_size=12", "trainer.iterations=1", "trainer.evaluation_episodes=3",
    "trainer.video=false",
]  # fmt: skip
TEAMS = {
    "equal": ["env.scenario_options={n_agents: 3}"],
    "recurrent": ["env.scenario_options={n_agents: 3}", "actor.body=gru"],
    "discrete": ["env.scenario_options={n_agents: 3}", "env.continuous_actions=false"],
    "unequal": ["env.scenario=simple_speaker_listener", "env.scenario_options={}"],
    "unequal-discrete": ["env.scenario=simple_speaker_listener", "env.scenario_options={}", "env.continuous_actions=false"],
    "unequal-recurrent": ["env.scenario=simple_speaker_listener", "env.scenario_options={}", "actor.body=gru"],
}


@pytest.fixture(scope="module", params=TEAMS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    recipe = load_recipe("mappo", [*TINY, *TEAMS[request.param]])
    return run.train(recipe, tmp_path_factory.mktemp("runs"), progress=False)


@pytest.fixture
def policy(folder: Path) -> Policy:
    return marlkit.load_policy(folder)


def observations(policy: Policy, rows: int = 5, seed: int = 0) -> Tensor:
    """Padded observations ``[rows, N, O]``."""
    spec = policy.spec
    draw = torch.Generator().manual_seed(seed)
    own = torch.tensor(spec.own_observation_sizes).unsqueeze(-1)
    return torch.randn(rows, spec.n_agents, spec.observation, generator=draw) * (torch.arange(spec.observation) < own)


def unpadded(policy: Policy, padded: Tensor) -> list[Tensor]:
    """Each agent's own observation, of its own size."""
    return [padded[..., agent, :size] for agent, size in enumerate(policy.spec.own_observation_sizes)]


def test_actions_have_the_shape_and_the_type_of_the_team(policy: Policy) -> None:
    spec = policy.spec
    tail = () if spec.discrete else (spec.action_features,)
    for leading in ((5,), (), (2, 5)):
        action = policy(observations(policy, 10)[0].expand(*leading, -1, -1))
        policy.reset()
        assert action.shape == (*leading, spec.n_agents, *tail)
        assert action.dtype == (torch.int64 if spec.discrete else torch.float32)
        assert not action.requires_grad


def test_actions_are_within_each_agents_own_space(policy: Policy) -> None:
    spec = policy.spec
    torch.manual_seed(0)
    for deterministic in (True, False):
        action = policy(100 * observations(policy, 300), deterministic=deterministic)
        policy.reset()
        if isinstance(spec.action, Continuous):
            assert spec.action.low is not None
            assert spec.action.high is not None
            low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
            assert ((action >= low) & (action <= high)).all()
            assert deterministic or ((action == low) | (action == high)).any(), "some are clipped"
        else:
            assert ((action >= 0) & (action < torch.tensor(spec.own_action_sizes))).all()


def test_list_and_mapping_and_tensor_are_the_same_observations(policy: Policy) -> None:
    padded = observations(policy)
    own = unpadded(policy, padded)
    expected = policy(padded)
    # The order of a mapping means nothing.
    named = dict(reversed(list(zip(policy.spec.agent_names, own, strict=True))))
    arrays = [each.numpy() for each in own]
    for given in (own, tuple(own), named, padded.numpy(), arrays, dict(zip(policy.spec.agent_names, arrays, strict=True))):
        policy.reset()
        assert torch.equal(policy(given), expected)


def test_each_agent_acts_on_its_own_observation_only(policy: Policy) -> None:
    """Over three steps of an episode, so that hidden states could be mixed up."""
    steps = [observations(policy, seed=seed) for seed in range(3)]
    expected = [policy(step) for step in steps]
    for agent in range(policy.spec.n_agents):
        policy.reset()
        for step, (seen, before) in enumerate(zip(steps, expected, strict=True)):
            other = observations(policy, seed=100 + step)
            other[:, agent] = seen[:, agent]
            action = policy(other)
            assert torch.equal(action[:, agent], before[:, agent])
            assert not torch.equal(action, before), "the others do act on theirs"


def test_a_memory_lasts_until_reset(folder: Path, policy: Policy) -> None:
    seen = observations(policy)
    first, second = policy(seen), policy(seen)
    policy.reset()
    assert torch.equal(policy(seen), first)
    recurrent = load_recipe(folder / "recipe.yaml").config.actor.body == "gru"
    assert torch.equal(first, second) != recurrent


def test_a_memory_of_other_rows_is_refused(policy: Policy) -> None:
    if policy.actor.sequence_length is None:
        pytest.skip("nothing is remembered")
    policy(observations(policy, 5))
    with pytest.raises(MarlkitError, match=r"hidden state is of 5 rows of observations, got 3; call reset\(\)"):
        policy(observations(policy, 3))
    policy.reset()
    policy(observations(policy, 3))


def test_masks_that_do_not_fit_are_refused(policy: Policy) -> None:
    spec = policy.spec
    mask = torch.ones(5, spec.n_agents, spec.action_features, dtype=torch.bool)
    for wrong in [mask[:3], mask[..., :-1], mask.float()] if spec.discrete else [mask]:
        with pytest.raises(MarlkitError, match="action mask"):
            policy(observations(policy), action_mask=wrong)


def test_unavailable_actions_are_never_chosen(policy: Policy) -> None:
    if not policy.spec.discrete:
        pytest.skip("continuous actions have no mask")
    seen = observations(policy, 50)
    free = policy(seen)
    mask = torch.arange(policy.spec.action_features) < torch.tensor(policy.spec.own_action_sizes).unsqueeze(-1)
    mask = mask.expand(50, -1, -1).clone().scatter_(-1, free.unsqueeze(-1), False)
    for deterministic in (True, False):
        chosen = policy(seen, deterministic=deterministic, action_mask=mask)
        assert mask.gather(-1, chosen.unsqueeze(-1)).all()


def test_observations_that_do_not_fit_are_refused(policy: Policy) -> None:
    spec = policy.spec
    padded = observations(policy)
    own = unpadded(policy, padded)
    named = dict(zip(spec.agent_names, own, strict=True))
    first = spec.agent_names[0]
    wrong: list[Any] = [
        padded[:, :-1],
        padded[..., :-1],
        torch.zeros(5),
        [],
        own[:-1],
        [*own[:-1], torch.zeros(5, spec.observation + 1)],
        [*own[:-1], own[-1][:3]],
        [torch.zeros(()) for _ in own],
        {name: each for name, each in named.items() if name != first},
        {**named, "unknown": own[0]},
        None,
        3.0,
        ["x" for _ in own],
        padded.numpy().astype(object),
    ]
    for given in wrong:
        with pytest.raises(MarlkitError, match=r"observation"):
            policy(given)
    policy(padded)


def test_an_observation_of_another_agents_size_is_refused(policy: Policy) -> None:
    """Padding would turn it into an observation that does not occur."""
    sizes = policy.spec.own_observation_sizes
    if len(set(sizes)) == 1:
        pytest.skip("all agents see as much")
    own = unpadded(policy, observations(policy))
    with pytest.raises(MarlkitError, match=r"speaker_0"):
        policy([own[1], own[1]])


def episode_returns(env: Environment, policy: Policy, steps: int) -> Tensor:
    """Returns of the first episode of every environment, played by hand."""
    seen = env.reset()[keys.OBSERVATION]
    total, playing = torch.zeros(env.num_envs), torch.ones(env.num_envs, dtype=torch.bool)
    for _ in range(steps):
        arrived, current = env.step(policy(seen))
        total[playing] += arrived["agents", "reward"].mean(1)[playing, 0]
        playing &= ~arrived["done"][:, 0]
        seen = current[keys.OBSERVATION]
    assert not playing.any()
    return total


def test_an_episode_by_hand_has_the_return_of_the_evaluation(folder: Path, policy: Policy) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    said = run.evaluate(folder, episodes=7)
    seed = recipe.seed + EVALUATION_SEED
    env = build_environment(recipe, torch.device("cpu"), seed, num_envs=7)
    with rng.isolated(seed):
        returns = episode_returns(env, policy, steps=6)
    assert said["evaluation/return"] == pytest.approx(returns.mean().item(), rel=1e-5, abs=1e-6)
    assert said["evaluation/return_std"] == pytest.approx(returns.std(correction=0).item(), rel=1e-4, abs=1e-6)
