"""The epsilon-greedy actor: its distribution, ties, masks, the share that fades, and values of whole episodes."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.actors.epsilon_greedy import EpsilonGreedyActor
from marlkit.nn.distributions import UNAVAILABLE, EpsilonGreedyTeam
from marlkit.spec import Discrete, TeamSpec

SPEC = TeamSpec(2, 3, Discrete(4))


def of(values: list[float], available: list[bool], uniform_share: float) -> EpsilonGreedyTeam:
    """Of a team of one."""
    return EpsilonGreedyTeam(torch.tensor([values]), torch.tensor([available]), torch.tensor(uniform_share))


def test_the_best_available_action_has_what_the_uniform_choice_leaves_beside_its_share_of_it() -> None:
    policy = of([0.1, 0.9, 0.5, -1.0], [True, False, True, True], 0.3)
    torch.testing.assert_close(policy.log_probs.exp(), torch.tensor([[0.1, 0.0, 0.8, 0.1]]))
    assert policy.mode().tolist() == [2]
    assert policy.log_prob(torch.tensor([3])).item() == pytest.approx(math.log(0.1))
    assert policy.entropy().item() == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.1))


def test_of_equal_values_the_first_available_one_is_taken() -> None:
    assert of([2.0, 1.0, 2.0, 2.0], [False, True, True, True], 0.1).mode().tolist() == [2]
    assert of([0.0] * 4, [True] * 4, 0.0).sample().tolist() == [0]


@pytest.mark.parametrize(("uniform_share", "entropy"), [(0.0, 0.0), (1.0, math.log(4))])
def test_the_ends_of_the_share_are_finite_and_greedy_play_is_greedy(uniform_share: float, entropy: float) -> None:
    policy = of([0.1, 0.9, 0.5, -1.0], [True] * 4, uniform_share)
    assert policy.mode().tolist() == [1], "all are equally likely where the share is 1"
    assert policy.entropy().item() == pytest.approx(entropy)
    assert policy.log_probs.isfinite().all()
    assert policy.kl(of([0.9, 0.1, 0.5, -1.0], [True] * 4, uniform_share)).isfinite().all()
    if uniform_share == 0.0:
        assert policy.log_prob(torch.tensor([0])).item() == UNAVAILABLE


def test_the_share_reaches_its_end_after_a_part_of_the_training() -> None:
    actor = EpsilonGreedyActor(SPEC, uniform_share=1.0, uniform_share_end=0.2, uniform_share_until=0.5)
    found = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        actor.schedule(progress)
        found.append(actor.uniform_share.item())
    assert found == pytest.approx([1.0, 0.6, 0.2, 0.2])
    kept = EpsilonGreedyActor(SPEC, uniform_share=0.3, uniform_share_end=None)
    kept.schedule(1.0)
    assert kept.uniform_share.item() == pytest.approx(0.3)


def test_a_shared_network_tells_agents_apart_by_their_identities_alone() -> None:
    torch.manual_seed(0)
    same = torch.randn(5, 1, 3).expand(-1, 2, -1)
    batch = TensorDict({"agents": {"observation": same}}, batch_size=[5])

    def values(agent_id: bool) -> Tensor:
        written: Tensor = EpsilonGreedyActor(SPEC, hidden=[8], agent_id=agent_id)(batch.clone())[keys.ACTION_VALUES]
        return written

    alike, apart = values(False), values(True)
    assert torch.equal(alike[:, 0], alike[:, 1])
    assert not torch.equal(apart[:, 0], apart[:, 1])


def test_values_of_a_sequence_are_those_that_were_played_with_and_start_anew_with_an_episode() -> None:
    torch.manual_seed(0)
    actor = EpsilonGreedyActor(SPEC, hidden=[6], body="gru", output_gain=1.0)
    observation, first = torch.randn(3, 5, 2, 3), torch.zeros(3, 5, 1, dtype=torch.bool)
    first[1, 2] = True
    batch = TensorDict({"agents": {"observation": observation}, "is_first": first}, batch_size=[3, 5])
    state, steps = torch.zeros(3, 2, 6), []
    for step in range(5):
        played = actor(batch[:, step].clone().set(keys.HIDDEN, state))
        state = played[keys.following(keys.HIDDEN)]
        steps.append(played[keys.ACTION_VALUES])
    batch.set(keys.HIDDEN, torch.zeros(3, 5, 2, 6))
    actor.distribution(batch)
    torch.testing.assert_close(batch[keys.ACTION_VALUES], torch.stack(steps, 1))
    fresh = actor(batch[:, 2].clone().set(keys.HIDDEN, torch.zeros(3, 2, 6)))[keys.ACTION_VALUES]
    torch.testing.assert_close(fresh[1], steps[2][1])
    assert not torch.allclose(fresh[0], steps[2][0])
