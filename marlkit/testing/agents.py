"""What actors and critics with separate parameters have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marlkit.component import ModuleComponent
from marlkit.testing.rules import require


def require_separate_parameters(component: ModuleComponent, value_of: Callable[[int], Tensor]) -> None:
    """Hold a component to the trait `separate_parameters`.

    Args:
        component: an actor or a critic.
        value_of: evaluates agent i with gradient, ``[*]``.
    """
    agents = range(component.spec.n_agents)
    own = [list(component.agent_parameters([agent])) for agent in agents]
    remedy = "Give each agent leaf parameters of its own (TeamNetwork with groups), or declare the trait only where it is so."
    _require_alike(own, remedy)
    names = {id(parameter): name for name, parameter in component.named_parameters()}
    for agent in agents:
        component.zero_grad(set_to_none=True)
        value = value_of(agent)
        require(value.requires_grad, f"values agent {agent} without gradient", remedy)
        value.square().sum().backward()
        moved = {id(p) for p in component.parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
        others = sorted(names[found] for found in moved - {id(parameter) for parameter in own[agent]})
        problem = f"has a loss of agent {agent} that reaches `{', '.join(others)}`, which is not agent {agent}'s alone"
        require(not others, problem, remedy)
        require(bool(moved), f"has a loss of agent {agent} that reaches no parameter", remedy)
    for agent in agents:
        shared = list(component.shared_parameters(agent))
        known = {id(parameter) for parameter in own[agent]}
        problem = f"shares parameters of agent {agent} that are not agent {agent}'s"
        require(all(id(parameter) in known for parameter in shared), problem, "Give `shared_parameters` a part of the own ones.")
    shapes = [[tuple(p.shape) for p in component.shared_parameters(agent)] for agent in agents]
    require(all(s == shapes[0] for s in shapes), "shares parameters that do not correspond between agents", "Keep one order.")


def _require_alike(own: list[list[torch.nn.Parameter]], remedy: str) -> None:
    """Agents have parameters, none in common, and in one order."""
    seen: set[int] = set()
    for agent, parameters in enumerate(own):
        require(bool(parameters), f"has no parameters of agent {agent}, although it declares `separate_parameters`", remedy)
        common = [parameter for parameter in parameters if id(parameter) in seen]
        require(not common, f"gives agent {agent} parameters that another agent has too", remedy)
        seen |= {id(parameter) for parameter in parameters}
        shapes = [tuple(parameter.shape) for parameter in parameters]
        wanted = [tuple(parameter.shape) for parameter in own[0]]
        require(shapes == wanted, f"gives agent {agent} parameters of shapes {shapes}, agent 0 {wanted}", "Keep one order.")
