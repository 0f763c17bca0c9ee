"""What the source of a scenario class says of its options and of its agents. Imports neither torch nor VMAS and runs nothing.

A scenario takes its options as keyword arguments of ``make_world``: by name, or one by one from what remains
(``kwargs.pop("n_agents", 4)``), in that method, in a method or function that it hands them to, or in the class above it.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from marlkit.errors import ComponentError, did_you_mean
from marlkit.recipe.scalars import shown
from marlkit.recipe.source_reader import OPAQUE, Class, Module, Sources, attribute, evaluate

BASE = "vmas.simulator.scenario.BaseScenario"
FOOTBALL = "vmas.scenarios.football.Scenario"
MAKE = "make_world"
GIVEN = 3
"""Arguments of ``make_world`` that are no options: the scenario itself, the number of environments and the device."""


class UnreadableError(Exception):
    """Something that only running the source would tell."""


@dataclass(frozen=True)
class Options:
    """The options of a scenario.

    Attributes:
        used: those that it reads.
        ignored: those that it reads and then replaces by something else.
    """

    used: frozenset[str]
    ignored: frozenset[str] = frozenset()


def find_class(path: str, folders: Sequence[Path] = ()) -> Class | None:
    """The scenario class at a dotted path; ``None`` where only importing it would tell.

    Raises:
        ComponentError: there is no such module or class, the module is not valid Python, or the class is no scenario.
    """
    try:
        return _find_class(path, folders)
    except (RecursionError, OSError, ValueError) as error:  # of a stranger's file or of its name
        raise ComponentError(f"`{shown(path)}` cannot be read: {error}") from error


def _find_class(path: str, folders: Sequence[Path]) -> Class | None:
    name, _, class_name = path.rpartition(".")
    if name.partition(".")[0] in OPAQUE - {"vmas"}:
        raise ComponentError(f"it must be a class that extends `{BASE}`")
    module = Sources(folders, OPAQUE - {"vmas"}).module(name)
    if class_name not in module.bindings:
        if _makes_names(module):
            return None
        classes = [bound for bound, statement in module.bindings.items() if isinstance(statement, ast.ClassDef)]
        has = f"It has: {shown(', '.join(classes), 500)}" if classes else "It has no classes"
        raise ComponentError(f"`{name}` has no class `{class_name}`.{did_you_mean(class_name, classes)} {has}")
    try:
        found = attribute(module, class_name)
    except ComponentError:
        return None
    if not isinstance(found, Class) or not is_scenario(found):
        raise ComponentError(f"it must be a class that extends `{BASE}`")
    return found


def _makes_names(module: Module) -> bool:
    """Whether a module may have names that its text does not bind one by one."""
    nodes = list(ast.walk(module.tree))
    stars = any(isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names) for node in nodes)
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    functions = {node.name for node in module.tree.body if isinstance(node, ast.FunctionDef)}
    return stars or bool(called & {"exec", "globals", "setattr"}) or "__getattr__" in functions


def is_scenario(cls: Class) -> bool:
    """Whether a class extends VMAS' base of scenarios, as far as its source tells."""
    return any(member.dotted == BASE for member in cls.lineage) or not has_readable_bases(cls)


def has_readable_bases(cls: Class) -> bool:
    """Whether all classes above a class are known: those of the standard library do not count."""
    return all(_is_readable(base, member.module) for member in cls.lineage for base in member.node.bases)


def _is_readable(base: ast.expr, module: Module) -> bool:
    named = base.value if isinstance(base, ast.Subscript) else base
    try:
        evaluate(named, module)
    except ComponentError:
        root = next((node.id for node in ast.walk(named) if isinstance(node, ast.Name)), "")
        statement = module.bindings.get(root)
        if isinstance(statement, ast.ImportFrom):
            return not statement.level and (statement.module or "").partition(".")[0] in OPAQUE
        if isinstance(statement, ast.Import):
            return all(alias.name.partition(".")[0] in OPAQUE for alias in statement.names)
        return statement is None and hasattr(builtins, root)
    return True


# --- agents --------------------------------------------------------------------------------------------------------------


