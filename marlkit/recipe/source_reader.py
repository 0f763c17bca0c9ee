"""Reading Python source without running it: names, literals, annotations, and the base classes of a class.

``marlkit check`` must take well under a second and must not execute untrusted code, so that it cannot import the components that
it checks. This module parses files and evaluates the expressions that describe a component: literals, tuples, lists,
dictionaries, type annotations, names imported from :mod:`marlkit.keys`, :mod:`marlkit.options` and :mod:`marlkit.contract`, and
calls of ``Contract``, ``When``, ``Range`` and ``following``. Everything else is refused.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import importlib.machinery
import importlib.util
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import marlkit.contract
import marlkit.keys
import marlkit.options
from marlkit.contract import KINDS, Kind
from marlkit.errors import ComponentError

READABLE: dict[str, types.ModuleType] = {
    module.__name__: module for module in (marlkit.contract, marlkit.keys, marlkit.options, typing, collections.abc)
}
"""Modules whose objects are used directly: importing them runs only code of marlkit and of Python."""

OPAQUE = frozenset(sys.stdlib_module_names) | {
    "gymnasium", "lightning", "matplotlib", "numpy", "omegaconf", "pytorch_lightning", "scipy", "tensordict", "torch", "torchrl",
    "vmas",
}  # fmt: skip
"""Libraries that do not use marlkit: none of their classes is a component, and parsing them is slow."""

CALLABLE = (marlkit.contract.Contract, marlkit.contract.When, marlkit.options.Range, marlkit.keys.following)
GENERIC = (
    list, dict, tuple, collections.abc.Sequence, collections.abc.Mapping,
    typing.Annotated, typing.Literal, typing.Mapping, typing.Optional, typing.Sequence, typing.Union,
)  # fmt: skip
BUILTINS: dict[str, Any] = {kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple)}


class KindStub:
    """Stands for a component of a ``kind`` in an annotation such as ``step: Update``."""

    kind: Kind


KIND_STUBS: dict[str, type[KindStub]] = {
    kind.base: type(kind.base.rpartition(".")[2], (KindStub,), {"kind": kind, "__module__": __name__}) for kind in KINDS.values()
}
"""The stub of the base class of every kind, by the base class's dotted path."""


LARGEST_FILE = 2_000_000
"""Bytes of a Python file that is read."""
MOST_STEPS = 100_000
"""Expressions that are evaluated while one component is read: a few lines of a stranger's module may stand for endless work."""


