"""The commands and code of README and CONTRIBUTING work as written."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_run

from marlkit import run
from marlkit.recipe import load_recipe
from marlkit.run.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "env.num_envs=4", "data.steps=8", "env.max_steps=8", "actor.hidden=[8]", "update.minibatch_size=16", "update.epochs=1",
    "trainer.iterations=1", "trainer.evaluation_episodes=2",
]  # fmt: skip
"""Overrides that make a documented training short; the command is otherwise run as documented."""


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of a document."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(document: str, program: str) -> list[list[str]]:
    """The commands of a document that start with ``program``, comments removed."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words and words[0] == program]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with the files that the documents use, and a finished run in it."""
    folder = tmp_path_factory.mktemp("workshop")
    for block in [*blocks("README.md", "yaml"), *blocks("CONTRIBUTING.md", "python")]:
        name = re.match(r"# (\w+\.py)\n", block)
        (folder / (name[1] if name else "my_perla.yaml")).write_text(block, encoding="utf-8")
    return folder, run.train(load_recipe("mappo", TINY), folder / "runs", progress=False)


def shortened(words: list[str]) -> list[str]:
    """A command that trains, with the words of TINY that its recipe knows; a step's own options lie under `update.step`."""
    known = load_recipe(words[2], []).config
    tiny = list(TINY)
    if "step" in known["update"]:
        tiny = [word.replace("update.", "update.step.") for word in tiny]
    return [*words, *tiny, "trainer.video=false", "--no-progress"]


def execute(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=300)


COMMANDS = [
    command for document in ("README.md", "CONTRIBUTING.md", "docs/comparing.md") for command in commands(document, "marlkit")
]


def write_runs(root: Path) -> None:
    """Runs of two recipes to compare."""
    for recipe, seed in itertools.product(("mappo", "ippo"), (0, 1)):
        write_run(root, recipe, seed=seed, returns={1: float(seed), 2: 2.0})


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[1:4]))
def test_every_marlkit_command_works(words: list[str], workshop: tuple[Path, Path], tmp_path: Path) -> None:
    folder, finished = workshop
    if words[1] == "compare":
        write_runs(tmp_path / "runs")
        folder, words = tmp_path, [*words, "--no-absolute"]  # these runs have no checkpoints
    words = [word.replace("runs/mappo/<run>", str(finished)) for word in words]
    if words[1] == "train":
        words = [*words, *TINY, "trainer.video=false"]
    done = execute(words, folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_every_make_target_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    asked = {words[1] for document in ("README.md", "CONTRIBUTING.md") for words in commands(document, "make")}
    assert {"train", "test"} <= asked <= targets


@pytest.mark.parametrize("index", range(len(blocks("README.md", "python"))))
def test_every_python_block_of_the_readme_runs(index: int, workshop: tuple[Path, Path], tmp_path: Path) -> None:
    folder, finished = workshop
    code = blocks("README.md", "python")[index].replace("runs/mappo/<run>", str(finished))
    code = code.replace('"trainer.iterations=20"', ", ".join(map(repr, [*TINY, "trainer.video=false"])))
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(tmp_path / "block.py")], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_python_block_of_comparing_runs(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    (block,) = blocks("docs/comparing.md", "python")
    (tmp_path / "block.py").write_text(block.replace('"runs/ippo"]', '"runs/ippo"], absolute=False'), encoding="utf-8")
    done = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "comparison" / "index.html").exists()


def test_the_example_component_passes_its_own_test(workshop: tuple[Path, Path]) -> None:
    done = execute(["pytest", "-q", "-p", "no:cacheprovider", "test_my_critic.py"], workshop[0])
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


def test_the_example_environment_passes_its_own_test_and_the_commands_train(tmp_path: Path) -> None:
    for block in blocks("docs/environments.md", "python"):
        (tmp_path / block.split()[1]).write_text(block, encoding="utf-8")
    done = execute(["pytest", "-q", "-p", "no:cacheprovider", "test_my_env.py"], tmp_path)
    assert done.returncode == 0, done.stdout
    for words in commands("docs/environments.md", "marlkit"):
        earlier = [str(found) for found in sorted((tmp_path / "runs").glob("happo/*"))]
        done = execute([word.replace("runs/happo/<run>", earlier[0]) if earlier else word for word in shortened(words)], tmp_path)
        assert done.returncode == 0, done.stderr


def test_the_example_components_pass_their_own_test_and_train(tmp_path: Path) -> None:
    for block in blocks("docs/components.md", "python"):
        (tmp_path / block.split()[1]).write_text(block, encoding="utf-8")
    done = execute(["pytest", "-q", "-p", "no:cacheprovider", "test_my_components.py"], tmp_path)
    assert done.returncode == 0, done.stdout
    parts = {word for words in commands("docs/components.md", "marlkit") for word in words if "=my_" in word}
    assert {part.partition("=")[0] for part in parts} == {"actor", "estimator", "update"}
    tiny = [word for word in TINY if not word.startswith(("actor.", "update."))]
    done = execute(["marlkit", "train", "mappo", *sorted(parts), *tiny, "trainer.video=false", "--no-progress"], tmp_path)
    assert done.returncode == 0, done.stderr


EXAMPLE = {"my_critic.py": "marlkit/critics/my_critic.py", "test_my_critic.py": "tests/critics/test_my_critic.py"}
"""Where the files of CONTRIBUTING would lie in the project."""


def test_the_example_component_passes_lint_and_types(tmp_path: Path) -> None:
    code = {re.findall(r"\w+\.py", block)[0]: block for block in blocks("CONTRIBUTING.md", "python")}
    assert code.keys() == EXAMPLE.keys()
    for name, block in code.items():
        (tmp_path / name).write_text(block, encoding="utf-8")
        for command in (["check"], ["format", "--check"]):
            words = [sys.executable, "-m", "ruff", *command, "--no-cache", "--stdin-filename", EXAMPLE[name], "-"]
            done = subprocess.run(words, cwd=ROOT, input=block, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr
    done = execute(["mypy", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}", *code], tmp_path)
    assert done.returncode == 0, done.stdout


METRIC = r"(?:actor|critic|opponents|coupling|consensus|episode|evaluation|optimizer|time)/[a-z_]+"


def test_every_file_and_metric_of_a_run_is_described(workshop: tuple[Path, Path]) -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    files = {path.relative_to(workshop[1]).as_posix() for path in workshop[1].rglob("*") if path.is_file()}
    top = {name if not name.startswith("tensorboard/") else "tensorboard/" for name in files}
    assert top | {"team.gif"} == set(re.findall(r"^\| `([^`]+)` \|", page.partition("## Columns")[0], flags=re.MULTILINE))
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "marlkit").rglob("*.py"))
    logged = {name for name in read_metrics(workshop[1] / "metrics.csv") if "/agent_return/" not in name}
    written = set(re.findall(rf'"({METRIC})"', source)) | logged
    described = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)?)`", "".join(line.split("|")[1] for line in _rows(page))))
    described |= set(re.findall(rf"`({METRIC})`", page))
    assert written == described


def _rows(page: str) -> list[str]:
    """The rows of the table of columns."""
    return [line for line in page.partition("## Columns")[2].splitlines() if line.startswith("| `")]


def test_files_that_the_readme_links_to_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r'\]\(([^)#:]+)\)|src="([^"]+)"', text):
        assert (ROOT / (link[0] or link[1])).exists(), link
