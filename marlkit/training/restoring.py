"""A checkpoint held against the learner that it is to be loaded into, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from marlkit import keys, rng, saved
from marlkit.errors import CheckpointError
from marlkit.keys import Key
from marlkit.saved import COUNT, TEXT, Kind, at, refuse_misfit, refuse_other_tensor
from marlkit.spec import TeamSpec
from marlkit.training.returns import has_agent_returns

if TYPE_CHECKING:
    from marlkit.component import Optimizer
    from marlkit.training.learner import Learner

EXTRA_STATE = "_extra_state"
"""How torch ends the name of a module's state that is no tensor."""

HEADER: dict[str, Any] = {
    "recipe": TEXT,
    "spec": saved.MAPPING,
    "iteration": COUNT,
    "frames": COUNT,
}
"""What marlkit looks at in every checkpoint."""

FREE = ("H", "E", "V", "M")
"""Dimensions of keys whose sizes the team does not decide."""


def refuse_unfit(checkpoint: Mapping[str, Any], learner: Learner) -> None:
    """Check that a checkpoint fits a learner that has been built and not yet trained.

    Raises:
        CheckpointError: names the first entry that does not fit, what it is and what would fit.
    """
    state = checkpoint["marlkit"]
    refuse_misfit(state, HEADER | {"env": saved.MAPPING, "data": saved.MAPPING, "rng": saved.MAPPING}, "marlkit", exact=False)
    refuse_other_team(state["spec"], learner.env.spec)
    refuse_unfit_parameters(checkpoint.get("state_dict"), learner, "state_dict")
    _refuse_unfit_optimizer(checkpoint.get("optimizer_states"), learner)
    _refuse_unfit_metrics(state.get("metrics", {}))
    others = state.get("others", [])
    refuse_misfit(others, [saved.MAPPING] * (learner.ranks.size - 1), "marlkit.others")
    for where, each in [("marlkit", state), *((f"marlkit.others[{i}]", other) for i, other in enumerate(others))]:
        _refuse_unfit_rank(each, learner, where)


def refuse_other_team(found: Mapping[str, Any], spec: TeamSpec) -> None:
    """Check that the team of a checkpoint is that of the environment.

    Raises:
        CheckpointError: names the first thing that differs.
    """
    here = spec.as_dict()
    for name, value in found.items():
        # An older checkpoint may know fewer.
        if name not in here or here[name] != value:
            raise CheckpointError(
                f"`marlkit.spec.{name}` is {saved.described(value)}, but the environment has {saved.described(here.get(name))}: "
                "it was saved from another team."
            )


def saved_team(found: Any) -> TeamSpec:
    """The team that a checkpoint was saved from.

    Raises:
        CheckpointError: it describes none.
    """
    sizes = Kind("a whole number from 1 on", lambda value: type(value) is int and 0 < value < 2**31)
    refuse_misfit(found, {"n_agents": sizes, "observation": sizes, "action": saved.MAPPING}, "marlkit.spec", exact=False)
    with saved.named("`marlkit.spec` describes no team"):
        spec = TeamSpec.from_dict(found)
        refuse_misfit(spec.action_features, sizes, "action")
        for per_agent, most in ((spec.own_observation_sizes, spec.observation), (spec.own_action_sizes, spec.action_features)):
            if len(per_agent) != spec.n_agents or not all(type(size) is int and 0 <= size <= most for size in per_agent):
                raise CheckpointError(f"the sizes {per_agent} are not of {spec.n_agents} agents with at most {most} each.")
        if len(spec.agent_names) != spec.n_agents or not all(type(name) is str for name in spec.agent_names):
            raise CheckpointError(f"there are {spec.n_agents} agents, of the names {spec.agent_names}.")
    return spec


def refuse_unfit_parameters(found: Any, module: nn.Module, where: str) -> None:
    """Hold the saved parameters and buffers of a module to those that it has.

    Raises:
        CheckpointError: names the first that is missing, too many, of another shape or type, or not finite.
    """
    own = module.state_dict()
    found = _as_read(found, module) if isinstance(found, dict) else found
    open_ended = {name for name in own if name.endswith(EXTRA_STATE)}
    refuse_misfit(found, dict.fromkeys(own, saved.ANY), where)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in own.items():
        if not is_lazy(value):
            entry = at(where, name)
            refuse_misfit(found[name], value, entry, finite=name in parameters, exact=name not in open_ended)