def opposes_agents(cls: Class, options: Mapping[str, object]) -> bool | None:
    """Whether the agents that policies control do not share one aim; ``None`` where only building the scenario tells."""
    if cls.dotted == FOOTBALL:
        played = {"blue": not options.get("ai_blue_agents", False), "red": not options.get("ai_red_agents", True)}
        return all(played.values()) and all(options.get(f"n_{team}_agents", 3) != 0 for team in played)
    above = {member.dotted for member in cls.lineage}
    if FOOTBALL in above or any(_method(member, "agent_group") for member in cls.lineage):
        return None
    trees = {member.module.name: member.module.tree for member in cls.lineage if member.dotted != BASE}
    calls = [node for tree in trees.values() for node in _calls(tree)]
    adversarial = [call for call in calls if any(k.arg == "adversary" and not _is_false(k.value) for k in call.keywords)]
    if any(keyword.arg == "action_script" for call in adversarial for keyword in call.keywords):
        return None
    return bool(adversarial)


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _method(cls: Class, name: str) -> ast.FunctionDef | None:
    return next((item for item in cls.node.body if isinstance(item, ast.FunctionDef) and item.name == name), None)


# --- options -------------------------------------------------------------------------------------------------------------


def options_of(cls: Class) -> Options | None:
    """The options that a scenario reads; ``None`` where its source does not tell them all."""
    reader = _Reader(cls.lineage)
    try:
        used = reader.method(MAKE, 0, GIVEN, frozenset())
    except (UnreadableError, ComponentError, RecursionError):
        return None
    return Options(frozenset(used - reader.ignored), frozenset(reader.ignored))


@dataclass
class _Reader:
    """Follows the keyword arguments of ``make_world`` through the methods and functions that they are handed to."""

    lineage: Sequence[Class]
    ignored: set[str] = field(default_factory=set)
    _path: list[ast.FunctionDef] = field(default_factory=list)

    def method(self, name: str, above: int, given: int, named: frozenset[str]) -> set[str]:
        """The options read by the method ``name`` of the nearest class from ``above`` on, called with ``**options``.

        ``given`` of its arguments are handed to it by position, ``named`` by name.
        """
        index, function = self._find(name, above)
        return self._called(function, index, given, named)

    def _find(self, name: str, above: int) -> tuple[int, ast.FunctionDef]:
        for index, member in enumerate(self.lineage[above:], start=above):
            function = _method(member, name)
            if function is not None:
                return index, function
        raise UnreadableError(name)

    def _called(self, function: ast.FunctionDef, index: int, given: int, named: frozenset[str]) -> set[str]:
        by_name = [argument.arg for argument in (*function.args.args[given:], *function.args.kwonlyargs)]
        found = {name for name in by_name if name not in named}
        rest = function.args.kwarg
        return found | (set() if rest is None else self._read(function, rest.arg, index))

    def _read(self, function: ast.FunctionDef, mapping: str, index: int) -> set[str]:
        """The options that a function reads from its dictionary ``mapping``."""
        if function in self._path:
            raise UnreadableError(function.name)
        self._path.append(function)
        module = self.lineage[index].module
        parents = {child: parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
        found: set[str] = set()
        for node in ast.walk(function):
            module.sources.take_step()  # functions that hand options on twice each stand for endless work
            if isinstance(node, ast.Name) and node.id == mapping:
                found |= self._use(node, parents, index)
        self.ignored |= set(_ignored(function, lambda value: _key_read(value, mapping, module), module.sources.take_step))
        self._path.pop()
        return found

    def _use(self, node: ast.Name, parents: Mapping[ast.AST, ast.AST], index: int) -> set[str]:
        """The options that one use of the dictionary reads."""
        parent, module = parents[node], self.lineage[index].module
        around = parents.get(parent)
        if isinstance(parent, ast.Attribute) and isinstance(around, ast.Call) and around.func is parent:
            return self._asked(parent.attr, around, module)
        if isinstance(parent, ast.Subscript) and isinstance(parent.ctx, ast.Load):
            return {_text(parent.slice, module)}
        if isinstance(parent, ast.Compare) and parent.comparators == [node]:  # "option" in options
            return {_text(parent.left, module)}
        if isinstance(parent, ast.keyword) and parent.arg is None and isinstance(around, ast.Call):
            return self._handed_on(around, index)
        if isinstance(parent, ast.Call) and node in parent.args:
            return self._handed_over(parent, parent.args.index(node), index)
        if isinstance(parent, (ast.If, ast.Assert, ast.FormattedValue)) or _is_not(parent):
            return set()
        raise UnreadableError(ast.unparse(parent))

    def _asked(self, method: str, call: ast.Call, module: Module) -> set[str]:
        if method in ("pop", "get") and call.args:
            return {_text(call.args[0], module)}
        if method in ("setdefault", "keys") or (method == "update" and not call.args):
            return set()
        raise UnreadableError(method)

    def _handed_on(self, call: ast.Call, index: int) -> set[str]:
        """``self.method(…, **options)`` or ``super().make_world(…, **options)``."""
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            raise UnreadableError("*")
        named = frozenset(keyword.arg for keyword in call.keywords if keyword.arg is not None)
        function, target = call.func, call.func.value if isinstance(call.func, ast.Attribute) else None
        if isinstance(function, ast.Attribute) and isinstance(target, ast.Name) and target.id == "self":
            return self.method(function.attr, 0, 1 + len(call.args), named) - named
        if isinstance(function, ast.Attribute) and isinstance(target, ast.Call) and ast.unparse(target.func) == "super":
            return self.method(function.attr, index + 1, 1 + len(call.args), named) - named
        if isinstance(function, ast.Name):
            return self._called(_function(self.lineage[index].module, function.id), index, len(call.args), named) - named
        raise UnreadableError(ast.unparse(call))

    def _handed_over(self, call: ast.Call, position: int, index: int) -> set[str]:
        """``self.method(options)`` or ``function(options)``, which read it as a dictionary."""
        function = call.func
        if isinstance(function, ast.Attribute) and function.attr == "check_kwargs_consumed":
            return set()
        if isinstance(function, ast.Name) and function.id in ("len", "bool"):
            return set()
        if isinstance(function, ast.Name):
            called = _function(self.lineage[index].module, function.id)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
            index, called = self._find(function.attr, 0)
            position += 0 if any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in called.decorator_list) else 1
        else:
            raise UnreadableError(ast.unparse(call))
        if position >= len(called.args.args):
            raise UnreadableError(ast.unparse(call))
        return self._read(called, called.args.args[position].arg, index)


