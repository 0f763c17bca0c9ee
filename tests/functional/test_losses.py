"""Losses against hand-computed numbers, derivatives and TorchRL; entries that do not count change nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.multiagent import MAPPOLoss

from marlkit.functional.losses import (
    approximate_kl,
    clip_fraction,
    explained_variance,
    policy_gradient_loss,
    ppo_clip_loss,
    value_loss,
)

assert_exact = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-10)


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


# Ratios below, inside and above the clip range of 0.2, each with either sign of the advantage.
RATIO = double(0.7, 0.7, 0.9, 0.9, 1.1, 1.1, 1.3, 1.3)
ADVANTAGE = double(2, -2, 2, -2, 2, -2, 2, -2)
CLIPPED = double(1.4, -1.6, 1.8, -1.8, 2.2, -2.2, 2.4, -2.6)
SLOPE = double(1.4, 0, 1.8, -1.8, 2.2, -2.2, 0, -2.6)


def test_clipped_surrogate_and_its_gradient_by_hand() -> None:
    log_prob = RATIO.log().requires_grad_()
    for index in range(8):
        one = torch.zeros(8)
        one[index] = 1
        loss = ppo_clip_loss(log_prob, torch.zeros(8), ADVANTAGE, one, clip_epsilon=0.2)
        assert loss.item() == pytest.approx(-CLIPPED[index].item(), abs=1e-10)
        assert_exact(gradient(loss, log_prob), -SLOPE * one)
    loss = ppo_clip_loss(log_prob, torch.zeros(8), ADVANTAGE, torch.ones(8), clip_epsilon=0.2)
    assert loss.item() == pytest.approx(-CLIPPED.mean().item(), abs=1e-10)


def test_unbounded_clip_is_the_plain_surrogate() -> None:
    loss = ppo_clip_loss(RATIO.log(), torch.zeros(8), ADVANTAGE, torch.ones(8), clip_epsilon=math.inf)
    assert loss.item() == pytest.approx(-np.mean(RATIO.numpy() * ADVANTAGE.numpy()), abs=1e-12)


def test_gradient_before_the_first_step_is_the_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    log_prob, advantage = torch.randn(2, 5, 4, 3, 1, generator=generator, dtype=torch.float64)
    weight = torch.rand(5, 4, 3, 1, generator=generator) < 0.7
    log_prob.requires_grad_()
    expected = -(advantage * weight) / weight.sum()
    for loss in (
        ppo_clip_loss(log_prob, log_prob.detach().clone(), advantage, weight, clip_epsilon=0.2),
        policy_gradient_loss(log_prob, advantage, weight),
    ):
        assert_exact(gradient(loss, log_prob), expected)


def test_policy_gradient_loss_by_hand() -> None:
    loss = policy_gradient_loss(double(-1, -2, -3), double(4, -5, 6), double(1, 1, 0))
    assert loss.item() == pytest.approx(-(-4 + 10) / 2)


def test_only_the_first_argument_gets_a_gradient() -> None:
    first, second, third = (torch.rand(4, 2, 1, dtype=torch.float64).requires_grad_() for _ in range(3))
    weight = torch.ones(4, 2, 1)
    for loss in (
        policy_gradient_loss(first, second, weight),
        ppo_clip_loss(first, second, third, weight, clip_epsilon=0.2),
        value_loss(first, second, third, weight, clip=0.2, huber_delta=1.0),
    ):
        slope, *others = torch.autograd.grad(loss, [first, second, third], allow_unused=True)
        assert slope is not None
        assert others == [None, None]


@pytest.mark.parametrize(
    ("prediction", "old", "clip", "huber_delta", "expected", "slope"),
    [
        (1.0, None, None, None, 2.0, -2.0),  # target 3 everywhere: e = -2
        (1.0, None, None, 10.0, 2.0, -2.0),
        (1.0, None, None, 0.5, 0.875, -0.5),  # 0.5 * (2 - 0.25)
        (1.0, 1.0, 0.2, None, 2.0, -2.0),  # at the old prediction the clip is inactive
        (2.5, 1.0, 0.2, None, 1.62, 0.0),  # moved towards the target: clipped 1.2 is the worse of the two
        (2.5, 1.0, 0.2, 1.0, 1.3, 0.0),  # the same with Huber: 1.8 - 0.5
        (0.0, 1.0, 0.2, None, 4.5, -3.0),  # moved away: unclipped is the worse, its gradient leads back
        (5.0, 1.0, 0.2, None, 2.0, 2.0),  # overshot: 0.5 * 2^2 against 0.5 * 1.8^2
    ],
)
def test_value_loss_by_hand(
    prediction: float, old: float | None, clip: float | None, huber_delta: float | None, expected: float, slope: float
) -> None:
    value = double(prediction).requires_grad_()
    old_value = None if old is None else double(old)
    loss = value_loss(value, old_value, double(3.0), torch.ones(1), clip=clip, huber_delta=huber_delta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert gradient(loss, value).item() == pytest.approx(slope, abs=1e-12)


def test_value_clip_needs_the_old_prediction() -> None:
    with pytest.raises(ValueError, match="old_prediction is needed"):
        value_loss(double(1), None, double(1), torch.ones(1), clip=0.2, huber_delta=None)


def test_approximate_kl_is_the_exact_divergence_when_enumerated() -> None:
    old, new = double(0.5, 0.3, 0.2), double(0.2, 0.2, 0.6)
    expected = sum(p * math.log(p / q) for p, q in zip(old.tolist(), new.tolist(), strict=True))
    assert approximate_kl(new.log(), old.log(), old).item() == pytest.approx(expected, abs=1e-12)
    assert approximate_kl(old.log(), new.log(), old).item() != pytest.approx(expected, abs=1e-3)
    assert approximate_kl(double(0.3), double(0.0), torch.ones(1)).item() == pytest.approx(math.exp(0.3) - 1 - 0.3)


def test_approximate_kl_keeps_its_digits_near_zero() -> None:
    assert approximate_kl(torch.tensor([1e-4]), torch.zeros(1), torch.ones(1)).item() == pytest.approx(5e-9, rel=0.01)


def test_clip_fraction_by_hand() -> None:
    weight = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]).bool()
    assert clip_fraction(RATIO.log(), torch.zeros(8), weight, clip_epsilon=0.2).item() == pytest.approx(4 / 7)
    assert clip_fraction(RATIO.log(), torch.zeros(8), weight, clip_epsilon=0.05).item() == 1.0


def test_explained_variance_by_hand() -> None:
    target, ones = double(1, 2, 3, 6), torch.ones(4)
    assert explained_variance(target, target, ones).item() == 1.0
    assert explained_variance(target + 5, target, ones).item() == pytest.approx(1.0)
    assert explained_variance(double(3, 3, 3, 3), target, ones).item() == pytest.approx(0.0)
    assert explained_variance(double(1, 2, 3, 4), target, ones).item() == pytest.approx(1 - 0.75 / 3.5)
    assert explained_variance(-target, target, ones).item() == pytest.approx(-3.0)
    assert explained_variance(double(1, 2, 3, 9), target, torch.tensor([1, 1, 1, 0])).item() == 1.0


def test_without_a_weight_all_count() -> None:
    prediction, target = double(1, 2, 3, 9), double(2, 2, 5, 4)
    options: dict[str, Any] = {"clip": None, "huber_delta": 1.0}
    everyone = torch.ones(4)
    assert value_loss(prediction, None, target, None, **options) == value_loss(prediction, None, target, everyone, **options)
    assert explained_variance(prediction, target, None) == explained_variance(prediction, target, everyone)


def test_explained_variance_of_constant_targets_is_zero() -> None:
    prediction = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert explained_variance(prediction, torch.full((1000,), 0.1), torch.ones(1000)).item() == 0.0


Loss = Callable[..., Tensor]
LOSSES: dict[str, tuple[Loss, int, dict[str, Any]]] = {
    "policy_gradient": (policy_gradient_loss, 2, {}),
    "ppo_clip": (ppo_clip_loss, 3, {"clip_epsilon": 0.2}),
    "value": (value_loss, 3, {"clip": None, "huber_delta": None}),
    "value clipped": (value_loss, 3, {"clip": 0.2, "huber_delta": 1.0}),
    "approximate_kl": (approximate_kl, 2, {}),
    "clip_fraction": (clip_fraction, 2, {"clip_epsilon": 0.2}),
    "explained_variance": (explained_variance, 2, {}),
}


@pytest.mark.parametrize("absurd", [-1e30, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", LOSSES)
def test_entries_that_do_not_count_change_no_loss_and_no_gradient(name: str, absurd: float) -> None:
    function, arguments, options = LOSSES[name]
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(6, 5, 3, 1, generator=generator, dtype=torch.float64) for _ in range(arguments)]
    valid, alive = torch.rand(6, 5, 1, 1, generator=generator) < 0.8, torch.rand(6, 5, 3, 1, generator=generator) < 0.7
    weight = valid & alive
    clean = [x.clone().requires_grad_() for x in inputs]
    loss = function(*clean, weight, **options)
    for position in range(arguments):
        spoilt = [x.clone() for x in inputs]
        spoilt[position] = spoilt[position].masked_fill(~weight, absurd)
        spoilt[0].requires_grad_()
        other = function(*spoilt, weight, **options)
        assert torch.equal(other, loss)
        if loss.requires_grad:
            slope = gradient(other, spoilt[0])
            assert torch.equal(slope, gradient(loss, clean[0]))
            assert (slope[~weight] == 0).all()


def test_float_weights_count_in_proportion() -> None:
    generator = torch.Generator().manual_seed(5)
    for function, arguments, options in LOSSES.values():
        inputs = [torch.randn(3, 1, generator=generator, dtype=torch.float64) for _ in range(arguments)]
        repeated = [torch.cat([x, x[1:], x[2:]]) for x in inputs]
        weighted = function(*inputs, double(1, 2, 3).view(3, 1), **options)
        assert_exact(weighted, function(*repeated, torch.ones(6, 1), **options))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"value"}))
def test_shapes_that_would_broadcast_silently_are_refused(name: str) -> None:
    function, arguments, options = LOSSES[name]
    for position in range(1, arguments + 1):
        inputs = [torch.zeros(4, 3, 1) for _ in range(arguments + 1)]
        inputs[position] = torch.zeros(4, 3)
        with pytest.raises(ValueError, match=r"of shape \[4, 3\] does not broadcast to \w+ of shape \[4, 3, 1\]"):
            function(*inputs, **options)


def torchrl_loss(loss: type[ClipPPOLoss], **options: Any) -> ClipPPOLoss:
    """TorchRL's loss around an actor and a critic that hand through the logits and values of the batch."""
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Identity(), in_keys=[("agents", "given_logits")], out_keys=[("agents", "logits")]),
        ProbabilisticTensorDictModule(
            in_keys={"logits": ("agents", "logits")},
            out_keys=[("agents", "action")],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key=("agents", "log_prob"),
        ),
    )
    critic = TensorDictModule(nn.Identity(), in_keys=[("agents", "given_value")], out_keys=[("agents", "state_value")])
    built = loss(actor, critic, entropy_bonus=False, normalize_advantage=False, **options)
    built.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "log_prob"),
        value=("agents", "state_value"),
        advantage=("agents", "advantage"),
        value_target=("agents", "value_target"),
    )
    return built


