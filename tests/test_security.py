"""`docs/security.md` says what tests show, and the package uses nothing that runs what it reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import marlkit
from marlkit.contract import KINDS
from marlkit.options import names_code
from marlkit.recipe.catalogue import Entry, components

PACKAGE = Path(marlkit.__file__).parent
ROOT = PACKAGE.parent
DOCUMENT = ROOT / "docs" / "security.md"

RUNS_CODE = {
    "recorder/program.py": {"exec", "compile"},  # of operations that marlkit has recorded itself
    "recorder/guards.py": {"exec", "compile"},  # of comparisons with what these operations have read
    "recorder/python_values.py": {"pickle.loads"},  # of generators that the same function has pickled, in memory
}
IMPORTS_BY_NAME = {
    "envs/_sides.py", "envs/_vmas/simulation.py", "envs/torchrl.py", "nn/named_network.py", "recipe/catalogue.py",
    "recipe/trust.py", "run/start.py", "testing/__init__.py", "training/assembly.py",
}  # fmt: skip
"""Files that import what a text names: what a recipe names, after `require_trust`, or what a contract of marlkit names."""


def test_every_row_of_the_document_names_tests_that_exist() -> None:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [line for line in lines if not line.endswith("| shown by |") and set(line) - set("|-")]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.rstrip("|").rpartition("|")[2])
        assert named, f"no test shows: {row}"
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {test}"


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call in the package: file, call, and the called name as written."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file.relative_to(PACKAGE).as_posix(), node, ast.unparse(node.func)


UNSAFE = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "yaml.load",
    "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load", "runpy.run_path", "__import__",
    "OmegaConf.load", "OmegaConf.resolve",
}  # fmt: skip


def test_nothing_runs_what_it_reads() -> None:
    found = {(file, name) for file, _, name in calls() if name in UNSAFE}
    assert found == {(file, name) for file, names in RUNS_CODE.items() for name in names}


def test_only_plain_data_is_loaded() -> None:
    for file, call, name in calls():
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name.rpartition(".")[2] == "load" and name.startswith("torch"):
            assert given.get("weights_only") == "True", file
        if name in ("numpy.load", "np.load"):
            assert given.get("allow_pickle", "False") == "False", file
        if name.startswith("subprocess."):
            assert "shell" not in given, file


def test_files_that_import_by_name_are_known() -> None:
    found = {file for file, _, name in calls() if name.rpartition(".")[2] == "import_module"}
    assert found == IMPORTS_BY_NAME


COMPONENTS = [entry for kind in KINDS for entry in components(kind).values()]
HOOKED = {"env.torchrl", "env.vmas", "actor.module", "critic.module", "trainer.lightning"}


@pytest.mark.parametrize("entry", COMPONENTS, ids=lambda entry: f"{entry.kind.section}.{entry.name}")
def test_components_that_import_say_so(entry: Entry) -> None:
    """A declaration of code: those that import what an option names have one, and their source is among the known files."""
    declared = f"{entry.kind.section}.{entry.name}" in HOOKED
    assert bool(entry.code) is declared
    assert entry.own
    if any(names_code(option.annotation) for option in entry.options.values()):
        assert declared
