"""The shape of the code: who may import whom, and how long a function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import marlkit
from marlkit.contract import KINDS
from marlkit.recipe.catalogue import components

PACKAGE = Path(marlkit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
KIND_PACKAGES = {kind.package for kind in KINDS.values()}
SCREEN = 50
"""Lines of code of a function, its docstring aside."""


def dotted(file: Path) -> str:
    return ".".join(("marlkit", *file.relative_to(PACKAGE).with_suffix("").parts))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def kind_of(module: str) -> str | None:
    return next((package for package in KIND_PACKAGES if module.startswith(f"{package}.")), None)


@pytest.mark.parametrize("file", MODULES, ids=dotted)
def test_components_are_known_by_their_contract_only(file: Path) -> None:
    """Nobody outside a kind's package imports a component of it, not even a component of another kind."""
    own = kind_of(dotted(file))
    strangers = {name for name in imported(ast.parse(file.read_text(encoding="utf-8"))) if kind_of(name) not in (None, own)}
    assert not strangers


LIBRARIES = {"vmas", "torchrl", "lightning"}
"""Names of components that are also names of libraries."""
DEFAULTS = PACKAGE / "contract.py"


@pytest.mark.parametrize("file", [file for file in MODULES if kind_of(dotted(file)) is None and file != DEFAULTS], ids=dotted)
def test_no_component_is_known_by_name(file: Path) -> None:
    """Outside the kinds' packages only the defaults of absent sections are named, and those at one place."""
    names = {name for kind in KINDS for name in components(kind)} - LIBRARIES
    constants = {node.value for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)}
    assert not constants & names


@pytest.mark.parametrize("file", sorted((PACKAGE / "functional").glob("*.py")), ids=dotted)
def test_mathematics_stands_below_everything(file: Path) -> None:
    names = {name for name in imported(ast.parse(file.read_text(encoding="utf-8"))) if name.startswith("marlkit.")}
    allowed = ("marlkit.functional", "marlkit.errors", "marlkit.options")
    assert not {name for name in names if not name.startswith(allowed)}


@pytest.mark.parametrize("file", MODULES, ids=dotted)
def test_a_function_fits_a_screen(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if len(node.body) > 1 and ast.get_docstring(node) is not None else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < SCREEN, f"{file.name}: {node.name}"