@functools.lru_cache(maxsize=512)
def _parse(file: Path, changed: int) -> ast.Module:
    # `changed` is part of the cache's key: an edited file is read again.
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ComponentError(f"{file}: is larger than {LARGEST_FILE} bytes and not read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the compiler, about code that is not run
            return ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise ComponentError(f"{file}:{error.lineno or 1}: is not valid Python: {error.msg}") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ComponentError(f"{file}: cannot be read as Python: {error}") from error


class Sources:
    """Finds and parses modules.

    Args:
        folders: looked through after Python's own search path, as :func:`marlkit.recipe.catalogue.load_class` does.
        opaque: libraries that are not read.
    """

    def __init__(self, folders: Sequence[Path] = (), opaque: Collection[str] = OPAQUE) -> None:
        self.opaque = opaque
        self.folders = [str(Path(folder).resolve()) for folder in folders]
        self._modules: dict[str, Module] = {}
        self._steps = 0

    def take_step(self) -> None:
        """Count one evaluated expression.

        Raises:
            ComponentError: there have been too many.
        """
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise ComponentError(f"its expressions stand for more than {MOST_STEPS} steps")

    def module(self, name: str) -> Module:
        """Parse the module ``name``.

        Raises:
            ComponentError: there is no such module, or it is not Python source.
        """
        if name not in self._modules:
            spec = self._spec(name)
            if spec is None:
                raise ComponentError(f"there is no module `{name}`")
            file = Path(spec.origin or "")
            if file.suffix != ".py":
                raise ComponentError(f"the module `{name}` is not a Python file")
            package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
            self._modules[name] = Module(name, package, file, _parse(file, file.stat().st_mtime_ns), self)
        return self._modules[name]

    def has(self, name: str) -> bool:
        """Whether there is a module ``name``."""
        return self._spec(name) is not None

    def file(self, name: str) -> Path | None:
        """The file that importing the module ``name`` would run; ``None`` for one that is built in or not there.

        Raises:
            ComponentError: the name stands for two files.
        """
        spec = self._spec(name)
        return Path(spec.origin).resolve() if spec is not None and spec.has_location and spec.origin else None

    def _spec(self, name: str) -> importlib.machinery.ModuleSpec | None:
        # importlib.util.find_spec would import the parent packages, so that each part is looked up in the folders of its parent.
        parts = name.split(".")
        spec = self._top(parts[0])
        for end in range(2, len(parts) + 1):
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:end]), list(spec.submodule_search_locations))
        return spec

    def _top(self, name: str) -> importlib.machinery.ModuleSpec | None:
        if not name.isidentifier() or name == "__main__":
            return None
        found = next((spec for finder in sys.meta_path if (spec := finder.find_spec(name, None)) is not None), None)
        beside = None if name == "marlkit" else importlib.machinery.PathFinder.find_spec(name, self.folders)
        if found is None or beside is None or beside.origin in (None, found.origin):
            return found or beside
        # Python would silently use the first: the library, or a module of an earlier recipe in this process.
        raise ComponentError(f"`{name}` is both {found.origin} and {beside.origin}: rename your own")


