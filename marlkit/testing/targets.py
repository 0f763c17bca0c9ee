"""Rules for targets."""

from __future__ import annotations

import copy

import torch
from torch import nn

from marlkit.component import Targets
from marlkit.testing.partners import Team
from marlkit.testing.rules import close, require, rule, tensors_of

FOLLOWS = 2000
"""Optimiser steps after which a copy has come half-way, at any usual rate or interval."""


def _tracking(targets: Targets) -> Team:
    team = Team(targets)
    targets.track(team.actor, team.critic)
    return team


def _networks(targets: Targets, team: Team) -> dict[str, tuple[nn.Module, nn.Module]]:
    """What values are bootstrapped with, and the network that learns, by name."""
    return {"actor": (targets.actor(), team.actor), "critic": (targets.critic(), team.critic)}


@torch.no_grad()
def _disturb(team: Team) -> None:
    """Let the online networks learn: parameters and the averages of the normaliser move."""
    for module in (team.actor, team.critic):
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    team.critic.normaliser.update(3 * torch.randn(64) + 5)


def _distance(first: nn.Module, second: nn.Module) -> float:
    one, other = tensors_of(first), tensors_of(second)
    return sum((one[name].float() - other[name].float()).abs().sum().item() for name in one)


@rule("targets")
def starts_from_the_networks(targets: Targets) -> None:
    """After `track`, `actor` and `critic` are of the same classes as the networks, and equal to them."""
    team = _tracking(targets)
    for name, (target, online) in _networks(targets, team).items():
        problem = f"gives a {type(target).__name__} as the {name}, not a {type(online).__name__}"
        require(type(target) is type(online), problem, "Give the network, or a deep copy of it.")
        same = all(close(a, b) for a, b in zip(tensors_of(target).values(), tensors_of(online).values(), strict=True))
        require(same, f"does not start from an equal {name}", "Copy parameters and buffers in `track`.")


@rule("targets")
def chooses_with_what_it_knows(targets: Targets) -> None:
    """`chooser` is the policy that `actor` gives, or the one that learns."""
    team = _tracking(targets)
    known = targets.chooser() in (targets.actor(), team.actor)
    require(known, "lets another policy choose than its `actor` or the one that learns", "Give one of them in `chooser`.")


@rule("targets", without="lagging")
def bootstraps_with_what_learns(targets: Targets) -> None:
    """Without `lagging`, `actor` and `critic` are the networks that learn themselves."""
    team = _tracking(targets)
    for name, (target, online) in _networks(targets, team).items():
        require(target is online, f"gives a {name} that lags behind", "Declare the trait `lagging`.")


@rule("targets", trait="lagging")
def keeps_copies_of_its_own(targets: Targets) -> None:
    """With `lagging`, the critic is a copy without gradient, which stays what it is until it is told to follow."""
    team = _tracking(targets)
    target = targets.critic()
    require(target is not team.critic, "gives the critic that learns, although it declares `lagging`", "Copy it in `track`.")
    for name, (own, online) in _networks(targets, team).items():
        learns = own is not online and any(parameter.requires_grad for parameter in own.parameters())
        require(not learns, f"keeps a copy of the {name} with gradient", "`requires_grad_(False)` on the copy.")
    before = tensors_of(target)
    _disturb(team)
    still = all(close(before[name], now) for name, now in tensors_of(targets.critic()).items())
    require(still, "moves the copy before it is told to follow", "Copy tensors, not references.")


@rule("targets", trait="lagging")
def follows_what_changed(targets: Targets) -> None:
    """With `lagging`, `follow` moves the copies of the networks named towards these, buffers too, and nothing else."""
    team = _tracking(targets)
    _disturb(team)
    online = tensors_of(team.critic)
    begin = {name: _distance(*pair) for name, pair in _networks(targets, team).items()}
    for _ in range(FOLLOWS):
        targets.follow(["critic"])
    end = {name: _distance(*pair) for name, pair in _networks(targets, team).items()}
    remedy = "Move the copy towards the network, as SoftTargets and HardTargets do."
    problem = f"has a critic as far from the one that learns after {FOLLOWS} steps as before"
    require(end["critic"] < 0.5 * begin["critic"], problem, remedy)
    require(end["actor"] == begin["actor"], "moves the actor's copy when only the critic has changed", "Heed `changed`.")
    kept = all(close(online[name], now) for name, now in tensors_of(team.critic).items())
    require(kept, "changes the network that learns", "Write to the copy alone.")
    _follows_buffers(targets, team)


def _follows_buffers(targets: Targets, team: Team) -> None:
    copied, online = targets.critic().normaliser, team.critic.normaliser
    near = bool((copied.mean - online.mean).abs() < 0.5 * online.mean.abs() + 1e-12)
    require(near, "leaves the copy's value normaliser behind", "Let buffers follow like parameters.")


@rule("targets", trait="lagging")
def puts_python_off(targets: Targets) -> None:
    """What is Python in `follow`, such as a count, is handed to `afterwards`, and the result is the same."""
    twin = copy.deepcopy(targets)
    team = _tracking(targets)
    twin.track(team.actor, team.critic)
    _disturb(team)
    for _ in range(FOLLOWS // 4):
        targets.follow(["actor", "critic"])
        later: list[object] = []
        twin.follow(["actor", "critic"], later.append)
        for action in later:
            assert callable(action)
            action()
    same = all(
        close(a, b) for a, b in zip(tensors_of(targets.critic()).values(), tensors_of(twin.critic()).values(), strict=True)
    )
    require(same, "follows otherwise where `afterwards` puts its Python off", "Put counting and copying off together.")


@rule("targets", trait="lagging")
def follows_on_from_its_state(targets: Targets) -> None:
    """Copies and counts are in `state_dict`: what loads it follows on as the one that saved it."""
    fresh = copy.deepcopy(targets)
    team = _tracking(targets)
    fresh.track(team.actor, team.critic)
    _disturb(team)
    for _ in range(7):
        targets.follow(["actor", "critic"])
    fresh.load_state_dict(copy.deepcopy(targets.state_dict()))
    remedy = "Save counts in `get_extra_state`, and copies as modules."
    for _ in range(FOLLOWS // 8):
        targets.follow(["actor", "critic"])
        fresh.follow(["actor", "critic"])
        pairs = zip(targets.critic().parameters(), fresh.critic().parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        require(same, "follows otherwise after its state was loaded into a new one", remedy)
