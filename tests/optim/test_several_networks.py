"""Critics of several networks: every one is regressed, values are the least of theirs, the actor climbs the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import CONTINUOUS, B, N, T
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.deterministic import DeterministicActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.batches import units
from marlkit.component import Critic, least
from marlkit.contract import Contract
from marlkit.critics.joint import JointCritic
from marlkit.critics.local import LocalCritic
from marlkit.errors import OptionError
from marlkit.learning import Learning, Metrics
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.optim.ddpg import DdpgUpdate
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.spec import TeamSpec
from marlkit.testing import check_component


class Twins(Critic):
    """Two critics of a kind side by side."""

    def __init__(self, spec: TeamSpec, first: Critic, second: Critic) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)
        self.both = nn.ModuleList([first, second])

    def each(self) -> list[Critic]:
        return [critic for critic in self.both if isinstance(critic, Critic)]

    def predict(self, batch: TensorDictBase) -> Tensor:
        return least(self.predictions(batch))

    def predictions(self, batch: TensorDictBase) -> Tensor:
        return torch.cat([critic.predictions(batch) for critic in self.each()])

    def action_value(self, batch: TensorDictBase, own: Tensor, joint: Tensor) -> Tensor:
        return torch.cat([critic.action_value(batch, own, joint) for critic in self.each()])


class LocalTwins(Twins):
    """Two local critics."""

    contract = Contract(reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__(spec, *(LocalCritic(spec, hidden=[4], value_norm=False) for _ in range(2)))


class JointTwins(Twins):
    """Two joint critics."""

    contract = Contract(
        reads=JointCritic.contract.reads,
        writes=JointCritic.contract.writes,
        traits=("differentiable_in_action",),
        predicts=keys.ACTION_VALUE,
    )
    view = "state"

    def __init__(self, spec: TeamSpec, *, view: str = "state") -> None:
        super().__init__(spec, *(JointCritic(spec, hidden=[4], value_norm=False) for _ in range(2)))


class Gradients:
    """A ``minimise`` that keeps the gradients of the networks and moves nothing."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.found: list[list[list[Tensor | None]]] = []

    def __call__(self, loss: Tensor, max_grad_norm: float | None, adjust: Any = None) -> Metrics:
        for module in self.modules:
            module.zero_grad(set_to_none=True)
        loss.backward()
        self.found.append([[p.grad for p in module.parameters()] for module in self.modules])
        return {}


def batch_for(actor: StochasticActor | DeterministicActor) -> TensorDict:
    torch.manual_seed(0)
    batch = TensorDict({}, batch_size=[B, T])
    batch.set(keys.OBSERVATION, torch.randn(B, T, N, CONTINUOUS.observation))
    batch.set(keys.STATE, torch.randn(B, T, CONTINUOUS.state_size))
    has = torch.arange(2) < torch.tensor(CONTINUOUS.own_action_sizes).unsqueeze(-1)
    batch.set(keys.ACTION_DIMS, has.expand(B, T, -1, -1).clone())
    batch.set(keys.ALIVE, torch.ones(B, T, N, 1, dtype=torch.bool))
    batch.set(keys.ADVANTAGE, torch.randn(B, T, N, 1)).set(keys.VALUE_TARGET, torch.randn(B, T, N, 1))
    with torch.no_grad():
        actor(batch)
    return batch


def mean_square_gradients(critic: Critic, rows: TensorDictBase, factor: float) -> list[Tensor]:
    """Gradients of ``factor * mean((prediction - target)^2)``, written out."""
    error = critic.predict(rows) - rows[keys.VALUE_TARGET]
    return list(torch.autograd.grad(factor * error.square().mean(), list(critic.parameters())))


def test_a_critic_of_two_networks_keeps_its_contract_and_writes_the_least() -> None:
    critic = LocalTwins(CONTINUOUS)
    check_component(critic)
    rows = batch_for(StochasticActor(CONTINUOUS, hidden=[4])).flatten()
    first, second = (each.predict(rows) for each in critic.each())
    assert critic.predictions(rows).shape == (2, B * T, N, 1)
    assert torch.equal(critic(rows)[keys.STATE_VALUE], torch.minimum(first, second))
    assert (first < second).any()
    assert (second < first).any()


