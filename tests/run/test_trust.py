"""Opening a stranger's recipe or run runs none of its code; what the user trusts is run, and remembered."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import small

import marlkit
from marlkit import run
from marlkit.cli import main
from marlkit.errors import CheckpointError, MarlkitError, RecipeError, RunError, TrustError
from marlkit.recipe import Recipe, load_recipe
from marlkit.recipe.trust import foreign, require_trust, trusted_file
from marlkit.training.assembly import build, sizes
from marlkit.training.dry_run import dry_run

OLD_RUN = Path(__file__).parent / "old_runs" / "mappo"
PACKAGE = Path(marlkit.__file__).parent
MARK = "it_ran"

EVIL = """\
from pathlib import Path
Path({mark!r}).touch()
import torch
from marlkit.actors.stochastic import StochasticActor
from marlkit.contract import Contract
from marlkit.critics.centralised import CentralisedCritic
from marlkit.data.rollout import RolloutData
from marlkit.envs._adapter import WRITES
from marlkit.envs.torchrl import TorchrlEnvironment
from marlkit.estimators.gae import GaeEstimator
from marlkit.opponents.true_policy import TruePolicyOpponents
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.targets.online import OnlineTargets
from marlkit.trainers.lightning import LightningTrainer
from vmas.simulator.scenario import BaseScenario
class EvilActor(StochasticActor): ...
class EvilCritic(CentralisedCritic): ...
class EvilData(RolloutData): ...
class EvilEstimator(GaeEstimator): ...
class EvilOpponents(TruePolicyOpponents): ...
class EvilOptimizer(AdamOptimizer): ...
class EvilUpdate(PpoClipUpdate): ...
class EvilTargets(OnlineTargets): ...
class EvilTrainer(LightningTrainer): ...
class EvilEnvironment(TorchrlEnvironment):
    contract = Contract(writes=WRITES, traits=("continuous",))
class Network(torch.nn.Linear): ...
class Scenario(BaseScenario):
    def make_world(self, batch_dim, device, **kwargs): ...
def make(**options): ...
"""

TOUCH = {"command": f"touch {MARK}"}


def factory(path: str, **options: Any) -> dict[str, Any]:
    return {"type": "torchrl", "factory": path, "actions": "continuous", "num_envs": 4, "options": options}


def typed(section: str, name: str, **options: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one section's type; its options stay."""
    return lambda config: config[section].update(type=f"stranger.{name}", **options)


