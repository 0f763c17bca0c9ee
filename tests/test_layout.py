"""Rules for the source: imports between packages, lengths of functions, shapes in docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import marlkit
from marlkit.contract import KINDS, TRAITS
from marlkit.recipe.catalogue import components

PACKAGE = Path(marlkit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
KIND_PACKAGES = {kind.package for kind in KINDS.values()}
SCREEN = 50
"""Largest number of lines of a function, without its docstring."""


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
    """No module outside a kind's package imports a component of it, not even a component of another kind."""
    own = kind_of(dotted(file))
    foreign = {name for name in imported(ast.parse(file.read_text(encoding="utf-8"))) if kind_of(name) not in (None, own)}
    assert not foreign


OTHER_WORDS = {"vmas", "torchrl", "lightning", *TRAITS}
"""Names of components that are also names of libraries or of traits."""
DEFAULTS = PACKAGE / "contract.py"


@pytest.mark.parametrize("file", [file for file in MODULES if kind_of(dotted(file)) is None and file != DEFAULTS], ids=dotted)
def test_no_component_is_known_by_name(file: Path) -> None:
    """Outside the kinds' packages only the defaults of absent sections are named, in one module."""
    names = {name for kind in KINDS for name in components(kind)} - OTHER_WORDS
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


SHAPE = re.compile(r"\[(\]|[^]]*([A-Za-z*]|\.\.\.)[^]]*\])")
"""Brackets that are empty or hold a name, unlike an interval such as [0, 1]."""
SHAPES_NOT_NAMED_YET: set[str] = set()
"""Packages and modules of marlkit to which the test below does not apply yet; delete an entry to extend it."""


def public_functions(body: Iterable[ast.stmt], of_class: str = "") -> Iterator[tuple[ast.FunctionDef, str]]:
    """Public functions and methods, each with its docstring and that of its class."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            docstring = of_class + (ast.get_docstring(node) or "")
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node.body, docstring)
            elif "overload" not in map(ast.unparse, node.decorator_list):
                yield node, docstring


def handles_tensors(function: ast.FunctionDef) -> bool:
    """Whether an annotation of an argument or of the result mentions a tensor or a TensorDict."""
    arguments = [node.annotation for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    annotations = [ast.unparse(node) for node in (*arguments, function.returns) if node is not None]
    return any(re.search(r"\bTensor(Dict(Base)?)?\b", annotation) for annotation in annotations)


@pytest.mark.parametrize("file", [file for file in MODULES if dotted(file).split(".")[1] not in SHAPES_NOT_NAMED_YET], ids=dotted)
def test_public_functions_of_tensors_name_their_shapes(file: Path) -> None:
    """The docstring of the function, or of its class, holds a shape such as ``[*, N, 1]``."""
    functions = public_functions(ast.parse(file.read_text(encoding="utf-8")).body)
    assert not [f.name for f, docstring in functions if handles_tensors(f) and not SHAPE.search(docstring)]
