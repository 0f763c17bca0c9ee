"""Mistakes that only a run detects give a clear error too: exit code 2, what is wrong and where, and no files left behind."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from marlkit import run
from marlkit.cli import main
from marlkit.errors import RecipeError, RunError
from marlkit.recipe import load_recipe
from marlkit.run.checkpoints import BEST, LAST
from marlkit.training.dry_run import MOST_GRADIENTS, dry_run

MAPPO = """\
env:
  type: vmas
  scenario: balance
  num_envs: 4
  max_steps: 5
  scenario_options: {n_agents: 3}
actor:
  type: stochastic
  hidden: [4]
  share: all
critic:
  type: centralised
  hidden: [4]
data: {type: rollout, steps: 10}
estimator: gae
update: {type: ppo_clip, epochs: 1}
trainer: {type: lightning, iterations: 1, video: false, evaluation_episodes: 2}
"""


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error output of the command line: one message, no traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def refused_recipe(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The same for training a recipe; no run folder is left behind."""
    file = tmp_path / "team.yaml"
    file.write_text(text)
    said = refused(["train", str(file), *overrides, "--root", str(tmp_path / "runs"), "--no-progress"], capsys)
    assert not (tmp_path / "runs").exists()
    return said


# --- recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "part", "says"),
    [
        ("n_agents: 3", "n_agents: 1", "n_agents: 1", ["env.scenario_options", "VMAS refuses", "assert self.n_agents > 1"]),
        ("share: all", "share: [[0, 1]]", "share:", ["actor.share", "each of the 3 agents (0 to 2) once, got [[0, 1]]"]),
        ("share: all", "share: [[0, 1], [1, 2]]", "share:", ["actor.share", "each of the 3 agents"]),
        ("share: all", "share: [[0, 1], [2, 3]]", "share:", ["actor.share", "each of the 3 agents"]),
        (
            "share: all",
            "body: gru\n  sequence_length: 4",
            "sequence_length:",
            ["actor.sequence_length", "must divide the 10 steps of a rollout, got 4"],
        ),
        ("iterations: 1", "iterations: 1, accelerator: cuda, device: 99", "trainer:", ["trainer.accelerator", "GPU 99 is not"]),
    ],
)
def test_options_that_do_not_fit_the_team_or_the_machine(
    old: str, new: str, part: str, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = MAPPO.replace(old, new)
    said = " ".join(refused_recipe(text, tmp_path, capsys).split())
    assert f"{tmp_path / 'team.yaml'}:{line_of(text, part)}: " in said
    for wanted in says:
        assert wanted in said


@pytest.mark.parametrize(
    ("option", "value", "most"),
    [
        ("trainer.threads", 100_000, 1024),
        ("trainer.devices", 100_000, 1024),
        ("trainer.nodes", 100_000, 1024),
        ("update.epochs", 10**12, 10_000),
        ("actor.hidden", "[1000000000]", 16_384),
        ("critic.hidden", "[64, 1000000000]", 16_384),
        ("env.scenario_options.n_agents", 100_000, 1000),
    ],
)
def test_sizes_that_no_machine_has(
    option: str, value: Any, most: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused_recipe(MAPPO, tmp_path, capsys, f"{option}={value}")
    assert f"{option}: " in said
    assert f"must be at most {most}" in " ".join(said.split())


def test_networks_and_evaluations_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlkit.training.memory.available_bytes", lambda: 2**30)
    (tmp_path / "team.yaml").write_text(MAPPO)
    wide = "critic.hidden=[4096, 4096, 4096, 4096, 4096, 4096]"
    for override, says in (
        (wide, r"critic\.hidden: the hidden layers need 1\.2 GiB .* 1\.0 GiB are free\. Make them narrower"),
        ("trainer.evaluation_episodes=1000000000", r"trainer\.evaluation_episodes: 1000000000 episodes at once need"),
    ):
        with pytest.raises(RecipeError, match=says):
            dry_run(load_recipe(tmp_path / "team.yaml", [override]))


def test_more_processes_than_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("os.cpu_count", return_value=4):
        said = refused_recipe(MAPPO, tmp_path, capsys, "trainer.devices=5", "trainer.accelerator=cpu")
    assert "5 processes are more than the 4 cores of this machine. Set trainer.devices=4 or less" in " ".join(said.split())


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused_recipe(MAPPO, tmp_path, capsys, "trainer.accelerator=mps")
    assert "no MPS device" in said
    assert "trainer.accelerator=cpu" in said


def test_wrong_groups_of_a_critic_are_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "team.yaml"
    text = MAPPO.replace("type: centralised", "type: centralised\n  share: [[0], [1]]")
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        run.train(load_recipe(file), tmp_path / "runs", progress=False)
    (problem,) = caught.value.problems
    assert (problem.source, problem.line, problem.where) == (str(file), line_of(text, "[[0], [1]]"), "critic.share")


def test_a_minibatch_larger_than_the_batch_inside_another_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = "update:\n  type: sequential\n  step:\n    type: ppo_clip\n    minibatch_size: 41"
    text = MAPPO.replace("update: {type: ppo_clip, epochs: 1}", step).replace("share: all", "share: none")
    text = text.replace("max_steps: 5", "max_steps: 5\n  reward: mean")
    said = refused_recipe(text, tmp_path, capsys)
    assert f"team.yaml:{line_of(text, 'minibatch_size')}: update.step.minibatch_size" in said
    assert "(4) * data.steps (10) = 40, got 41" in " ".join(said.split())


def test_sequences_that_divide_the_rollout_are_trained(tmp_path: Path) -> None:
    file = tmp_path / "team.yaml"
    file.write_text(MAPPO.replace("share: all", "body: gru\n  sequence_length: 5"))
    run.train(load_recipe(file), tmp_path / "runs", progress=False)


def test_a_dry_run_of_many_epochs_takes_few_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text(MAPPO)
    taken: list[torch.Tensor] = []
    backward = torch.Tensor.backward

    def counted(loss: torch.Tensor) -> None:
        taken.append(loss)
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    dry_run(load_recipe(tmp_path / "team.yaml", ["update.epochs=10000", "env.continuous_actions=false"]))
    assert len(taken) == MOST_GRADIENTS


# --- runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "team.yaml").write_text(MAPPO)
    return run.train(load_recipe(folder / "team.yaml"), folder, progress=False)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    return copy


COMMANDS = (["resume"], ["evaluate"], ["play"], ["evaluate", "--checkpoint", "last"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_no_run(command: list[str], exists: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path if exists else tmp_path / "nowhere"
    said = refused([command[0], str(folder), *command[1:]], capsys)
    assert said.startswith(f"error: {folder}: is not a run; it holds no recipe.yaml.")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] != "resume"], ids=" ".join)
def test_a_run_without_checkpoints(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "checkpoints")
    said = refused([command[0], str(folder), *command[1:]], capsys)
    assert str(folder) in said
    assert "checkpoint yet" in said


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_truncated_checkpoint(command: list[str], share: float, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (LAST, BEST):
        path = folder / "checkpoints" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
    before = tree(folder)
    said = refused([command[0], str(folder), *command[1:]], capsys)
    assert str(folder / "checkpoints") in said
    assert "is damaged" in said
    assert tree(folder) == before, "nothing is touched"


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    command: list[str], archive: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "it-ran"
    saved = torch.load(folder / "checkpoints" / LAST, weights_only=True)
    saved["marlkit"]["rng"]["numpy"] = Payload(trace)
    for name in (LAST, BEST):
        path = folder / "checkpoints" / name
        if archive:
            torch.save(saved, path)
        else:
            path.write_bytes(pickle.dumps({"state_dict": {}, "marlkit": Payload(trace)}))
    said = refused([command[0], str(folder), *command[1:]], capsys)
    assert "refused" in said
    assert "Nothing in it was run." in said
    assert not trace.exists()
    if archive:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trace.exists(), "it would have run"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("seed", "-1", "must be at least 0"),
        ("seed", "99999999999999999999", "must be at most"),
        ("episodes", "0", "must be at least 1, got 0"),
        ("episodes", "1000000000000", "1000000000000 at once need"),
    ],
)
def test_impossible_episodes(option: str, value: str, says: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["evaluate", str(finished), f"--{option}", value], capsys)
    assert f"option `{option}`: " in said
    assert says in " ".join(said.split())


def test_an_edited_recipe_of_a_run_is_refused_where_it_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "recipe.yaml").read_text().replace("gamma: 0.99", "gamma: 1.99")
    (folder / "recipe.yaml").write_text(text)
    said = refused(["resume", str(folder)], capsys)
    assert f"recipe.yaml:{line_of(text, 'gamma')}: estimator.gamma" in said