def module(section: str, **options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({section: {"type": "module", **options}})


def environment(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(env=options)


def trainer(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["trainer"].update(options)


def sequential(config: dict[str, Any]) -> None:
    step = {name: value for name, value in config["update"].items() if name not in ("type", "epochs")}
    config["actor"]["share"] = "none"
    config["env"]["reward"] = "mean"
    config["update"] = {"type": "sequential", "step": {**step, "type": "stranger.EvilUpdate"}}


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "system": (environment(**factory("os.system", **TOUCH)), "env.factory", "os.system"),
    "subprocess": (environment(**factory("subprocess.call", args=["touch", MARK])), "env.factory", "subprocess.call"),
    "exec": (environment(**factory("builtins.exec", source=f"open('{MARK}', 'w')")), "env.factory", "builtins.exec"),
    "import": (environment(**factory("importlib.import_module", name="stranger")), "env.factory", "importlib.import_module"),
    "unpickle": (environment(**factory("torch.load", f="x", weights_only=False)), "env.factory", "torch.load"),
    "own factory": (environment(**factory("stranger.make")), "env.factory", "stranger.make"),
    "gym module": (environment(**factory("torchrl.envs.GymEnv", env_name="stranger:E-v0")), "env.factory", "torchrl.envs.GymEnv"),
    "gym in gym": (
        environment(**factory("torchrl.envs.GymEnv", env_name="GymV21Environment-v0", env_id="stranger:E-v0")),
        "env.factory", "torchrl.envs.GymEnv",
    ),
    "vmas file": (environment(**factory("torchrl.envs.VmasEnv", scenario="../stranger")), "env.factory", "torchrl.envs.VmasEnv"),
    "scenario": (
        environment(type="vmas", scenario="stranger.Scenario", num_envs=2, max_steps=4), "env.scenario", "stranger.Scenario"
    ),
    "environment": (
        environment(**{**factory("os.system", **TOUCH), "type": "stranger.EvilEnvironment"}), "env.factory", "os.system"
    ),
    "actor": (typed("actor", "EvilActor"), "actor.type", "stranger.EvilActor"),
    "critic": (typed("critic", "EvilCritic"), "critic.type", "stranger.EvilCritic"),
    "opponents": (typed("opponents", "EvilOpponents"), "opponents.type", "stranger.EvilOpponents"),
    "targets": (typed("targets", "EvilTargets"), "targets.type", "stranger.EvilTargets"),
    "data": (typed("data", "EvilData"), "data.type", "stranger.EvilData"),
    "estimator": (typed("estimator", "EvilEstimator"), "estimator.type", "stranger.EvilEstimator"),
    "update": (typed("update", "EvilUpdate"), "update.type", "stranger.EvilUpdate"),
    "step of an update": (sequential, "update.step.type", "stranger.EvilUpdate"),
    "optimizer": (typed("optimizer", "EvilOptimizer"), "optimizer.type", "stranger.EvilOptimizer"),
    "trainer": (typed("trainer", "EvilTrainer"), "trainer.type", "stranger.EvilTrainer"),
    "critic's network": (module("critic", network="stranger.Network"), "critic.network", "stranger.Network"),
    "actor's network": (module("actor", network="stranger.Network"), "actor.network", "stranger.Network"),
    "argument of a network": (
        module("critic", network="torchrl.modules.MLP", network_options={"activation_class": {"path": "stranger.Network"}}),
        "critic.network_options", "stranger.Network",
    ),
    "language model": (module("critic", network="torchrl.modules.llm.Wrapper"), "critic.network", "torchrl.modules.llm.Wrapper"),
    "logger": (
        trainer(logger="mlflow", logger_options={"tracking_uri": "http://stranger"}), "trainer.logger", "http://stranger"
    ),
    "environment variable": (
        trainer(logger="wandb", logger_options={"project": "${oc.env:HOME}"}), "trainer.logger_options.project", "`HOME`"
    ),
}  # fmt: skip
"""Each: what it changes in the recipe of a run, and what of that has to be listed."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has trusted nothing yet, in a folder of his own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def stranger(folder: Path, change: Callable[[dict[str, Any]], None], *, beside: Path | None = None) -> Path:
    """A run whose recipe, checkpoints and noted folders are a stranger's; his module lies in it, or in ``beside``."""
    shutil.copytree(OLD_RUN, folder)
    config = yaml.safe_load((folder / "recipe.yaml").read_text())
    change(config)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    beside = beside or folder
    beside.mkdir(exist_ok=True, parents=True)
    (beside / "stranger.py").write_text(EVIL.format(mark=str(Path.cwd() / MARK)))
    noted = json.loads((folder / "versions.json").read_text()) | {"component_folders": [str(beside)]}
    (folder / "versions.json").write_text(json.dumps(noted))
    text = run.run_recipe(folder).to_yaml()
    for path in (folder / "checkpoints").glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        saved["marlkit"]["recipe"] = text
        torch.save(saved, path)
    return folder


def nothing_ran() -> bool:
    return not Path(MARK).exists() and "stranger" not in sys.modules


COMMANDS = [
    ["check", "{recipe}"], ["check", "--run", "{recipe}"], ["show", "{recipe}"], ["show", "--no-sizes", "{recipe}"],
    ["show", "--mermaid", "{recipe}"], ["train", "{recipe}", "--no-progress"], ["evaluate", "{run}"], ["play", "{run}"],
    ["resume", "{run}", "--no-progress"], ["list", "critic.stranger.EvilCritic"],
]  # fmt: skip
READING = {"check", "show", "show --no-sizes", "show --mermaid", "list"}
"""Commands that build nothing without trust, and so have nothing to refuse."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_command_runs_a_strangers_code(attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, where, what = ATTACKS[attack]
    folder = stranger(tmp_path / "run", change)
    path = list(sys.path)
    for command in COMMANDS:
        words = [word.format(recipe=folder / "recipe.yaml", run=folder) for word in command]
        code = main(words)
        said = " ".join(capsys.readouterr().err.split())
        assert nothing_ran(), words
        assert sys.path == path, words
        name = " ".join(word for word in command if not word.startswith("{"))
        if command[0] == "list":
            continue
        if name in READING:
            assert code == 0, said
        elif command[0] not in ("evaluate", "play") or where.startswith(("env", "actor")):
            assert code == 2
            assert f" {where}: " in said
            assert what in said
            assert f"{folder / 'recipe.yaml'}:" in said
            assert "--trust" in said
            assert "Traceback" not in said
    assert trusted_file() is not None
    assert not trusted_file().exists(), "nothing was trusted"  # type: ignore[union-attr]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_function_runs_a_strangers_code(attack: str, tmp_path: Path) -> None:
    change, where, _ = ATTACKS[attack]
    folder = stranger(tmp_path / "run", change)
    recipe = load_recipe(folder / "recipe.yaml")
    uses: list[Callable[[], Any]] = [
        lambda: marlkit.train(folder / "recipe.yaml", progress=False),
        lambda: marlkit.train(recipe, progress=False),
        lambda: run.train(recipe, progress=False),
        lambda: marlkit.resume(folder, progress=False),
        lambda: require_trust(run.run_recipe(folder)),
        lambda: dry_run(recipe),
        lambda: build(recipe, where.partition(".")[0], None),
        lambda: sizes(recipe) if where.partition(".")[0] != "trainer" else require_trust(recipe),
    ]
    if where.startswith(("env", "actor")):
        uses += [lambda: run.evaluate(folder), lambda: run.play(folder)]
    if where.startswith("actor"):
        uses += [lambda: marlkit.load_policy(folder)]
    for number, use in enumerate(uses):
        with pytest.raises(TrustError, match="--trust"):
            use()
        assert nothing_ran(), number
    if not where.startswith("actor"):
        with contextlib.suppress(CheckpointError):  # an actor that was changed with the update
            marlkit.load_policy(folder)  # builds the actor alone
        assert nothing_ran()


def test_everything_is_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(config: dict[str, Any]) -> None:
        for attack in ("system", "critic", "step of an update", "environment variable"):
            ATTACKS[attack][0](config)

    folder = stranger(tmp_path / "run", change)
    assert main(["resume", str(folder)]) == 2
    said = capsys.readouterr().err
    listed = [line for line in said.splitlines() if line.startswith("    ")]
    assert len(listed) == 4
    assert "calls `os.system`" in listed[0]
    assert f'"touch {MARK}"' in listed[0]
    assert f"imports `stranger.EvilCritic` ({folder / 'stranger.py'})" in listed[1]
    assert "update.step.type: imports `stranger.EvilUpdate`" in listed[2]
    assert "reads the environment variable `HOME`" in listed[3]


# --- where the code is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noted", ["{beside}", "../../beside", "{link}", "{beside}/../beside"])
def test_noted_folders_are_no_search_path(noted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside, link = tmp_path / "beside", tmp_path / "link"
    folder = stranger(tmp_path / "a" / "run", ATTACKS["critic"][0], beside=beside)
    link.symlink_to(beside)
    versions = {"component_folders": [noted.format(beside=beside, link=link)]}
    (folder / "versions.json").write_text(json.dumps(versions))
    before = list(sys.path)
    assert main(["resume", str(folder), "--no-progress"]) == 2
    capsys.readouterr()
    assert sys.path == before
    assert nothing_ran()


def test_modules_in_a_run_shadow_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, evil = tmp_path / "run", EVIL.format(mark=str(Path.cwd() / MARK))
    mark = Path(MARK).absolute()
    shutil.copytree(OLD_RUN, folder)
    for name in ("torch", "marlkit", "sitecustomize", "conftest", "wandb", "json", "stranger"):
        (folder / name).mkdir()
        (folder / f"{name}.py").write_text(evil)
        (folder / name / "__init__.py").write_text(evil)
    noted = json.loads((folder / "versions.json").read_text()) | {"component_folders": [str(folder)]}
    (folder / "versions.json").write_text(json.dumps(noted))
    monkeypatch.chdir(folder)
    before = list(sys.path)
    for command in (["evaluate", "."], ["resume", ".", "--no-progress"], ["check", "--run", "recipe.yaml"]):
        assert main(command) == 0
    marlkit.load_policy(".")
    assert sys.path == before, "a run of marlkit's own components adds no folder"
    assert not mark.exists()


def test_only_the_folder_of_a_trusted_module_is_searched(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "run", ATTACKS["critic"][0])
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.move(folder / "stranger.py", mine / "stranger.py")
    (folder / "versions.json").write_text(json.dumps({"component_folders": [str(mine), str(folder)]}))
    require_trust(run.run_recipe(folder, trust=True))
    assert str(mine) in sys.path
    assert not {str(folder), str(Path.cwd())} & set(sys.path)


def test_a_chain_of_recipes_ends_in_a_strangers_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stranger(tmp_path / "run", ATTACKS["critic"][0])
    Path("mine.yaml").write_text(f"extends: {folder / 'recipe.yaml'}\nseed: 4\n")
    assert main(["check", "mine.yaml", "--run"]) == 2
    assert f"{folder / 'recipe.yaml'}:" in capsys.readouterr().err
    assert nothing_ran()


# --- trust ----------------------------------------------------------------------------------------------------------------


def trust_critic(folder: Path) -> Recipe:
    """A stranger's run with a critic of his own, trusted for its dry run."""
    recipe = run.run_recipe(stranger(folder, ATTACKS["critic"][0]), trust=True)
    dry_run(recipe)
    return recipe


def test_what_is_trusted_is_run_and_remembered(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "run"
    trust_critic(folder)
    assert Path(MARK).exists()
    kept = home / "marlkit" / "trusted.jsonl"
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [
        {"runs": "stranger.EvilCritic", "file": str(folder / "stranger.py")}
    ]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert main(["resume", str(folder), "--no-progress"]) == 0, "not asked again"
    assert len(kept.read_text().splitlines()) == 1


def test_trust_ends_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_critic(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run", elsewhere)
    (elsewhere / "versions.json").write_text("{}")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path / "run")])
    with pytest.raises(TrustError, match=str(elsewhere / "stranger.py")):
        marlkit.resume(elsewhere)


def test_trust_of_another_user_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_critic(tmp_path / "run")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    with pytest.raises(TrustError):
        marlkit.resume(tmp_path / "run")


def test_a_function_of_a_library_is_trusted_with_its_arguments_alone(tmp_path: Path) -> None:
    env = yaml.safe_dump(factory("os.getenv", key="A"), default_flow_style=True, width=999).strip()
    recipe = load_recipe("mappo", [f"env={env}", "update.minibatch_size=40"])
    require_trust(recipe)  # typed
    text = recipe.to_yaml()
    (tmp_path / "same.yaml").write_text(text)
    require_trust(load_recipe(tmp_path / "same.yaml"))
    (tmp_path / "other.yaml").write_text(text.replace("key: A", "key: B"))
    with pytest.raises(TrustError, match='"key": "B"'):
        require_trust(load_recipe(tmp_path / "other.yaml"))


def test_what_the_user_types_needs_no_flag_and_neither_does_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(EVIL.format(mark=str(Path.cwd() / MARK)).replace("Evil", "My"))
    wanted = small("mappo", "critic=mine.MyCritic", "trainer.iterations=1")
    assert main(["train", "mappo", *wanted, "--root", "runs", "--no-progress"]) == 0
    (folder,) = Path("runs/mappo").iterdir()
    assert main(["evaluate", str(folder)]) == 0, capsys.readouterr().err
    marlkit.load_policy(folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("mine.MyCritic", "mine.EvilCritic"))
    assert main(["resume", str(folder)]) == 2, "it was changed"


def test_an_override_speaks_for_itself_alone(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "run", ATTACKS["critic"][0])
    with pytest.raises(TrustError):
        require_trust(load_recipe(folder / "recipe.yaml", ["critic.value_norm=false", "seed=3"]))
    part = stranger(tmp_path / "part", ATTACKS["argument of a network"][0]) / "recipe.yaml"
    with pytest.raises(TrustError, match=r"recipe.yaml:.*stranger.Network"):
        require_trust(load_recipe(part, ["critic.network_options.num_cells=[8]"]))
    renamed = "override `seed=3`"
    shutil.copy(folder / "recipe.yaml", renamed)
    shutil.copy(folder / "stranger.py", "stranger.py")
    with pytest.raises(TrustError):
        require_trust(load_recipe(renamed, ["seed=3"]))


@pytest.mark.parametrize("place", ["/dev/null", "/proc/marlkit"])
def test_a_configuration_folder_that_cannot_be_written(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", place)
    folder = stranger(tmp_path / "run", ATTACKS["critic"][0])
    with pytest.warns(UserWarning, match="cannot be remembered"):
        require_trust(run.run_recipe(folder, trust=True))
    with pytest.raises(TrustError):
        require_trust(run.run_recipe(folder))


SUITES = [
    factory("torchrl.envs.VmasEnv", scenario="balance", n_agents=3, device="cpu"),
    factory("torchrl.envs.libs.vmas.VmasEnv", scenario="mpe/simple_spread"),
    factory("torchrl.envs.GymEnv", env_name="CartPole-v1", categorical_action_encoding=True),
    factory("torchrl.envs.PettingZooEnv", task="mpe/simple_spread_v3", parallel=True, group_map={"all": ["a_0"]}),
]


@pytest.mark.parametrize("env", SUITES, ids=lambda env: env["factory"])
def test_installed_suites_need_no_trust(env: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text(yaml.safe_dump({"extends": "mappo", "env": env, "update": {"minibatch_size": 40}}))
    assert foreign(load_recipe(tmp_path / "team.yaml")) == []


def test_modules_of_torch_and_names_of_a_run_need_no_trust(tmp_path: Path) -> None:
    network = {"type": "module", "network": "torchrl.modules.MultiAgentMLP",
               "network_options": {"activation_class": {"path": "torch.nn.ReLU"}}}  # fmt: skip
    trainer = {"logger": "wandb", "logger_options": {"project": "a", "name": "b"}}
    (tmp_path / "team.yaml").write_text(yaml.safe_dump({"extends": "mappo", "critic": network, "trainer": trainer}))
    assert foreign(load_recipe(tmp_path / "team.yaml")) == []


# --- links ----------------------------------------------------------------------------------------------------------------

LINKS = ["checkpoints/last.ckpt", "checkpoints/.last.ckpt.partial", "metrics.csv", "team.gif", "curve.png", "tensorboard", "new"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("dangling", [True, False])
def test_links_out_of_a_run_are_not_written_through(
    name: str, dangling: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = tmp_path / "run", tmp_path / "bashrc"
    shutil.copytree(OLD_RUN, folder)
    if not dangling:
        target.write_text("mine")
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    for command in (["resume", str(folder)], ["play", str(folder)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"{link}: is a link to {target}" in said
        assert target.exists() is not dangling
    with pytest.raises(RunError):
        marlkit.resume(folder)


def test_a_run_behind_a_link_and_links_within_it_are_fine(tmp_path: Path) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    (tmp_path / "run" / "newest").symlink_to("checkpoints")
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    run.resume(tmp_path / "latest", progress=False)


# --- environment variables ------------------------------------------------------------------------------------------------


SECRET = "hunter2-and-more"
SEEN: list[str] = []


def make(token: str, num_envs: int) -> Any:
    from torchrl.envs import VmasEnv

    SEEN.append(token)
    return VmasEnv("balance", num_envs=num_envs, n_agents=2)


def test_a_variable_is_read_in_memory_and_stored_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLKIT_TEST_SECRET", SECRET)
    SEEN.clear()
    env = f"{{type: torchrl, factory: {__name__}.make, actions: continuous, max_steps: 4, num_envs: 2}}"
    settings = ["env.options.token=t-${oc.env:MARLKIT_TEST_SECRET}", "trainer.iterations=1", "data.steps=6"]
    recipe = load_recipe("mappo", [f"env={env}", *settings, *small("mappo")[2:]])
    folder = run.train(recipe, tmp_path, progress=False)
    assert set(SEEN) == {f"t-{SECRET}"}
    assert "token: t-${oc.env:MARLKIT_TEST_SECRET}" in (folder / "recipe.yaml").read_text()
    assert run.run_recipe(folder).to_yaml() == recipe.to_yaml()
    for file in folder.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file
    run.evaluate(folder)
    monkeypatch.delenv("MARLKIT_TEST_SECRET")
    marlkit.load_policy(folder)  # needs no environment
    with pytest.raises(RecipeError, match=r"env.options.token: cannot be read: .*MARLKIT_TEST_SECRET"):
        run.evaluate(folder)


def test_an_error_of_a_component_does_not_tell_the_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLKIT_TEST_SECRET", SECRET)
    env = f"env={{type: torchrl, factory: {__name__}.make, actions: continuous, options: {{token: a}}}}"
    wrong = "env.options.wrong=${oc.env:MARLKIT_TEST_SECRET}"
    with pytest.raises(MarlkitError) as caught:
        dry_run(load_recipe("mappo", [env, wrong]))
    assert "'wrong': '${oc.env:MARLKIT_TEST_SECRET}'" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_the_configuration_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert trusted_file() == Path.home() / ".config" / "marlkit" / "trusted.jsonl"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert trusted_file() == Path.home() / ".config" / "marlkit" / "trusted.jsonl", "a relative one is ignored"
    assert os.path.isabs(str(trusted_file()))
