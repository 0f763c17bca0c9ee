"""A recipe names any network of torch, tensordict or TorchRL as critic or as policy."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import KilledError, killed_at, same, small, states
from torch import nn
from torchrl.modules import MultiAgentMLP

from marlkit import keys, run
from marlkit.actors.module import ModuleActor
from marlkit.cli import main
from marlkit.critics.module import ModuleCritic
from marlkit.errors import OptionError
from marlkit.recipe import load_recipe
from marlkit.run.metrics_file import read_metrics
from marlkit.spec import TeamSpec
from marlkit.targets.soft import SoftTargets
from marlkit.testing import check_component, fake_batch, spec_examples

NETWORK = "torchrl.modules.MultiAgentMLP"
OPTIONS: dict[str, Any] = {
    "n_agent_inputs": "O", "n_agent_outputs": "F", "n_agents": "N", "centralized": True, "share_params": True, "depth": 2,
    "num_cells": 4, "activation_class": {"path": "torch.nn.ReLU"},
}  # fmt: skip
SPEC = spec_examples()[0]
EVERY_SPEC = pytest.mark.parametrize("spec", spec_examples(), ids=lambda spec: f"{spec.n_agents}x{type(spec.action).__name__}")


def critic(spec: TeamSpec = SPEC, network: str = NETWORK, view: Any = "own", **changes: Any) -> ModuleCritic:
    torch.manual_seed(0)
    options = OPTIONS | changes if network == NETWORK else changes
    return ModuleCritic(spec, network=network, network_options=options, view=view, value_norm=False)


def actor(spec: TeamSpec = SPEC, network: str = NETWORK, centralised: bool = True, **changes: Any) -> ModuleActor:
    torch.manual_seed(0)
    options = OPTIONS | changes if network == NETWORK else changes
    return ModuleActor(spec, network=network, network_options=options, centralised=centralised)


# --- what they compute -----------------------------------------------------------------------------------------------------


@EVERY_SPEC
@pytest.mark.parametrize("share", [True, False])
def test_torchrls_network_of_a_team_values_and_plays(spec: TeamSpec, share: bool) -> None:
    for component in (critic(spec, share_params=share), actor(spec, share_params=share)):
        check_component(component)
    check_component(critic(spec, view="state", n_agent_inputs="S", share_params=share))
    check_component(actor(spec, centralised=False, centralized=False, share_params=share))


def test_the_prediction_is_the_networks_own() -> None:
    torch.manual_seed(0)
    sizes = {"n_agent_inputs": SPEC.observation, "n_agent_outputs": 1, "n_agents": SPEC.n_agents}
    expected = MultiAgentMLP(**OPTIONS | sizes | {"activation_class": nn.ReLU})
    batch = fake_batch(SPEC, [2, 3], [keys.OBSERVATION])
    assert torch.equal(critic().predict(batch), expected(batch[keys.OBSERVATION]))


def test_the_outputs_are_logits_of_available_actions_or_means_in_half_ranges() -> None:
    discrete, continuous = spec_examples()[0], spec_examples()[4]
    batch = fake_batch(discrete, [2], actor(discrete).reads)
    logits = actor(discrete).network(batch).masked_fill(~batch[keys.ACTION_MASK], -torch.inf)
    torch.testing.assert_close(actor(discrete)(batch)[keys.LOGITS].exp(), logits.softmax(-1))
    chooser = actor(continuous)
    batch = fake_batch(continuous, [2], chooser.reads)
    chosen = chooser(batch)
    torch.testing.assert_close(chosen[keys.LOC], chooser.range.middle + chooser.range.half_range * chooser.network(batch))
    torch.testing.assert_close(chosen[keys.SCALE], chooser.range.half_range.expand_as(chosen[keys.SCALE]))
    some = chooser.distribution(batch, [2, 0])
    torch.testing.assert_close(some.parameters()[keys.LOC], chosen[keys.LOC][:, [2, 0]])


def test_modules_of_torch_and_of_tensordict_need_no_wrapper() -> None:
    check_component(critic(network="torch.nn.Linear", in_features="O", out_features="F"))
    check_component(critic(network="example_networks.ReadsKeys", inputs="O", outputs="F"))
    check_component(critic(network="example_networks.ValueOfState", view="state", state="S", n="N"))
    check_component(actor(network="example_networks.ReadsKeys", centralised=False, inputs="O", outputs="F"))
    check_component(
        actor(network="torchrl.modules.MLP", centralised=False, in_features="O", out_features="F", num_cells=[4, "N"])
    )


def test_trying_a_network_out_leaves_its_statistics_and_mode_alone() -> None:
    built = critic(network="example_networks.CountsRows", inputs="O", outputs="F")
    assert built.network.module.rows == 0
    assert built.training
    assert built.network.module.training


def test_targets_follow_networks_that_keep_their_parameters_in_a_tensordict() -> None:
    online, batch = critic(share_params=False), fake_batch(SPEC, [2], [keys.OBSERVATION])
    targets = SoftTargets(SPEC, tau=0.5)
    targets.track(actor(), online)
    before = copy.deepcopy(targets.critic())
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1)
    assert torch.equal(targets.critic().predict(batch), before.predict(batch))
    targets.follow(["critic"])
    for now, then, own in zip(targets.critic().parameters(), before.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(now, (then + own) / 2)
    assert not torch.equal(targets.critic().predict(batch), before.predict(batch))


# --- what they refuse ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a path of one word": ({"network": "Linear"}, "network", "must be a dotted path"),
    "no such module": ({"network": "no_such_package.Network"}, "network", "No module named 'no_such_package'"),
    "no such name": ({"network": "torch.nn.Lienar"}, "network", "has no attribute 'Lienar'"),
    "a function": ({"network": "example_networks.make_linear"}, "network", "must be a class that extends torch.nn.Module"),
    "another class": ({"network": "subprocess.Popen"}, "network", "must be a class that extends torch.nn.Module"),
    "an unknown argument": ({"width": 3}, "network_options", "unexpected keyword argument 'width'"),
    "a value that its constructor refuses": ({"num_cells": "many"}, "network_options", "cannot be built"),
    "a class inside that is none": ({"activation_class": {"path": "torch.nn.Tangent"}}, "network_options", "Tangent"),
    "a class inside of another kind": ({"activation_class": {"path": "os.system"}}, "network_options", "extends torch.nn.Module"),
    "inputs of another size": ({"n_agent_inputs": "S"}, "network_options", "cannot be evaluated on a batch of zeros"),
    "outputs of another size": ({"n_agent_outputs": "O"}, "network_options", r"must give \[rows, N, F\]"),
    "a key that it may not read": (
        {"network": "example_networks.ReadsKeys", "inputs": "S", "outputs": "F", "key": "state"},
        "network_options",
        "reads `state`, but here a network may read `agents.observation` only",
    ),
    "two results": (
        {"network": "example_networks.ReadsKeys", "inputs": "O", "outputs": "F", "extra": True},
        "network_options",
        "must write one key, which is the result; it writes `result`, `more`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_when_it_is_built(name: str) -> None:
    changes, option, message = REFUSED[name]
    with pytest.raises(OptionError, match=message) as refused:
        critic(**changes)
    assert refused.value.option == option


def test_a_policy_that_mixes_agents_has_to_say_so() -> None:
    with pytest.raises(OptionError, match="depends on what other agents observe") as refused:
        actor(centralised=False)
    assert refused.value.option == "centralised"
    assert "centralised_execution" in actor().traits
    assert "centralised_execution" not in actor(centralised=False, centralized=False).traits


def test_a_refusal_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "team.yaml"
    lines = ["extends: mappo", "critic:", "  type: module", f"  network: {NETWORK}", "  network_options: {n_agent_inputs: O}"]
    file.write_text("\n".join(lines) + "\n")
    assert main(["check", str(file)]) == 0, "nothing of it can be known without importing it"
    assert main(["train", str(file), "--root", str(tmp_path / "runs"), "--no-progress"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "team.yaml:5: critic.network_options" in said
    assert "missing 2 required positional arguments" in said
    assert not (tmp_path / "runs").exists()


def test_a_check_imports_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "users_network.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert main(["check", "mappo", "critic={type: module, network: users_network.Network}"]) == 0
    assert main(["check", "mappo", "critic={type: module, network: users_network.Network.}"]) == 2
    assert "critic.network: must be a dotted path of the form package.module.Name" in " ".join(capsys.readouterr().err.split())
    assert "users_network" not in sys.modules


# --- in a run --------------------------------------------------------------------------------------------------------------

WITHOUT_PATHS = "n_agent_inputs: O, n_agent_outputs: F, n_agents: N, share_params: true, depth: 2, num_cells: 8"
IN_A_RECIPE = {
    "critic": f"critic={{type: module, network: {NETWORK}, network_options: {{{WITHOUT_PATHS}, centralized: true}}}}",
    "actor": f"actor={{type: module, network: {NETWORK}, network_options: {{{WITHOUT_PATHS}, centralized: false}}}}",
}


@pytest.mark.parametrize("section", IN_A_RECIPE)
def test_trained_and_resumed_by_command(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [text for text in small("mappo", "trainer.iterations=2") if not text.startswith(f"{section}.")]
    overrides = [*others, IN_A_RECIPE[section]]
    assert main(["train", "mappo", *overrides, "--root", str(tmp_path / "whole"), "--no-progress"]) == 0
    with monkeypatch.context() as patch:
        killed_at(1, patch)
        with pytest.raises(KilledError):
            run.train(load_recipe("mappo", overrides), tmp_path / "cut", progress=False)
    (whole,), (cut,) = ((tmp_path / name / "mappo").iterdir() for name in ("whole", "cut"))
    assert main(["resume", str(cut), "--no-progress"]) == 0
    for part in ("state_dict", "optimizer_states", "marlkit"):
        assert same(states(cut)[part], states(whole)[part]), part
    metrics = read_metrics(whole / "metrics.csv")
    assert metrics["iteration"] == [0, 1]
    assert all(value > 0 for value in metrics[f"{section}/grad_norm"])
    assert main(["evaluate", str(whole)]) == 0


def test_steps_of_such_networks_are_recorded(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    others = [text for text in small("mappo", "trainer.compile=record") if not text.startswith("critic.")]
    run.train(load_recipe("mappo", [*others, IN_A_RECIPE["critic"]]), tmp_path, progress=False)
    assert not [warning for warning in recwarn if "is not recorded" in str(warning.message)]


@pytest.mark.parametrize("what", ["critic.module", "actor.module"])
def test_listed_with_its_options(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    said = capsys.readouterr().out
    for part in (
        "network ",
        "required",
        "package.module.Name",
        "network_options",
        "n_agent_inputs: O",
        "torchrl.modules.MultiAgentMLP",
    ):
        assert part in said