def test_an_unknown_checkpoint_is_refused(finished: Path) -> None:
    with pytest.raises(RunError, match="choose best or last"):
        run.load_policy(finished, checkpoint="first")


def test_what_the_tests_above_damage_works_while_it_is_whole(folder: Path) -> None:
    assert main(["evaluate", str(folder)]) == 0
    assert main(["resume", str(folder), "--no-progress"]) == 0


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["gamma=0.9"], "gamma: is no section. Did you mean `estimator.gamma`?"),
        (["lr=1e-3"], "lr: is no section. Did you mean `optimizer.lr`?"),
        (["env.scenario=json.JSONDecoder"], "`json.JSONDecoder` is no scenario: it must be a class that extends"),
        (["env.n_packages=3"], "`vmas` has no such option. It takes: scenario,"),
        (["env=navigation"], "`env.scenario=navigation`"),
        (["task=navigation"], "task: is no section. Write `env.scenario`."),
        (["critic.typ=local"], "Did you mean `type`?"),
        (["actor=example_team"], "there is no actor called `example_team`. Write `example_team.RecurrentActor`."),
        (["critic=DiscreteCritic"], "Write `example_team.DiscreteCritic`."),
        (["critic=example_team:DiscreteCritic"], "Write `example_team.DiscreteCritic`."),
        (["critic.hidden=[32,", "32]"], "split it at a blank, quote the whole override."),
        (["env.scenario_options={n_agents:", "4}"], "split it at a blank, quote the whole override."),
    ],
)
def test_usual_slips_of_the_command_line_are_told_with_the_remedy(
    overrides: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "support")
    with pytest.raises(RecipeError) as caught:
        load_recipe("mappo", overrides)
    assert says in str(caught.value)


