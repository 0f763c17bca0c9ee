"""Every exported component keeps its contract; a new component is tested without further code."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from marlkit.component import Actor, Critic, Estimator, Opponents, Runtime
from marlkit.contract import When
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.recipe.catalogue import Entry, components, load_class
from marlkit.spec import TeamSpec
from marlkit.testing import check_component, check_environment, fake_batch, spec_examples

SHARES: list[Any] = ["all", "none", "groups"]
TENSOR_KINDS = ("actor", "opponents", "critic", "estimator")
MULTI_AGENT_MLP: dict[str, Any] = {
    "network": "torchrl.modules.MultiAgentMLP",
    "network_options": {
        "n_agent_inputs": "O", "n_agent_outputs": "F", "n_agents": "N", "centralized": False, "share_params": True, "depth": 1,
        "num_cells": 4, "activation_class": {"path": "torch.nn.Tanh"},
    },
}  # fmt: skip
EXAMPLES: dict[str, dict[str, Any]] = {
    "marlkit.actors.module.ModuleActor": MULTI_AGENT_MLP,
    "marlkit.critics.module.ModuleCritic": MULTI_AGENT_MLP,
}
"""Values of options that have no default, by component."""
SMALL: dict[str, Any] = {
    "hidden": [4],
    "characters": 2,
    "character_length": 3,
    "memory": 2,
    "recent": 8,
    "fit_rows": 8,
    "epochs": 1,
}
"""Options that keep a component small, where it has them."""


ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "vmas": {"scenario": "balance", "max_steps": 4},
    "torchrl": {
        "factory": "torchrl.envs.libs.vmas.VmasEnv", "actions": "continuous", "max_steps": 4,
        "options": {"scenario": "balance", "continuous_actions": True},
    },
}  # fmt: skip
"""Values of options that have no default, by environment; all need the simulator VMAS, whose tests have the other variants."""


def variants(entry: Entry) -> list[dict[str, Any]]:
    """The defaults, every value of an option that the contract depends on, and twins."""
    conditions = {
        str(part)
        for field in (entry.contract.reads, entry.contract.writes, entry.contract.traits)
        for item in field
        if isinstance(item, When)
        for part in item.parts
        if part.value is not None
    }
    twins = [{"twins": True}] if "twins" in entry.options else []
    return [{}, *twins, *({str(k): v for k, v in OmegaConf.from_dotlist([c]).items()} for c in sorted(conditions))]


def cases() -> list[Any]:
    """Every component that reads and writes keys, in every variant of an option that its contract depends on."""
    found = []
    for section in TENSOR_KINDS:
        for name, entry in components(section).items():
            for variant in variants(entry):
                for share in SHARES if "share" in entry.options and "share" not in variant else [None]:
                    label = f"{section}-{name}-{share}-" + ",".join(f"{k}={v}" for k, v in variant.items())
                    found.append(pytest.param(entry, variant, share, id=label))
    return found


def built(entry: Entry, spec: TeamSpec, **options: Any) -> Any:
    """The component with these options; a required part is the first of its kind without required parts."""
    small = {name: value for name, value in SMALL.items() if name in entry.options}
    options = small | copy.deepcopy(EXAMPLES.get(entry.dotted, {})) | options
    if options.get("view") == "state" and "network_options" in options:
        options["network_options"]["n_agent_inputs"] = "S"
    for name, option in entry.options.items():
        if option.required and option.part is not None and name not in options:
            plain = (e for e in components(option.part).values() if not any(o.required for o in e.options.values()))
            options[name] = load_class(next(plain))(spec)
    return load_class(entry)(spec, **options)


def groups(share: str | None, spec: TeamSpec) -> Any:
    if share != "groups":
        return share
    return [[0], list(range(1, spec.n_agents))] if spec.n_agents > 1 else [[0]]


@pytest.mark.parametrize(("entry", "variant", "share"), cases())
def test_component_keeps_its_contract(entry: Entry, variant: dict[str, Any], share: str | None) -> None:
    # Every team as it stands; other values of options where actions are discrete and continuous, sizes unequal.
    specs = spec_examples() if not variant and share in (None, "all") else spec_examples()[3:]
    for spec in specs:
        torch.manual_seed(0)
        options = dict(variant) if share is None else {**variant, "share": groups(share, spec)}
        check_component(built(entry, spec, **options))


def wrapped() -> list[Any]:
    """The other components that are built for a team, with every part that fits."""
    found = []
    for section in ("targets", "data", "update", "optimizer", "trainer"):
        for name, entry in components(section).items():
            required = [option.name for option in entry.options.values() if option.required]
            inner = [other for other in components("update").values() if not any(o.required for o in other.options.values())]
            for part in inner if required else [None]:
                if part is None or set(entry.contract.needs.get("step", ())) <= set(part.contract.traits):
                    found.append(pytest.param(entry, part, id=f"{section}-{name}" + (f"-{part.name}" if part else "")))
    return found


@pytest.mark.parametrize(("entry", "part"), wrapped())
def test_component_that_reads_no_keys_alone_keeps_its_contract(entry: Entry, part: Entry | None) -> None:
    for spec in spec_examples() if part is None else spec_examples()[::4]:
        torch.manual_seed(0)
        options = {} if part is None else {"step": built(part, spec)}
        check_component(built(entry, spec, **options))


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, id="-".join([name, *(f"{k}={v}" for k, v in variant.items())]))
        for name, entry in components("env").items()
        for variant in ([{}] if name in ENVIRONMENTS else variants(entry))
    ],
)
def test_environment_keeps_its_contract(name: str, variant: dict[str, Any]) -> None:
    if name in ENVIRONMENTS:
        pytest.importorskip("vmas")
    entry, options = components("env")[name], {"num_envs": 3, **ENVIRONMENTS.get(name, {}), **variant}
    check_environment(lambda runtime: load_class(entry)(runtime, **options), steps=9, resumable=name != "torchrl")


def test_an_environment_is_held_to_the_rules_of_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    env = MatrixGameEnvironment(Runtime(torch.device("cpu"), 0), num_envs=3)
    check_component(env)
    monkeypatch.setattr(MatrixGameEnvironment, "payoff", lambda self, action: torch.full((self.num_envs,), torch.nan))
    with pytest.raises(AssertionError, match="MatrixGameEnvironment"):
        check_component(env)


def test_every_kind_of_tensor_component_is_covered() -> None:
    covered = {type(built(case.values[0], spec_examples()[0])) for case in cases()}
    for cls in covered:
        assert issubclass(cls, (Actor, Critic, Opponents, Estimator))
    assert len(covered) == sum(len(components(section)) for section in TENSOR_KINDS)


def test_kinds_take_the_common_options_so_that_one_line_swaps_keep_all_options() -> None:
    for name, entry in components("critic").items():
        swapped_by_name = not any(option.required for option in entry.options.values())
        is_teams_own = "individual_global_max" in entry.contract.traits  # it mixes the agents' values; there is nothing to share
        common = {"hidden"} if is_teams_own else {"hidden", "share"}
        assert common <= set(entry.options) or not swapped_by_name, name
    for name, entry in components("optimizer").items():
        assert {"lr", "critic_lr", "lr_end"} <= set(entry.options), name


def test_fake_batch_has_the_documented_values() -> None:
    from marlkit.critics.centralised import CentralisedCritic

    spec = spec_examples()[0]
    critic = CentralisedCritic(spec, hidden=[8])
    batch = fake_batch(spec, [4], keys=critic.reads)
    assert critic(batch)["agents", "state_value"].shape == (4, 3, 1)


def test_every_public_constructor_takes_options_by_keyword_only() -> None:
    for section in (*TENSOR_KINDS, "env", "data", "update", "optimizer", "trainer"):
        for entry in components(section).values():
            parameters = list(inspect.signature(load_class(entry)).parameters.values())
            by_keyword = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
            assert {parameter.kind for parameter in parameters[1:]} <= by_keyword, entry.dotted