def _key_read(node: ast.AST, mapping: str, module: Module) -> str | None:
    """The option of ``options.pop("option", …)``, ``options.get("option", …)`` or ``options["option"]``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("pop", "get") and node.args:
        owner, key = node.func.value, node.args[0]
    elif isinstance(node, ast.Subscript):
        owner, key = node.value, node.slice
    else:
        return None
    return _text(key, module) if isinstance(owner, ast.Name) and owner.id == mapping else None


def _ignored(
    function: ast.FunctionDef, key_read: Callable[[ast.AST], str | None], take_step: Callable[[], None]
) -> Iterator[str]:
    """Options whose value is assigned to a name that is assigned anew before anything looks at it."""
    body = function.body
    for place, statement in enumerate(body):
        if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
            continue
        option, target = key_read(statement.value), _name(statement.targets[0])
        if option is None or not target:
            continue
        for later in body[place + 1 :]:
            written = isinstance(later, ast.Assign) and target in map(_name, later.targets)
            if _looks_at(later, target, take_step):
                break
            if written:
                yield option
                break


def _looks_at(statement: ast.stmt, target: str, take_step: Callable[[], None]) -> bool:
    """Whether a statement may read ``target``; an attribute may be read by whatever else is done with ``self``."""
    for node in ast.walk(statement):
        take_step()
        if isinstance(node, ast.AugAssign) and _name(node.target) == target:
            return True
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            text = _name(node)
            if text == target or (target.startswith("self.") and text.startswith(("self.", "super"))):
                return True
    return False


def _name(node: ast.AST) -> str:
    """A name, or attributes of one such as ``self.n_agents``; empty for anything else."""
    attributes = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(attributes)]) if isinstance(node, ast.Name) else ""


def _function(module: Module, name: str) -> ast.FunctionDef:
    found = [item for item in module.tree.body if isinstance(item, ast.FunctionDef) and item.name == name]
    if not found:
        raise UnreadableError(name)
    return found[-1]


def _text(node: ast.expr, module: Module) -> str:
    found = evaluate(node, module)
    if not isinstance(found, str):
        raise UnreadableError(ast.unparse(node))
    return found


def _is_not(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