def test_an_option_of_a_part_is_pointed_to() -> None:
    with pytest.raises(RecipeError, match=r"`ppo_clip` has it: `update\.step\.clip_epsilon`"):
        load_recipe("happo", ["update.clip_epsilon=0.1"])


def test_an_option_that_only_building_refuses_is_reported_where_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlkit.envs._vmas.agents._counts", lambda match, agents: [4])
    monkeypatch.setattr("marlkit.envs._vmas.agents._all_counts", lambda agents: [4])
    with pytest.raises(RecipeError, match=r"override `env\.scenario_options\.n_agents=5`: .*has built 4 of them"):
        dry_run(load_recipe("mappo", ["env.scenario_options.n_agents=5", "env.num_envs=96"]))


def test_what_is_beside_a_missing_or_damaged_checkpoint_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = folder / "checkpoints" / BEST
    best.write_bytes(best.read_bytes()[:-50])
    said = refused(["evaluate", str(folder)], capsys)
    assert "`--checkpoint last` uses it." in said
    assert "training goes on" not in said
    best.unlink()
    assert "last.ckpt is there: `--checkpoint last` uses it." in refused(["evaluate", str(folder)], capsys)


def test_a_recipe_is_no_dictionary() -> None:
    with pytest.raises(RecipeError, match=r"must be given by its name or its path, got a dict\. Write it to a YAML file"):
        load_recipe({"extends": "mappo"})  # type: ignore[arg-type]


def test_a_run_takes_no_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["resume", "runs/mappo/x", "trainer.iterations=5"])
    assert "`resume` takes no overrides: set trainer.iterations=5 in the run's recipe.yaml" in capsys.readouterr().err
