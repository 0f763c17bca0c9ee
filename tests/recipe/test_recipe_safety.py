"""Reading an untrusted recipe runs none of its code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from recipe_texts import DATA, TEAM, problem, read

from marlkit.cli import main
from marlkit.errors import RecipeError

HEAD = """\
from pathlib import Path
Path(__file__).with_name("was_run").write_text("")
from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract
"""


def _evil(folder: Path, body: str) -> None:
    package = folder / "evil"
    package.mkdir()
    for name in ("__init__", "module"):
        (package / f"{name}.py").write_text(HEAD + body)


def _nothing_ran(folder: Path) -> bool:
    return not list(folder.rglob("was_run")) and not any(name.startswith("evil") for name in sys.modules)


def test_checking_runs_neither_module_nor_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    _evil(tmp_path, "class Evil(Critic):\n    contract = Contract(writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)\n")
    text = TEAM.replace("critic: centralised", "critic: evil.module.Evil")
    assert read(tmp_path, text).entries["critic"].dotted == "evil.module.Evil"
    assert main(["check", str(tmp_path / "team.yaml")]) == 0
    assert main(["show", str(tmp_path / "team.yaml"), "--no-sizes"]) == 0
    assert _nothing_ran(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        "class Evil(Critic):\n    contract = Contract(reads=(Path('was_run').write_text(''),))\n",
        "class Evil(Critic):\n    contract = __import__('os').system('touch was_run')\n",
        "class Evil(Critic):\n    def __init__(self, spec, *, a=[open('was_run', 'w')]): ...\n",
        "class Evil(Critic):\n    def __init__(self, spec, *, a=int('3')): ...\n",
        "class Evil(Critic):\n    contract = Contract(predicts=keys.describe('state').dtype)\n",
        "class Evil(Critic):\n    contract = Contract(predicts=keys.name('state'))\n",
        "import typing\nclass Evil(Critic):\n    contract = typing.sys.modules['os'].system('touch was_run')\n",
        "class Evil(Critic):\n    contract = keys.following.__globals__['__builtins__']['open']('was_run', 'w')\n",
    ],
)
def test_expressions_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.chdir(tmp_path)
    _evil(tmp_path, body)
    found = problem(tmp_path, TEAM.replace("critic: centralised", "critic: evil.module.Evil"))
    assert "`evil.module.Evil` cannot be read" in found.message
    assert _nothing_ran(tmp_path)


def test_annotations_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = "a: open('was_run', 'w') = 1, b: keys.dataclass(1) = 1, c: 'open(\"was_run\", \"w\")' = 1"
    contract = "contract = Contract(writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)"
    _evil(tmp_path, f"class Evil(Critic):\n    {contract}\n    def __init__(self, spec, *, {options}): ...\n")
    recipe = read(tmp_path, TEAM.replace("critic: centralised", "critic: evil.module.Evil"))
    assert all(option.annotation is Any for option in recipe.entries["critic"].options.values())
    assert _nothing_ran(tmp_path)


def test_check_of_an_untrusted_contract_is_not_called(tmp_path: Path) -> None:
    body = (
        "class Evil(Critic):\n    contract = Contract(writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE, "
        "check='evil.module:Evil')\n"
    )
    _evil(tmp_path, body)
    read(tmp_path, TEAM.replace("critic: centralised", "critic: evil.module.Evil"))
    assert _nothing_ran(tmp_path)


def test_file_beside_a_recipe_never_shadows_a_library(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(HEAD + "class Evil(Critic): ...\n")
    found = problem(tmp_path, TEAM.replace("critic: centralised", "critic: json.Evil"))
    assert f"`json` is both {json.__file__} and {tmp_path / 'json.py'}: rename your own" in found.message


def test_yaml_tags_build_no_objects(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has the tag `!!python"):
        read(tmp_path, f"{TEAM}name: !!python/object/apply:pathlib.Path.touch [{tmp_path}/was_run]\n")
    assert _nothing_ran(tmp_path)
