"""Mistakes in components of one's own that the dry run names before anything is trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from meeting import MEETING, replaced

from marlkit.errors import MarlkitError
from marlkit.recipe import load_recipe
from marlkit.training.dry_run import dry_run

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["env.num_envs=4", "env.max_steps=8", "data.steps=8", "update.minibatch_size=16"]


def documented(page: str, name: str) -> str:
    """A component that the documents show in full."""
    (code,) = re.findall(rf"```python\n# {name}\.py\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return str(code)


COMPONENTS = {
    "critic": (documented("CONTRIBUTING.md", "my_critic"), "DistanceCritic"),
    "estimator": (documented("docs/components.md", "my_estimator"), "ReturnEstimator"),
    "update": (documented("docs/components.md", "my_update"), "PlainUpdate"),
    "actor": (documented("docs/components.md", "my_actor"), "LinearActor"),
    "env": (MEETING, "MeetingEnvironment"),
}

POINT = "nn.Parameter(torch.zeros(spec.observation))"
SEEN = "-self.scale * (batch[keys.OBSERVATION]"
LOSS = "policy + self.value_coef * value"
RETURN = "return norms | {"
WRITES = "return self.write_choice("
MISTAKES = {
    "a tensor that is no parameter": (
        "critic",
        [(POINT, "torch.zeros(spec.observation, requires_grad=True)")],
        "critic (DistanceCritic) keeps the tensor `centre`, which has a gradient, .* use `self.centre = nn.Parameter",
    ),
    "layers in a list": (
        "critic",
        [(f"self.centre = {POINT}", "self.layers = [nn.Linear(spec.observation, 1)]"),
         (SEEN, "self.layers[0](batch[keys.OBSERVATION]"),
         (" - self.centre).norm(dim=-1, keepdim=True)", ")")],
        "critic (DistanceCritic) keeps the tensor `layers`, .* use `nn.ModuleList`",
    ),
    "a critic that writes to what it reads": (
        "critic",
        [(SEEN, SEEN + ".clamp_(-0.01, 0.01)")],
        "critic (DistanceCritic) changed `agents.observation`, which it only reads: work on a copy",
    ),
    "an estimator that writes to what it reads": (
        "estimator",
        [("        returns = []\n", "        returns = []\n        value.add_(1)\n")],
        "estimator (ReturnEstimator) changed `agents.state_value`, which it only reads: work on a copy",
    ),
    "an update without metrics": (
        "update", [(RETURN, "{")], "update (PlainUpdate) returns NoneType from `update`: return a dictionary of metrics",
    ),
    "a number as metric": (
        "update", [("policy.detach()", "policy.item()")], "returns a float as metric `actor/loss`: return a",
    ),
    "a metric of several numbers": (
        "update", [("value.detach()", "target.detach()")], "returns a tensor .* as metric `critic/loss`: return a",
    ),
    "a metric with its gradient": (
        "update", [("policy.detach()", "policy")], "returns metric `actor/loss` with its gradient, .* return it detached",
    ),
    "a loss that is not finite": (
        "update",
        [(LOSS, f"({LOSS}) + (0 * policy).log()")],
        "update (PlainUpdate) hands a loss of .* to `learning.minimise`. Usual causes: a division by zero",
    ),
    "an actor that draws when it should not": (
        "actor",
        [("policy.mode() if deterministic else policy.sample()", "policy.sample()")],
        "actor (LinearActor) draws its actions although `deterministic` .* take the `mode()` of its distribution",
    ),
    "a gradient without a step": (
        "update",
        [(f"norms = learning.minimise({LOSS}, max_grad_norm=10.0)", f"norms = ({LOSS}).backward() or {{}}")],
        "update (PlainUpdate) computes gradients of actor .* and takes no step: hand the loss to `learning.minimise`",
    ),
    "an actor that returns nothing": (
        "actor", [(WRITES, "self.write_choice(")], "actor (LinearActor) returns nothing from `forward`: return the batch",
    ),
    "a component without spec": (
        "critic", [("        self.spec = spec\n", "")], "`DistanceCritic` does not keep the team spec .* Set `self.spec = spec`",
    ),
    "an environment without the number of environments": (
        "env", [("        self.num_envs = num_envs\n", ""), ("torch.zeros(num_envs, n", "torch.zeros(num_envs, n")],
        "env (MeetingEnvironment) has no `num_envs` but None.* set `self.num_envs` in the constructor",
    ),
    "an environment without device": (
        "env", [("        self.device = runtime.device\n", ""), ("self.device)\n", "runtime.device)\n")],
        "env (MeetingEnvironment) has no `device` but None.* set `self.device` in the constructor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_what_to_do(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section, changes, says = MISTAKES[mistake]
    code, name = COMPONENTS[section]
    _refused(section, replaced(code, *changes), name, says, tmp_path, monkeypatch, str(list(MISTAKES).index(mistake)))


def test_an_environment_without_the_option_num_envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = replaced(
        MEETING,
        ("num_envs: PositiveInt = 64, n_agents", "n_agents"),
        ("self.num_envs = num_envs", "self.num_envs = num_envs = 4"),
    )
    says = "`MeetingEnvironment` takes no `num_envs`. Give its constructor this option"
    _refused("env", code, "MeetingEnvironment", says, tmp_path, monkeypatch, "option")


@pytest.mark.parametrize("section", COMPONENTS)
def test_the_documented_components_pass(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, name = COMPONENTS[section]
    dry_run(load_recipe("mappo", _overrides(section, code, name, tmp_path, monkeypatch, "right")))


def _overrides(section: str, code: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> list[str]:
    module = f"newcomers_{section}_{number}"  # Python imports a module once
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    unknown = {"update": ("update.",), "env": ()}
    small = [word for word in SMALL if not word.startswith(unknown.get(section, ()))]
    if "num_envs: PositiveInt" not in code and section == "env":
        small = [word for word in small if "num_envs" not in word]
    return [f"{section}={module}.{name}", *small]


def _refused(section: str, code: str, name: str, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    with pytest.raises(MarlkitError, match=says.replace("(", r"\(").replace(")", r"\)")):
        dry_run(load_recipe("mappo", _overrides(section, code, name, folder, monkeypatch, number)))