def team_batch(seed: int, batch: int = 40, agents: int = 3, actions: int = 5) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, agents, *shape, generator=generator, dtype=torch.float64)

    logits, value = randn(actions), randn(1)
    action = torch.randint(actions, (batch, agents), generator=generator)
    old = (logits + 0.3 * randn(actions)).log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
    agents_data = {
        "given_logits": logits.requires_grad_(),
        "given_value": value.requires_grad_(),
        "action": action,
        "log_prob": old,
        "state_value": value.detach() + 0.3 * randn(1),
        "advantage": randn(1),
        "value_target": randn(1),
    }
    return TensorDict({"agents": agents_data}, batch_size=[batch])


@pytest.mark.parametrize("loss", [ClipPPOLoss, MAPPOLoss])
@pytest.mark.parametrize(("theirs", "huber_delta", "scale"), [("smooth_l1", 1.0, 1.0), ("l2", None, 0.5)])
def test_agreement_with_torchrl(loss: type[ClipPPOLoss], theirs: str, huber_delta: float | None, scale: float) -> None:
    batch = team_batch(seed=6)
    agents = batch["agents"]
    expected = torchrl_loss(loss, clip_epsilon=0.2, loss_critic_type=theirs, clip_value=0.2, critic_coeff=1.0)(batch)

    log_prob = agents["given_logits"].log_softmax(-1).gather(-1, agents["action"].unsqueeze(-1))
    old, weight = agents["log_prob"].unsqueeze(-1), torch.ones(40, 3, 1, dtype=torch.bool)
    policy = ppo_clip_loss(log_prob, old, agents["advantage"], weight, clip_epsilon=0.2)
    value = value_loss(
        agents["given_value"], agents["state_value"], agents["value_target"], weight, clip=0.2, huber_delta=huber_delta
    )
    # TorchRL keeps its clip range in float32, which moves the bound by 1e-8.
    assert_near = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-7)
    assert_near(policy, expected["loss_objective"])
    assert_near(value, scale * expected["loss_critic"])
    for ours, their_loss, leaf in (
        (policy, expected["loss_objective"], "given_logits"),
        (value, scale * expected["loss_critic"], "given_value"),
    ):
        assert_near(gradient(ours, agents[leaf]), gradient(their_loss, agents[leaf]))
    fraction = clip_fraction(log_prob, old, weight, clip_epsilon=0.2)
    assert 0.1 < fraction.item() < 0.9
    assert fraction.item() == pytest.approx(expected["clip_fraction"].item())
