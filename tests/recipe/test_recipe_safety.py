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


NAMED = "contract = Contract(writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)\n"
TYPED = f"{HEAD}from typing import Any, List, Union\n"


def doubled(form: str, last: str, links: int = 60) -> str:
    """Names of which each is the next one twice."""
    lines = [f"A{link} = {form.replace('*A', f'A{link + 1}')}" for link in range(links)]
    return "\n".join([*lines, f"A{links} = {last}", ""])


def option(value: str, annotation: str = "Any") -> str:
    return f"class Odd(Critic):\n    {NAMED}    def __init__(self, spec, *, a: {annotation} = {value}): ...\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class Odd(Other): ...\nclass Other(Odd): ...\n", "inherits from itself in a circle"),
        ("class Odd(Odd): ...\n", "inherits from itself in a circle"),
        (doubled("*A * *A", "3") + option("A0"), "more than 64"),
        (doubled("*A + *A", "(3,)") + option("A0"), "steps"),
        (doubled("[**A, **A]".replace("**A", "*(*A)"), "(3,)") + option("A0"), "steps"),
        (option("10 ** 10 ** 10"), "is no literal"),
        (option("'a' * 10 ** 12"), "is no literal"),
        (option("9" * 4000), "more than 64"),
        (option("9" * 6000), "not valid Python"),
        (option("range(10 ** 12)"), "`range` is not defined"),
        (option("(" * 10_000 + ")" * 10_000), "nested parentheses"),
        (option("-" * 5000 + "1"), "cannot be read as Python"),
        (option("1" + "+1" * 50_000), "cannot be read as Python"),
        (option("[" * 150 + "]" * 150), "no value that a recipe can hold"),
        (option("1j"), "no value that a recipe can hold"),
        (option("b'x'"), "no value that a recipe can hold"),
        (option("Contract()"), "no value that a recipe can hold"),
        ("#" * 3_000_000, "is larger than"),
        ("\0", "null bytes"),
        ("class Odd(Critic):\n    contract = Contract(reads=5)\n", "`reads` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(reads=(1,))\n", "`reads` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(traits='stochastic')\n", "`traits` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(traits=('a'))\n", 'a tuple of one needs a comma, `("a",)`'),
        ("class Odd(Critic):\n    contract = Contract(needs={'actor': 'stochastic'})\n", "`needs` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(at_most={'a': 3})\n", "`at_most` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(predicts=[])\n", "`predicts` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(check=3)\n", "`check` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(derives=3)\n", "`derives` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(code=3)\n", "`code` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(holds=3)\n", "`holds` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(holds={'a': ('b',)})\n", "`holds` of the contract"),
        ("class Odd(Critic):\n    contract = Contract(holds={'a': ('b', 3)})\n", "`holds` of the contract"),
    ],
)
def test_a_strangers_source_is_read_in_bounded_work_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange.py").write_text(TYPED + body)
    found = problem(tmp_path, TEAM.replace("critic: centralised", "critic: strange.Odd"))
    assert (found.where, found.line) == ("critic.type", 3)
    assert message in found.message
    assert _nothing_ran(tmp_path)


def test_source_that_only_looks_costly_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = "".join(f"class C{i}(C{i + 1}, D{i + 1}): ...\nclass D{i}(C{i + 1}, D{i + 1}): ...\n" for i in range(40))
    diamonds = f"{pairs}class C40(Critic):\n    {NAMED}class D40(Critic): ...\nclass Wide(C0): ...\n"
    nested = doubled("Union[*A, List[*A]]", "int") + option("3", "A0") + option("3", f"'{'(' * 500}'").replace("Odd", "Quoted")
    literal = option("'${env}'").replace("Odd", "Literal")
    (tmp_path / "strange.py").write_text(TYPED + diamonds + nested + literal + "x = '\\d'\n")
    for name in ("Wide", "Odd", "Quoted"):
        assert (
            read(tmp_path, TEAM.replace("critic: centralised", f"critic: strange.{name}")).entries["critic"].options is not None
        )
    assert read(tmp_path, TEAM.replace("critic: centralised", "critic: strange.Literal")).options("critic") == {"a": "${env}"}


@pytest.mark.parametrize(
    "name", ["a" * 300 + ".X", "a." * 3000 + "X", "..", ".X", "X.", "a b.X", "a/b.X", "a\\b.X", "os." + "X" * 5000]
)
def test_odd_names_of_components(tmp_path: Path, name: str) -> None:
    found = problem(tmp_path, TEAM.replace("critic: centralised", f"critic: {json.dumps(name)}"))
    assert (found.where, found.line) == ("critic.type", 3)
