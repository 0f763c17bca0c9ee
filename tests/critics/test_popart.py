"""PopArt: the statistics of the targets move, and no value does (VN-1)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract
from marlkit.critics.local import LocalCritic
from marlkit.nn.networks import TeamLinear
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.recipe.catalogue import components, load_class
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing.batches import batch_for

SPECS = {
    "discrete": TeamSpec(3, 5, Discrete(4), action_sizes=(4, 2, 3), team_reward=True),
    "continuous": TeamSpec(3, 4, Continuous(2), action_sizes=(2, 2, 1), team_reward=False),
}
ABLE = {
    name: entry
    for name, entry in components("critic").items()
    if "value_norm" in entry.options and "popart" in str(entry.options["value_norm"].annotation)
}
CASES = [
    pytest.param(name, kind, share, hidden, id=f"{name}-{kind}-{share}-{hidden}")
    for name, kind, share, hidden in itertools.product(sorted(ABLE), SPECS, ("all", "none"), ([6], []))
    if kind in ("discrete", *(() if "discrete" in ABLE[name].contract.needs.get("env", ()) else ("continuous",)))
    and (hidden or name != "attention")
]


def critic_of(name: str, spec: TeamSpec, **options: Any) -> Critic:
    """A critic with PopArt in double precision, its parameters as after some training."""
    torch.manual_seed(0)
    small = {
        option: value for option, value in {"embedding": 6, "heads": 2, "samples": 3}.items() if option in ABLE[name].options
    }
    critic: Critic = load_class(ABLE[name])(spec, **small, value_norm="popart", **options)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return critic.double()


def in_real_units(critic: Critic) -> dict[Any, torch.Tensor]:
    batch = batch_for(critic, (5,), views=critic.spec.n_agents).apply(lambda x: x.double() if x.is_floating_point() else x)
    found = critic(batch)
    return {key: found[key].clone() for key in critic.writes}


def test_all_critics_with_an_output_of_their_own_can() -> None:
    assert set(components("critic")) - set(ABLE) == {"factorised", "module"}  # the first mixes what the actor's networks say


@pytest.mark.parametrize(("name", "kind", "share", "hidden"), CASES)
def test_no_value_changes_when_the_scale_of_the_targets_does(name: str, kind: str, share: str, hidden: list[int]) -> None:
    critic = critic_of(name, SPECS[kind], share=share, hidden=hidden)
    before = in_real_units(critic)
    units = []
    for mean, deviation in ((50.0, 30.0), (-400.0, 7.0), (0.0, 1000.0)):
        critic.learn_scale(mean + deviation * torch.randn(64, 3, 1, dtype=torch.float64))
        units.append(critic.normaliser.mean_and_deviation())
        for key, value in in_real_units(critic).items():
            torch.testing.assert_close(value, before[key], rtol=1e-10, atol=1e-10)
    assert abs(units[0][1] - 1) > 10


def test_the_last_layer_is_rewritten_as_the_paper_says() -> None:
    """By hand: targets of mean 6 and deviation 2 after none (0 and 1): w' = w / 2, b' = (b - 6) / 2; then a second change."""
    critic = critic_of("local", TeamSpec(1, 2, Discrete(2)), hidden=[])
    layer = critic.get_submodule("network.layers.0")
    assert isinstance(layer, TeamLinear)
    weight, bias = layer.weights[0], layer.biases[0]
    with torch.no_grad():
        weight.copy_(torch.tensor([[3.0, -1.0]]))
        bias.fill_(2.0)
    critic.learn_scale(torch.tensor([4.0, 8.0]).double())
    torch.testing.assert_close(weight, torch.tensor([[1.5, -0.5]]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(bias, torch.tensor([-2.0]).double(), rtol=0, atol=1e-12)
    critic.normaliser.beta = 0.0  # only the last batch counts
    critic.learn_scale(torch.tensor([-3.0, 5.0]).double())  # mean 1, deviation 4
    torch.testing.assert_close(weight, torch.tensor([[0.75, -0.25]]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(bias, torch.tensor([(2 * -2.0 + 6 - 1) / 4]).double(), rtol=0, atol=1e-12)


def test_what_was_predicted_before_is_recalled_in_the_units_of_now() -> None:
    for enabled in (True, "popart"):
        critic = LocalCritic(SPECS["discrete"], hidden=[6], value_norm=enabled).double()
        critic.learn_scale(torch.randn(64).double())
        batch = batch_for(critic, (5,)).apply(lambda x: x.double() if x.is_floating_point() else x)
        noted = critic.normaliser.noted(critic(batch)[keys.STATE_VALUE])
        critic.learn_scale(100 * torch.randn(64).double() + 7)
        torch.testing.assert_close(critic.normaliser.recalled(noted), critic.predict(batch), rtol=1e-9, atol=1e-9)


def test_only_counted_targets_count_and_none_changes_nothing() -> None:
    normaliser = ValueNormaliser(enabled=True).double()
    target, counted = torch.tensor([1.0, 3.0, 1e9]).double(), torch.tensor([True, True, False])
    normaliser.update(target, counted=counted)
    assert normaliser.normalise(torch.tensor([1.0, 2.0, 5.0]).double()).tolist() == pytest.approx([-1, 0, 3])
    before = [buffer.clone() for buffer in normaliser.buffers()]
    normaliser.update(target, counted=torch.zeros(3, dtype=torch.bool))
    for buffer, then in zip(normaliser.buffers(), before, strict=True):
        assert torch.equal(buffer, then)
    fresh = ValueNormaliser(enabled=True)
    fresh.update(torch.ones(3), counted=torch.zeros(3, dtype=torch.bool))
    assert all(bool(buffer.isfinite().all()) for buffer in fresh.buffers())


def test_a_critic_that_cannot_rewrite_its_last_layer_says_so() -> None:
    class OwnCritic(LocalCritic):
        contract = Contract(reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)
        rescale = Critic.rescale

    with pytest.raises(NotImplementedError, match="OwnCritic cannot rewrite its last layer"):
        OwnCritic(SPECS["discrete"], value_norm="popart").learn_scale(torch.ones(3))
