"""Rules for optimisers, and for the trainer's options."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from marlkit.component import Optimizer, Trainer
from marlkit.testing.rules import require, rule


def _parameters() -> dict[str, list[nn.Parameter]]:
    """Some for each component, of which one never has a gradient."""
    sizes = {"actor": (3, 2), "critic": (4,), "opponents": (1,)}
    return {name: [nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(2))] for name, size in sizes.items()}


def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, list[nn.Parameter]]) -> float:
    """One step on the squares of the first parameter of each component; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = sum((own[0].square().sum() for own in parameters.values()), torch.zeros(()))
    loss.backward()
    optimizer.step()
    return loss.item()


@rule("optimizer")
def holds_every_parameter_once(optimizer: Optimizer) -> None:
    """`build` gives one torch optimiser with a group for each component, each parameter in one."""
    parameters = _parameters()
    built = optimizer.build(parameters)
    require(isinstance(built, torch.optim.Optimizer), f"builds a {type(built).__name__}", "Build a torch.optim.Optimizer.")
    groups = [[id(parameter) for parameter in group["params"]] for group in built.param_groups]
    wanted = [[id(parameter) for parameter in own] for own in parameters.values()]
    remedy = "Build torch's optimiser over `self.groups(parameters)`."
    require(groups == wanted, "does not hold the parameters of each component in a group of its own", remedy)


@rule("optimizer")
def changes_rates_as_it_says(optimizer: Optimizer) -> None:
    """The rates start at `lr`, the critic's at `critic_lr`, and go linearly to the share `lr_end` of them."""
    parameters = _parameters()
    built = optimizer.build(parameters)
    for progress in (0.0, 0.5, 1.0):
        optimizer.schedule(built, progress)
        share = 1 - (1 - optimizer.lr_end) * progress
        for name, group in zip(parameters, built.param_groups, strict=True):
            own = optimizer.critic_lr if name == "critic" and optimizer.critic_lr is not None else optimizer.lr
            rate, wanted = float(group["lr"]), own * share
            problem = f"has a rate of {rate:g} for the {name} at progress {progress:g}, not {wanted:g}"
            require(abs(rate - wanted) <= 1e-6 * own, problem, "Keep `lr`, `critic_lr` and `lr_end`, and `self.groups`.")


@rule("optimizer")
def descends_where_there_is_a_gradient(optimizer: Optimizer) -> None:
    """Steps descend, and a parameter without gradient is not moved, nor its state: so one agent alone can be updated."""
    parameters = _parameters()
    built = optimizer.build(parameters)
    losses = [_step(built, parameters) for _ in range(10)]
    require(losses[-1] < losses[0], f"climbs from {losses[0]:g} to {losses[-1]:g}", "Step against the gradient.")
    for name, (_, still) in parameters.items():
        kept = bool((still == 1).all()) and not built.state.get(still)
        require(kept, f"moves a parameter of the {name} that has no gradient", "Skip parameters whose `grad` is None.")


@rule("optimizer")
def steps_on_from_its_state(optimizer: Optimizer) -> None:
    """The torch optimiser's state holds all that decides its next step."""
    first, second = _parameters(), _parameters()
    one, other = optimizer.build(first), optimizer.build(second)
    for _ in range(3):
        _step(one, first)
    with torch.no_grad():
        for name, own in first.items():
            for mine, theirs in zip(own, second[name], strict=True):
                theirs.copy_(mine)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for built, parameters in ((one, first), (other, second)):
        _step(built, parameters)
    same = all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
    require(same, "steps otherwise after its state was loaded into a new one", "Keep state in `state` and `param_groups`.")


@rule("trainer", runs=False)
def keeps_its_options(trainer: Trainer) -> None:
    """Every option of a trainer is an attribute of the same name, from which a run reads it."""
    for name, value in trainer.options.items():
        has = hasattr(trainer, name) and (value is None or getattr(trainer, name) == value)
        require(has, f"does not keep its option `{name}`", f"Set `self.{name} = {name}` in the constructor.")
