"""The networks of bootstrap values: the online ones, or copies that follow them, with buffers and counters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, fit, learner_of, random_script
from tensordict import TensorDict
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.epsilon_greedy import EpsilonGreedyActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Targets
from marlkit.critics.local import LocalCritic
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.run.checkpoint_io import load_checkpoint, save_checkpoint
from marlkit.spec import Discrete, TeamSpec
from marlkit.targets.hard import HardTargets
from marlkit.targets.online import OnlineTargets
from marlkit.targets.soft import SoftTargets
from marlkit.training.learner import Learner

SPEC = TeamSpec(2, 3, Discrete(3), team_reward=True)


def networks() -> tuple[StochasticActor, LocalCritic]:
    torch.manual_seed(0)
    return StochasticActor(SPEC, hidden=[4], uniform_share=0.5, uniform_share_end=0.1), LocalCritic(SPEC, hidden=[4])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return any(not torch.equal(value, second[name]) for name, value in first.items())


def move(*online: nn.Module) -> None:
    """Change every parameter and every buffer."""
    for module in online:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data += torch.rand_like(tensor) + 0.1


@pytest.mark.parametrize("targets", [SoftTargets(SPEC), HardTargets(SPEC)], ids=["soft", "hard"])
def test_copies_begin_equal_apart_and_without_gradient(targets: Any) -> None:
    actor, critic = networks()
    critic.normaliser.update(torch.tensor([3.0]))
    targets.track(actor, critic)
    for copied, online in ((targets.actor(), actor), (targets.critic(), critic)):
        assert copied is not online
        assert not differ(state(copied), state(online))
        assert not any(p.requires_grad for p in copied.parameters())
        assert all(p.requires_grad for p in online.parameters())
        before = state(copied)
        move(online)
        assert not differ(state(copied), before), "no storage is shared"


def test_online_targets_are_the_networks_themselves() -> None:
    actor, critic = networks()
    targets = OnlineTargets(SPEC)
    targets.track(actor, critic)
    assert targets.actor() is actor
    assert targets.critic() is critic
    assert "lagging" not in targets.traits
    assert not targets.state_dict()
    targets.follow(["actor", "critic"])


@pytest.mark.parametrize("double", [None, True, False])
@pytest.mark.parametrize("owns_values", [True, False])
def test_who_chooses_is_the_copy_unless_it_is_double_q_learning(double: bool | None, owns_values: bool) -> None:
    critic = networks()[1]
    actor = EpsilonGreedyActor(SPEC, hidden=[4]) if owns_values else networks()[0]
    targets = SoftTargets(SPEC, double=double)
    targets.track(actor, critic)
    online = owns_values if double is None else double
    assert targets.chooser() is (actor if online else targets.actor())
    assert targets.actor() is not actor


def test_soft_copies_move_by_tau_at_every_step() -> None:
    actor, critic = networks()
    targets = SoftTargets(SPEC, tau=0.25)
    targets.track(actor, critic)
    expected = {name: value.double() for name, value in state(critic).items()}
    kept = state(targets.actor())
    for _ in range(3):
        move(critic, actor)
        targets.follow(["critic"])
        for name, value in state(critic).items():
            expected[name] = 0.75 * expected[name] + 0.25 * value.double()
            torch.testing.assert_close(targets.critic().state_dict()[name].double(), expected[name], rtol=0, atol=1e-6)
    assert "normaliser.mean" in expected, "units follow like weights"
    assert not differ(state(targets.actor()), kept), "the policy did not change"
    targets.follow(["actor", "opponents", "update"])
    assert differ(state(targets.actor()), kept)


def test_soft_copies_of_the_critic_wait_for_the_actor() -> None:
    """The first, the third, … step of the critic moves its copy; every step of the actor moves its own."""
    actor, critic = networks()
    targets = SoftTargets(SPEC, tau=0.25, critic_interval=2)
    targets.track(actor, critic)
    moved: dict[str, list[bool]] = {"actor": [], "critic": []}
    for _ in range(5):
        before = {"actor": state(targets.actor()), "critic": state(targets.critic())}
        move(critic, actor)
        targets.follow(["critic", "actor"])
        for name, copied in (("actor", targets.actor()), ("critic", targets.critic())):
            moved[name].append(differ(state(copied), before[name]))
        resumed = SoftTargets(SPEC, tau=0.25, critic_interval=2)
        resumed.track(actor, critic)
        resumed.load_state_dict(targets.state_dict())
        targets = resumed
    assert moved == {"actor": [True] * 5, "critic": [True, False, True, False, True]}


def test_hard_copies_are_replaced_every_interval_each_by_its_own_count() -> None:
    actor, critic = networks()
    targets = HardTargets(SPEC, interval=3)
    targets.track(actor, critic)
    last = {"actor": state(actor), "critic": state(critic)}
    for step in range(1, 13):
        move(actor, critic)
        changed = ["critic"] if step % 2 else ["critic", "actor"]
        targets.follow(changed)
        if step % 3 == 0:
            last["critic"] = state(critic)
        if step == 6:  # its third step
            last["actor"] = state(actor)
        if step == 12:
            last["actor"] = state(actor)
        assert not differ(state(targets.critic()), last["critic"])
        assert not differ(state(targets.actor()), last["actor"])


@pytest.mark.parametrize("targets", [SoftTargets(SPEC, tau=1.0, actor=False), HardTargets(SPEC, interval=1, actor=False)])
def test_without_a_copy_of_the_policy_the_policy_itself_bootstraps(targets: Any) -> None:
    actor, critic = networks()
    targets.track(actor, critic)
    assert targets.actor() is actor
    assert set(targets.copies) == {"critic"}
    move(actor, critic)
    targets.follow(["actor", "critic"])
    assert not differ(state(targets.critic()), state(critic))


def learner(targets: Targets, minibatch_size: int | None = None) -> Learner:
    actor, critic = networks()
    env = ScriptedEnvironment(SPEC, random_script(SPEC, envs=3, steps=12, ends=0.6))
    return learner_of(
        env, actor, critic=critic, targets=targets, update=PpoClipUpdate(SPEC, epochs=1, minibatch_size=minibatch_size)
    )


@pytest.mark.parametrize("targets", [SoftTargets(SPEC), HardTargets(SPEC, interval=2)], ids=["soft", "hard"])
def test_no_optimiser_and_no_gradient_reaches_the_copies(targets: Any) -> None:
    trained = learner(targets)
    owned = {id(p) for own in trained.parameter_groups().values() for p in own}
    assert owned == {id(p) for module in (trained.actor, trained.critic) for p in module.parameters()}
    fit(trained, 2)
    assert all(p.grad is None for p in targets.parameters())
    assert list(targets.parameters())


def test_copies_follow_the_steps_of_a_training() -> None:
    trained = learner(HardTargets(SPEC, interval=4), minibatch_size=6)  # 2 steps in an iteration of 3 x 4 rows
    begun = state(trained.critic)
    fit(trained, 1)
    assert not differ(state(trained.targets.critic()), begun)
    assert differ(state(trained.critic), begun)
    fit(trained, 1)
    assert not differ(state(trained.targets.critic()), state(trained.critic))


def test_an_update_of_the_critic_alone_does_not_move_the_policy() -> None:
    trained = learner(SoftTargets(SPEC, tau=1.0))
    trained.manual_backward = lambda loss, *_, **__: loss.backward()  # type: ignore[method-assign]
    optimizer = trained.configure_optimizers()
    trained.optimizers = lambda *_, **__: optimizer  # type: ignore[method-assign, assignment]
    batch = TensorDict({keys.OBSERVATION: torch.randn(5, 2, 3)}, batch_size=[5])
    kept = state(trained.targets.actor())
    move(trained.actor)
    norms = trained.minimise(trained.critic.predict(batch).square().mean(), None)
    assert set(norms) == {"critic/grad_norm"}
    assert not differ(state(trained.targets.actor()), kept)
    assert not differ(state(trained.targets.critic()), state(trained.critic))


@pytest.mark.parametrize("kind", [SoftTargets, HardTargets])
def test_copies_and_counters_resume(kind: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tau": 0.3} if kind is SoftTargets else {"interval": 3}
    actor, critic = networks()
    first = kind(SPEC, **options)
    first.track(actor, critic)
    for _ in range(4):
        move(actor, critic)
        first.follow(["actor", "critic"])
    save_checkpoint({"state": first.state_dict()}, tmp_path / "targets.ckpt")
    second = kind(SPEC, **options)
    second.track(actor, critic)
    second.load_state_dict(load_checkpoint(tmp_path / "targets.ckpt")["state"])
    for _ in range(3):
        assert not differ(state(second.critic()), state(first.critic()))
        assert not differ(state(second.actor()), state(first.actor()))
        move(actor, critic)
        first.follow(["actor", "critic"])
        second.follow(["actor", "critic"])


def test_a_soft_copy_of_an_integer_tensor_is_equal() -> None:
    actor, critic = networks()
    critic.register_buffer("count", torch.tensor(3))
    targets = SoftTargets(SPEC, tau=0.5)
    targets.track(actor, critic)
    critic.get_buffer("count").fill_(8)
    targets.follow(["critic"])
    assert int(targets.critic().get_buffer("count")) == 8


def test_soft_copies_are_bit_for_bit_those_of_one_tensor_at_a_time() -> None:
    actor, critic = networks()
    targets = SoftTargets(SPEC, tau=0.005)
    targets.track(actor, critic)
    for online, copied in ((actor, targets.actor()), (critic, targets.critic())):
        expected = state(copied)
        move(online)
        for name, value in state(online).items():
            expected[name].lerp_(value, 0.005)
        targets.follow(["actor" if online is actor else "critic"])
        assert expected.keys() == copied.state_dict().keys()
        assert all(torch.equal(value, expected[name]) for name, value in copied.state_dict().items())


@pytest.mark.parametrize("targets", [SoftTargets(SPEC, tau=1.0), HardTargets(SPEC, interval=1)], ids=["soft", "hard"])
@pytest.mark.parametrize("how", ["moved", "assigned"])
def test_tensors_that_a_network_replaces_are_still_followed(targets: Any, how: str) -> None:
    actor, critic = networks()
    targets.track(actor, critic)
    targets.follow(["actor", "critic"])
    before = {id(tensor) for module in (critic, targets.critic()) for tensor in (*module.parameters(), *module.buffers())}
    for module in (actor, critic, targets):
        if how == "moved":  # as a move to another device, which replaces buffers
            module.double()
        else:
            module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    after = {id(tensor) for module in (critic, targets.critic()) for tensor in (*module.parameters(), *module.buffers())}
    assert before != after
    move(actor, critic)
    targets.follow(["actor", "critic"])
    assert not differ(state(targets.actor()), state(actor))
    assert not differ(state(targets.critic()), state(critic))


def test_a_parameter_of_two_modules_is_moved_once() -> None:
    actor, critic = networks()
    critic.register_module("tied", nn.Linear(1, 1, bias=False))
    critic.register_module("other", nn.Linear(1, 1, bias=False))
    critic.other.weight = critic.tied.weight  # type: ignore[union-attr]
    targets = SoftTargets(SPEC, tau=0.5)
    targets.track(actor, critic)
    begun, now = state(critic)["tied.weight"], torch.tensor([[8.0]])
    with torch.no_grad():
        critic.get_parameter("tied.weight").copy_(now)
    targets.follow(["critic"])
    assert targets.critic().get_parameter("other.weight").item() == pytest.approx(((begun + now) / 2).item())


def test_values_of_next_states_are_those_of_the_copy() -> None:
    trained = learner(HardTargets(SPEC))
    old = copy.deepcopy(trained.critic)
    move(trained.actor, trained.critic)
    batch = trained.data.collect(trained.env, trained.actor)
    trained.annotate(batch)
    assert batch[keys.TERMINATED].any()
    with torch.no_grad():
        expected = old(batch["next"].clone().reshape(-1))[keys.STATE_VALUE].reshape(3, 4, 2, 1)
    expected = expected.masked_fill(batch[keys.TERMINATED].unsqueeze(-1), 0.0)
    torch.testing.assert_close(batch[keys.following(keys.STATE_VALUE)], expected, rtol=1e-5, atol=1e-6)