def _as_read(found: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A saved state as the modules read it, which may convert what older versions of them kept."""
    read = dict(found)
    for name, part in module.named_modules():
        for hook in part._load_state_dict_pre_hooks.values():
            hook(read, f"{name}." if name else "", {}, True, [], [], [])
    return read


def _refuse_unfit_optimizer(found: Any, learner: Learner) -> None:
    groups = learner.parameter_groups()
    states = Kind("the state of one optimiser", lambda value: isinstance(value, list) and len(value) == 1)
    refuse_misfit(found, states, "optimizer_states")
    where = "optimizer_states[0]"
    refuse_misfit(found[0], {"state": saved.MAPPING, "param_groups": saved.LIST}, where)
    example, fixed = _optimizer_example(learner.optimizer, groups)
    held, options = found[0]["state"], found[0]["param_groups"]
    known = Kind(f"the number of a parameter, 0 to {len(example['state']) - 1}", lambda key: type(key) is int and key in numbers)
    numbers = {number for group in example["param_groups"] for number in group["params"]}
    for number, state in held.items():
        refuse_misfit(number, known, f"{where}.state")
        # A parameter that never had a gradient has no state.
        refuse_misfit(state, example["state"].get(number, {}), f"{where}.state[{number}]", finite=True)
    refuse_misfit(options, [saved.MAPPING] * len(example["param_groups"]), f"{where}.param_groups")
    for index, (own, group) in enumerate(zip(options, example["param_groups"], strict=True)):
        _refuse_unfit_group(own, group, fixed[index], f"{where}.param_groups[{index}]")


def _refuse_unfit_group(found: dict[str, Any], example: Mapping[str, Any], fixed: set[str], where: str) -> None:
    """Hold the options of a parameter group to the recipe's; how they are computed on this device is left to the optimiser."""
    refuse_misfit(found.get("params"), example["params"], f"{where}.params")
    if found["params"] != example["params"]:
        raise CheckpointError(f"`{where}.params` are not the numbers of the parameters of this component.")
    for name, value in example.items():
        is_switch = value is None or isinstance(value, (bool, str))
        if name in fixed and (is_switch or name not in found):
            found[name] = value
        refuse_misfit(found.get(name), value, f"{where}.{name}", finite=True)
        if name in fixed and not isinstance(value, Tensor) and found[name] != value:
            raise CheckpointError(f"`{where}.{name}` is {saved.described(found[name])}, the recipe's {saved.described(value)}.")


def _optimizer_example(optimizer: Optimizer, groups: Mapping[str, list[nn.Parameter]]) -> tuple[dict[str, Any], list[set[str]]]:
    """What a state of the optimiser looks like after a step of every parameter, and the options of each group that stay."""
    copies = {name: [nn.Parameter(p.detach().clone()) for p in parameters] for name, parameters in groups.items()}
    made = optimizer.build(copies)
    begun = [dict(group) for group in made.state_dict()["param_groups"]]
    begun = [{name: _copy(value) for name, value in group.items()} for group in begun]
    for parameter in (parameter for own in copies.values() for parameter in own):
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    optimizer.schedule(made, 0.5)
    example = made.state_dict()
    optimizer.schedule(made, 1.0)
    ended = made.state_dict()["param_groups"]
    groups_now = zip(begun, example["param_groups"], ended, strict=True)
    fixed = [{name for name in first if _same(first[name], mid[name], last[name])} for first, mid, last in groups_now]
    return example, fixed


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _same(first: Any, *others: Any) -> bool:
    return not isinstance(first, Tensor) and all(other == first for other in others)


def _refuse_unfit_metrics(found: Any) -> None:
    refuse_misfit(found, saved.MAPPING, "marlkit.metrics")
    plain = Kind("a number", lambda value: type(value) in (int, float))
    for name, value in found.items():
        refuse_misfit(name, TEXT, "marlkit.metrics: a name")
        refuse_misfit(value, plain, at("marlkit.metrics", name))


def _refuse_unfit_rank(found: Mapping[str, Any], learner: Learner, where: str) -> None:
    """Hold what one rank has saved to what this one has: all of them are built alike."""
    states = {"env": saved.MAPPING, "data": saved.MAPPING, "returns": saved.MAPPING, "rng": saved.MAPPING}
    refuse_misfit(found, states, where, exact=False)
    for name in states:
        refuse_misfit(found[name], saved.MAPPING, at(where, name))
    _refuse_unfit_returns(dict(found["returns"]), learner, f"{where}.returns")
    _refuse_unfit_steps(found["data"], learner, f"{where}.data")
    rng.refuse_unfit(found["rng"], f"{where}.rng")
    if "buffers" in found:
        own = dict(learner.named_buffers())
        refuse_misfit(found["buffers"], saved.MAPPING, f"{where}.buffers")
        refuse_misfit(found["buffers"], {name: own.get(name) for name in found["buffers"]}, f"{where}.buffers")


def _refuse_unfit_returns(found: dict[str, Any], learner: Learner, where: str) -> None:
    running, spec = torch.zeros(learner.env.num_envs), learner.env.spec
    agents = found.pop("agents", None)  # older checkpoints have none
    if agents is not None:
        # NaN for the episodes that were running when an older checkpoint was resumed.
        count = spec.n_agents if has_agent_returns(spec) else 0
        refuse_other_tensor(agents, f"{where}.agents", (count, *running.shape), running.dtype)
    returns = {"running": running, "steps": running}
    refuse_misfit(found, dict.fromkeys(returns, saved.ANY), where)
    refuse_misfit(found, returns, where, exact=False)


# --- stored steps ------------------------------------------------------------------------------------------------------------


def _refuse_unfit_steps(found: Any, learner: Learner, where: str) -> None:
    """Hold tensors that are stored under marlkit's keys, wherever they are, to the key table and to each other's batch."""
    if not isinstance(found, Mapping):
        return
    stored = dict(_steps(found))
    if not stored:
        for key, value in found.items():
            _refuse_unfit_steps(value, learner, at(where, key))
        return
    spec, hidden = learner.env.spec, learner.actor.initial_state(1)
    batches: set[tuple[int, ...]] = set()
    for key, value in stored.items():
        entry = f"{where}.{keys.name(key)}"
        shape, dtype = _behind_batch(key, spec, hidden)
        rank = len(shape)
        leading = tuple(value.shape[: value.dim() - rank]) if isinstance(value, Tensor) else ()
        saved.refuse_other_tensor(value, entry, (*leading, *(value.shape[-rank:] if None in shape else shape)), dtype)
        saved.refuse_nan(value, entry)
        batches.add(leading)
        if len(batches) > 1:
            raise CheckpointError(f"`{entry}` is {saved.described(value)}, not of as many steps as the entries beside it.")


def _steps(found: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[Key, Any]]:
    """The entries that stand under a key of the table."""
    for name, value in found.items():
        path = (*prefix, name)
        key: Key = name if len(path) == 1 else path
        if keys.current(key) in keys.TABLE:
            yield key, value
        elif isinstance(value, Mapping) and len(path) < 3 and name in ("agents", "next", "opponents", "recent"):
            yield from _steps(value, path)


def _behind_batch(key: Key, spec: TeamSpec, hidden: Mapping[Key, Tensor]) -> tuple[tuple[int | None, ...], torch.dtype]:
    """Sizes behind the batch, ``None`` where the team does not decide them, and the type."""
    state = hidden.get(keys.current(key))
    if state is not None:
        return tuple(state.shape[1:]), state.dtype
    info = keys.describe(key)
    sizes = spec.sizes() | {"1": 1} | dict.fromkeys(FREE)
    acts = keys.current(key) in (keys.ACTION, keys.RECENT_ACTION, keys.JOINT_ACTION)
    dtype = "float32" if acts and not spec.discrete else info.dtype
    return tuple(sizes[name] for name in info.dimensions(discrete=spec.discrete)), getattr(torch, dtype)