@dataclass(eq=False)
class Module:
    """A parsed module; names are resolved on demand."""

    name: str
    package: str
    file: Path
    tree: ast.Module
    sources: Sources
    _resolving: set[str] = field(default_factory=set)
    _classes: dict[str, Class] = field(default_factory=dict)

    @functools.cached_property
    def bindings(self) -> dict[str, ast.stmt]:
        """The statement that binds each top-level name; one inside ``if`` or ``try`` only where no other binds the name."""
        found: dict[str, ast.stmt] = {}
        for statement in self.tree.body:
            for name in _bound(statement):
                found[name] = statement
        for statement in _inside_branches(self.tree.body):
            for name in _bound(statement):
                found.setdefault(name, statement)
        return found

    def value(self, name: str) -> Any:
        """The value of ``name`` at the top level of this module.

        Raises:
            ComponentError: it cannot be determined without running the module.
        """
        if name not in self.bindings:
            if name in BUILTINS:
                return BUILTINS[name]
            raise ComponentError(f"{self.file}: `{name}` is not defined in `{self.name}`")
        if name in self._resolving:
            raise ComponentError(f"{self.file}: `{name}` is defined through itself")
        self._resolving.add(name)
        try:
            return self._resolve(name, self.bindings[name])
        finally:
            self._resolving.discard(name)

    def _resolve(self, name: str, statement: ast.stmt) -> Any:
        if isinstance(statement, ast.ClassDef):
            return KIND_STUBS.get(f"{self.name}.{name}") or self._classes.setdefault(name, Class(self, statement))
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            return evaluate(statement.value, self)
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
            return self._import(alias.name if alias.asname else name)
        if isinstance(statement, ast.ImportFrom):
            alias = next(a for a in statement.names if (a.asname or a.name) == name)
            return self._import_from(self._absolute(statement), alias.name)
        raise ComponentError(f"{self.file}:{statement.lineno}: `{name}` cannot be read without running it")

    def _absolute(self, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = self.package.split(".")
        base = parts[: len(parts) - statement.level + 1]
        return ".".join([*base, *([statement.module] if statement.module else [])])

    def _import(self, module: str) -> Any:
        if module in READABLE:
            return READABLE[module]
        if module.partition(".")[0] in self.sources.opaque:
            raise ComponentError(f"`{module}` is not read")
        return self.sources.module(module)

    def _import_from(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted in KIND_STUBS:
            return KIND_STUBS[dotted]
        if dotted in READABLE:
            return READABLE[dotted]
        return attribute(self._import(module), name)


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        yield statement.target.id
    elif isinstance(statement, ast.Import):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)


def _inside_branches(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, (ast.If, ast.Try)):
            inner = [*statement.body, *statement.orelse]
            yield from inner
            yield from _inside_branches(inner)


def attribute(owner: Any, name: str) -> Any:
    """``owner.name`` of a module.

    Raises:
        ComponentError: the owner is no module, or has no such name.
    """
    if isinstance(owner, Module):
        submodule = f"{owner.name}.{name}"
        if name in owner.bindings or not owner.sources.has(submodule):
            return owner.value(name)
        return owner.sources.module(submodule)
    if isinstance(owner, types.ModuleType) and not name.startswith("_") and owner.__name__ in READABLE:
        found = getattr(owner, name, owner)
        if not isinstance(found, types.ModuleType):
            return found
    raise ComponentError(f"`{name}` cannot be read without running code")


def evaluate(node: ast.expr, module: Module) -> Any:
    """The value of an expression made of literals, readable names and contracts.

    Raises:
        ComponentError: the expression is anything else, or too large.
    """
    module.sources.take_step()
    if isinstance(node, ast.Constant):
        return _of_64_bits(node.value)
    if isinstance(node, ast.Name):
        return module.value(node.id)
    handler = _HANDLERS.get(type(node))
    try:
        if handler is not None:
            return handler(node, module)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise ComponentError(f"{module.file}:{node.lineno}: {error}") from error
    raise ComponentError(f"{module.file}:{node.lineno}: `{_source(node)}` is no literal")


def _source(node: ast.expr) -> str:
    """The source of an expression, for a message."""
    try:
        text = ast.unparse(node)
    except RecursionError:
        return "…"
    return text if len(text) <= 100 else f"{text[:100]}…"


def _of_64_bits(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ComponentError(f"a whole number of {value.bit_length()} bits is more than 64")
    return value


def _items(nodes: Sequence[ast.expr], module: Module) -> Iterator[Any]:
    for node in nodes:
        if isinstance(node, ast.Starred):
            yield from evaluate(node.value, module)
        else:
            yield evaluate(node, module)


def _dictionary(node: ast.Dict, module: Module) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            found.update(evaluate(value, module))
        else:
            found[evaluate(key, module)] = evaluate(value, module)
    return found


def _unary(node: ast.UnaryOp, module: Module) -> Any:
    value = evaluate(node.operand, module)
    if isinstance(node.op, ast.USub) and isinstance(value, (int, float)):
        return -value
    raise TypeError(f"`{_source(node)}` is no literal")


def _binary(node: ast.BinOp, module: Module) -> Any:
    left, right = evaluate(node.left, module), evaluate(node.right, module)
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if isinstance(node.op, ast.BitOr) and not numbers:
        return left | right
    if isinstance(node.op, ast.Add) and (numbers or isinstance(left, (tuple, list))):
        return _of_64_bits(left + right)
    if isinstance(node.op, ast.Mult) and numbers:
        return _of_64_bits(left * right)
    raise TypeError(f"`{_source(node)}` is no literal")


def _subscript(node: ast.Subscript, module: Module) -> Any:
    head = evaluate(node.value, module)
    if not any(head is generic for generic in GENERIC):
        raise TypeError(f"`{_source(node)}` is no annotation that marlkit supports")
    return head[evaluate(node.slice, module)]


def _call(node: ast.Call, module: Module) -> Any:
    function = evaluate(node.func, module)
    if not any(function is allowed for allowed in CALLABLE) or any(keyword.arg is None for keyword in node.keywords):
        raise TypeError(f"`{_source(node)}` cannot be read without running it")
    return function(*_items(node.args, module), **{str(k.arg): evaluate(k.value, module) for k in node.keywords})


_HANDLERS: dict[type[ast.expr], Callable[[Any, Module], Any]] = {
    ast.Attribute: lambda node, module: attribute(evaluate(node.value, module), node.attr),
    ast.Tuple: lambda node, module: tuple(_items(node.elts, module)),
    ast.List: lambda node, module: list(_items(node.elts, module)),
    ast.Dict: _dictionary,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
    ast.Subscript: _subscript,
    ast.Call: _call,
}


def annotation(node: ast.expr | None, module: Module) -> Any:
    """The type that an annotation names; ``Any`` where it cannot be determined without running code."""
    if node is None:
        return Any
    try:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return annotation(ast.parse(node.value, mode="eval").body, module)
        found = evaluate(node, module)
    except (ComponentError, SyntaxError, ValueError, MemoryError):
        return Any
    return type(None) if found is None else found if _is_type(found) else Any


def _is_type(found: Any) -> bool:
    """Whether values can be checked against an object as a type: a class, or a generic without quoted names inside."""
    origin = typing.get_origin(found)
    if origin is typing.Annotated:
        return _is_type(typing.get_args(found)[0])
    if origin is typing.Literal or found in (Any, ...):
        return True
    return isinstance(found, type) if origin is None else all(map(_is_type, typing.get_args(found)))


@dataclass(frozen=True, eq=False)
class Class:
    """A parsed class."""

    module: Module
    node: ast.ClassDef
    _open: list[Class] = field(default_factory=list)

    @property
    def dotted(self) -> str:
        """Its dotted path."""
        return f"{self.module.name}.{self.node.name}"

    @property
    def abstract(self) -> bool:
        """Whether its own body declares abstract methods."""
        functions = [item for item in self.node.body if isinstance(item, ast.FunctionDef)]
        return any("abstractmethod" in _source(decorator) for f in functions for decorator in f.decorator_list)

    @functools.cached_property
    def lineage(self) -> tuple[Class, ...]:
        """This class and its readable base classes, nearest first."""
        return self._ancestry[0]

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of component that it is."""
        return self._ancestry[1]

    @functools.cached_property
    def _ancestry(self) -> tuple[tuple[Class, ...], tuple[Kind, ...]]:
        if self._open:
            raise ComponentError(f"{self.module.file}:{self.node.lineno}: `{self.node.name}` inherits from itself in a circle")
        self._open.append(self)
        try:
            return self._bases()
        finally:
            self._open.pop()

    def _bases(self) -> tuple[tuple[Class, ...], tuple[Kind, ...]]:
        classes: list[Class] = [self]
        kinds: list[Kind] = []
        for base in self.node.bases:
            try:
                # A base class may be generic: `Base[Tensor]`.
                found = evaluate(base.value if isinstance(base, ast.Subscript) else base, self.module)
            except ComponentError:
                continue  # a library's class, such as nn.Module, which adds no options and no contract
            if isinstance(found, Class):
                classes.extend(found.lineage)
                kinds.extend(found.kinds)
            elif isinstance(found, type) and issubclass(found, KindStub):
                kinds.append(found.kind)
        # A class that is reached twice keeps its last position, as in Python's method resolution order for a diamond.
        last = {member.dotted: position for position, member in enumerate(classes)}
        kept = [member for position, member in enumerate(classes) if last[member.dotted] == position]
        return tuple(kept), tuple(dict.fromkeys(kinds))

    @property
    def constructor(self) -> ast.FunctionDef | None:
        """Its own ``__init__``."""
        return next((f for f in self.node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)

    def assigned(self, name: str) -> ast.expr | None:
        """The expression that its own body assigns to ``name``."""
        for item in self.node.body:
            if isinstance(item, (ast.Assign, ast.AnnAssign)) and name in _bound(item):
                return item.value
        return None