def test_the_least_of_one_network_is_its_own_bit_for_bit_and_in_its_gradient() -> None:
    values = torch.randn(1, 5, requires_grad=True)
    assert torch.equal(least(values), values[0])
    least(values).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.ones(1, 5))


def test_on_policy_updates_regress_every_network() -> None:
    actor, critic = StochasticActor(CONTINUOUS, hidden=[4]), LocalTwins(CONTINUOUS)
    batch, minimise = batch_for(actor), Gradients(*critic.each())
    with torch.no_grad():
        rows = critic(batch.clone())
    update = PolicyGradientUpdate(CONTINUOUS, value_coef=0.7, value_clip=None, huber_delta=None)
    update.update(rows, Learning(actor, critic, TruePolicyOpponents(CONTINUOUS), minimise, 0.0))
    (found,) = minimise.found
    for each, gradients in zip(critic.each(), found, strict=True):
        # The loss is half the mean square, as everywhere in the family.
        for got, expected in zip(gradients, mean_square_gradients(each, units(batch, None), 0.7 * 0.5), strict=True):
            assert got is not None
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def ddpg(coupling: float) -> tuple[JointTwins, Gradients, TensorDictBase]:
    actor, critic = DeterministicActor(CONTINUOUS, hidden=[4]), JointTwins(CONTINUOUS)
    batch = batch_for(actor)
    batch.set(keys.JOINT_ACTION, batch[keys.ACTION].unsqueeze(-3))
    batch.set(keys.BEHAVIOUR_LOC, batch[keys.LOC]).set(keys.BEHAVIOUR_SCALE, batch[keys.SCALE])
    minimise = Gradients(*critic.each(), actor)
    update = DdpgUpdate(CONTINUOUS, critic_weight=1.5, coupling=coupling)
    update.update(batch, Learning(actor, critic, TruePolicyOpponents(CONTINUOUS), minimise, 0.0))
    return critic, minimise, batch


def test_ddpg_regresses_every_network_and_the_actor_climbs_the_first() -> None:
    torch.manual_seed(1)
    critic, minimise, batch = ddpg(0.0)
    fitted, climbed = minimise.found
    for each, gradients in zip(critic.each(), fitted[:2], strict=True):
        for got, expected in zip(gradients, mean_square_gradients(each, units(batch, None), 1.5), strict=True):
            assert got is not None
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert all(gradient is None for network in climbed[:2] for gradient in network), "the actor's loss trains no critic"
    alone = [p.detach() for p in climbed[2] if p is not None]
    torch.manual_seed(1)
    other = DeterministicActor(CONTINUOUS, hidden=[4])
    rows = units(batch, None)
    of_first = critic.each()[0].action_value(rows, other.reparametrised(rows), rows[keys.JOINT_ACTION])[0]
    slopes = torch.autograd.grad(-of_first.mean(), list(other.parameters()))
    for got, wanted in zip(alone, slopes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_joint_gradients_of_a_critic_of_two_networks_are_refused() -> None:
    with pytest.raises(OptionError, match="must be 0 with a critic of 2 networks"):
        ddpg(0.5)


def test_the_actor_waits_for_the_critic_and_the_count_resumes() -> None:
    """With `actor_every: 3` it takes a step in the updates 1, 4, 7; critics in all."""
    actor, critic = DeterministicActor(CONTINUOUS, hidden=[4]), JointCritic(CONTINUOUS, hidden=[4], twins=True, value_norm=False)
    batch = batch_for(actor)
    batch.set(keys.JOINT_ACTION, batch[keys.ACTION].unsqueeze(-3))
    kept: dict[str, Tensor] = DdpgUpdate(CONTINUOUS, actor_every=3).state_dict()
    reached = []
    for _ in range(7):
        update, minimise = DdpgUpdate(CONTINUOUS, actor_every=3), Gradients(critic, actor)
        update.load_state_dict(kept)
        metrics = update.update(batch.clone(), Learning(actor, critic, TruePolicyOpponents(CONTINUOUS), minimise, 0.0))
        kept = update.state_dict()
        reached.append([any(slope is not None for network in loss[1:] for slope in network) for loss in minimise.found])
        assert ("actor/loss" in metrics) == (len(minimise.found) == 2)
    assert reached == [[False, True], [False], [False], [False, True], [False], [False], [False, True]]
    assert not DdpgUpdate(CONTINUOUS).state_dict()
