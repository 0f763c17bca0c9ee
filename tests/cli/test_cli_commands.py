"""The command line: its output and exit codes, and that quick commands import no torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recipe_texts import DATA, TEAM

import marlkit
from marlkit.cli import main
from marlkit.contract import KINDS
from marlkit.errors import Interrupted, RunError
from marlkit.recipe import Recipe, shipped
from marlkit.recipe.catalogue import components

ROOT = Path(marlkit.__file__).parents[1]


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(DATA)
    file = tmp_path / "team.yaml"
    file.write_text(TEAM)
    return str(file)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces the functions that train and play: stores its arguments."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def remember(name: str, answer: Any) -> Any:
        def function(*arguments: Any, **keywords: Any) -> Any:
            calls.append((name, arguments, keywords))
            return answer

        return function

    sizes = ({"N": 3, "O": 18, "S": 54, "D": 2}, {"actor": 1234, "critic": 56})
    answers = {
        "train": Path("runs/team/1"),
        "resume": Path("runs/team/1"),
        "play": Path("team.gif"),
        "evaluate": {"return": 1.25, "length": 100.0},
    }
    fake = SimpleNamespace(calls=calls, **{name: remember(name, answer) for name, answer in answers.items()})
    monkeypatch.setitem(sys.modules, "marlkit.run", fake)
    monkeypatch.setattr("marlkit.training.assembly.sizes", lambda recipe: sizes)
    monkeypatch.setattr(marlkit, "run", fake, raising=False)
    return fake


def test_check(team: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", team]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok: team")
    assert "critic centralised" in out
    assert err == ""


def test_check_and_show_warn_of_what_a_recipe_loses(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["check", "happo"], ["show", "happo", "--no-sizes"]):
        assert main([*command, "actor.share=all"]) == 0
        said = capsys.readouterr()
        assert said.err.count("warning: ") == 1
        assert "`sequential` expects the trait `separate_parameters`" in said.err
        assert "Set actor.share=none." in said.err
        assert main(command) == 0
        assert "warning" not in capsys.readouterr().err


def test_check_prints_the_options_that_a_swap_dropped(team: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", team, "critic={type: marginalised, samples: 3}", "critic=local"]) == 0
    out, err = capsys.readouterr()
    assert err == "note: critic: `marginalised` became `local`, which does not take `samples`: dropped.\n"
    assert "critic local" in out


def test_check_takes_options_between_overrides(team: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []
    fake = SimpleNamespace(dry_run=seen.append)
    monkeypatch.setitem(sys.modules, "marlkit.training.dry_run", fake)
    assert main(["check", team, "seed=1", "--run", "critic=local"]) == 0
    assert (seen[0].seed, seen[0].config.critic.type) == (1, "local")


def test_problems_go_to_standard_error_with_exit_code_2(team: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", team, "critic=centralized", "optimizer.lr=-1", f"env.extras={{long: {'x' * 300}}}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "2 problems:"
    assert len(lines) == 3, "each on a line of its own, however long"
    assert "Did you mean `centralised`?" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["chek", "mappo"],
        ["check"],
        ["check", "mappo", "--rn"],
        ["play", "x", "y"],
        ["play", "x", "--seed", "a"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: marlkit" in capsys.readouterr().err


def test_show(team: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", team, "--no-sizes"]) == 0
    out = capsys.readouterr().out
    assert "clip_epsilon: 0.3" in out
    assert "agents.observation [N, O]" in out
    assert "does not run" in out
    assert "parameters" not in out


def test_show_with_sizes(team: str, library: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", team, "--trust"]) == 0
    out = capsys.readouterr().out
    assert "agents.observation [3, 18]" in out
    assert "1,234" in out
    assert "Parameters in all: 1,290." in out
    assert "N = 3 agents" in out


def test_show_of_a_misfit_prints_the_gap_and_fails(team: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", team, "critic=example_team.ActionValueCritic"]) == 2
    out, err = capsys.readouterr()
    assert "missing" in out
    assert "`gae` reads agents.state_value" in err


def test_show_mermaid_prints_nothing_else(team: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", team, "--mermaid"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("flowchart LR\n")
    assert "clip_epsilon" not in out


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in shipped())
    assert all(name in out for kind in KINDS for name in components(kind))


def test_list_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "mappo"]) == 0
    assert capsys.readouterr().out == shipped()["mappo"].read_text()


@pytest.mark.parametrize("what", ["critic", "critics"])
def test_list_section(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    out = capsys.readouterr().out
    for name, entry in components("critic").items():
        assert f"critic.{name}" in out
        assert all(option in out for option in entry.options)


@pytest.mark.parametrize("what", ["critic.marginalised", "marginalised"])
def test_list_component(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    out = capsys.readouterr().out
    assert "marlkit.critics.marginalised.MarginalisedCritic" in out
    assert "opponents.logits (when discrete)" in out


def test_list_of_a_users_component(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(DATA)
    assert main(["list", "critic.example_team.DiscreteCritic"]) == 0
    out = capsys.readouterr().out
    assert "temperature" in out
    assert "[64, 64]" in out, "a list is no markup"


def test_list_finds_the_kind_of_a_users_component(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(DATA)
    assert main(["list", "example_team.DiscreteCritic"]) == 0
    assert "temperature" in capsys.readouterr().out
    assert main(["list", "example_team.Missing"]) == 2
    assert "has no class `Missing`" in capsys.readouterr().err


def test_list_of_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "scenarios"]) == 0
    (balance,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("balance ")]
    assert balance.split(None, 1)[1].strip() == "n_agents, package_mass, random_package_pos_on_line"


def test_a_warning_is_one_line(library: SimpleNamespace) -> None:
    said: list[str] = []

    def resume(folder: Path, **_: bool) -> Path:
        said.append(warnings.formatwarning("slow", UserWarning, f"{ROOT}/marlkit/run/session.py", 1))
        said.append(warnings.formatwarning("old", DeprecationWarning, "/elsewhere.py", 1))
        return folder

    library.resume = resume
    usual = warnings.formatwarning
    assert main(["resume", "nowhere"]) == 0
    assert said == ["marlkit: slow\n", "/elsewhere.py:1: DeprecationWarning: old\n"]
    assert warnings.formatwarning is usual


def test_a_command_without_a_recipe_names_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert "which recipe? `marlkit train mappo`, say" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "hint"), [("marginalized", "`marginalised`"), ("critic.lokal", "`local`"), ("recipe.mappo", "")]
)
def test_list_of_an_unknown_name(what: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 2
    assert hint in capsys.readouterr().err


def test_train(team: str, library: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", team, "seed=3", "--root", "elsewhere", "--no-progress"]) == 0
    ((name, (recipe, root), keywords),) = library.calls
    assert (name, recipe.seed, root, keywords) == ("train", 3, Path("elsewhere"), {"progress": False, "profile": False})
    assert capsys.readouterr().out == "runs/team/1\n"


def test_evaluate_play_and_resume(library: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/x/1", "--episodes", "5", "--seed", "7", "--checkpoint", "last"]) == 0
    assert main(["play", "runs/x/1", "--output", "a.gif", "--fps", "20"]) == 0
    assert main(["resume", "runs/x/1", "--profile"]) == 0
    run = (Path("runs/x/1"),)
    assert library.calls == [
        ("evaluate", run, {"episodes": 5, "seed": 7, "checkpoint": "last", "overrides": [], "trust": False}),
        ("play", run, {"path": Path("a.gif"), "seed": None, "checkpoint": "best", "fps": 20.0, "trust": False}),
        ("resume", run, {"progress": True, "profile": True, "trust": False}),
    ]
    assert capsys.readouterr().out.splitlines() == ["return  1.25", "length  100", "team.gif", "runs/team/1"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_prints_how_to_continue(
    signum: signal.Signals, team: str, tmp_path: Path, library: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(recipe: Recipe, root: Path, **_: bool) -> Path:
        raise Interrupted("interrupted after iteration 3. Go on with: marlkit resume mine", signum, Path("mine"))

    library.train = train
    newer = tmp_path / "team" / "of-another-process"
    newer.mkdir(parents=True)
    (newer / "recipe.yaml").touch()
    assert main(["train", team, "--root", str(tmp_path)]) == 128 + signum
    assert capsys.readouterr().err == "interrupted after iteration 3. Go on with: marlkit resume mine\n"


def test_an_interrupt_before_a_run_names_none(
    team: str, tmp_path: Path, library: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(recipe: Recipe, root: Path, **_: bool) -> Path:
        raise KeyboardInterrupt

    library.train = train
    assert main(["train", team, "--root", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_errors_of_the_library_are_printed(library: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    def resume(folder: Path, **_: bool) -> Path:
        raise RunError(f"{folder}: is not a run")

    library.resume = resume
    assert main(["resume", "nowhere"]) == 2
    assert capsys.readouterr().err == "error: nowhere: is not a run\n"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["check", "mappo"], ["list"], ["show", "mappo", "--no-sizes"], ["list", "critic.local"]])
def test_quick_commands_import_no_torch(arguments: list[str]) -> None:
    finished = _run("-X", "importtime", "-m", "marlkit", *arguments)
    assert finished.returncode == 0, finished.stderr
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines() if line.startswith("import time:")}
    assert "marlkit.recipe" in imported
    assert not {"torch", "tensordict", "lightning", "vmas", "numpy", "matplotlib"} & imported


def test_pipe_that_closes_early_is_no_error() -> None:
    program = f"{sys.executable} -m marlkit list | head -n 1; exit ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0
    assert finished.stdout == "recipes\n"
    assert finished.stderr == ""
