"""The components that a recipe can name, read from their source without importing them.

A component of marlkit is a public class ``<Name><Suffix>`` in a public module of its kind's package; its name in a recipe is the
snake case of ``<Name>``. Other components are named by a dotted path, ``my_package.my_critic.MyCritic``. Reading source instead
of importing makes ``marlkit check`` fast and checks an untrusted recipe without running its code; :func:`load_class` is the only
function here that imports.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlkit.contract import KINDS, Contract, Kind, When
from marlkit.errors import ComponentError, did_you_mean
from marlkit.options import with_those_above
from marlkit.recipe import docstrings
from marlkit.recipe.scalars import shown
from marlkit.recipe.source_reader import LARGEST_FILE, Class, KindStub, Module, Sources, annotation, attribute, evaluate

REQUIRED: Any = inspect.Parameter.empty
"""The default of an option that must be given."""

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Option:
    """One option of a component: a keyword-only argument of its constructor."""

    name: str
    annotation: Any
    default: Any
    description: str = ""

    @property
    def required(self) -> bool:
        """Whether a recipe must set it."""
        return self.default is REQUIRED

    @property
    def part(self) -> Kind | None:
        """The kind of component that is its value, for an option such as ``step: Update``."""
        candidates = (self.annotation, *typing.get_args(self.annotation))
        return next((c.kind for c in candidates if isinstance(c, type) and issubclass(c, KindStub)), None)


@dataclass(frozen=True)
class Entry:
    """A component, as described by its source.

    Attributes:
        kind: the section that it fills.
        name: its name in a recipe.
        module, class_name: where to import it from.
        file, line: where it is defined.
        docstring: of the class, or of the nearest base class that has one.
        summary: the first paragraph of its module's docstring, or of the class's where the module holds several.
        options: its options by name, in the order of the constructor, then of the base classes that it passes options to.
        contract: the keys that it reads and writes, its needs and traits.
        trusted: whether its contract is marlkit's own, so that the contract's ``check`` may be called.
        code: the ``code`` of its contract and of those of its base classes, as far as they are marlkit's own.
    """

    kind: Kind
    name: str
    module: str
    class_name: str
    file: Path
    line: int
    docstring: str
    summary: str
    options: Mapping[str, Option]
    contract: Contract
    trusted: bool
    code: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether it is one of marlkit's own components."""
        return _is_own(self.module, self.file)

    @property
    def dotted(self) -> str:
        """Dotted path of the class."""
        return f"{self.module}.{self.class_name}"

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """The default of each option; :data:`REQUIRED` for an option that a recipe must set."""
        return {name: option.default for name, option in self.options.items()}

    def ask(self, function: str, options: Mapping[str, Any], folders: Sequence[Path]) -> Any:
        """What a ``"module:function"`` of a trusted contract says of ``options``."""
        assert self.trusted, "only marlkit's own contracts may name functions"
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(options, folders)

    def held(self, option: str, options: Mapping[str, Any], folders: Sequence[Path]) -> frozenset[str] | None:
        """The names that the mapping ``option`` is known to take where the others are ``options``; see :class:`Contract`."""
        if not self.trusted or option not in self.contract.holds:
            return None
        found: frozenset[str] | None = self.ask(self.contract.holds[option][1], options, folders)
        return found


MOST_FILES = 200
"""Files that are looked into for the class that a wrong name may mean."""


def names(kind: Kind) -> dict[str, tuple[str, str]]:
    """Names of marlkit's own components of a kind, each with its module and class, in alphabetical order."""
    folder = PACKAGE.joinpath(*kind.package.split(".")[1:])
    pattern = re.compile(rf"^class ([A-Z]\w*){kind.suffix}\(", re.MULTILINE)
    found = {}
    for file in sorted(folder.glob("[!_]*.py")):
        for match in pattern.finditer(file.read_text(encoding="utf-8")):
            found[_recipe_name(match[1], file.stem)] = (f"{kind.package}.{file.stem}", match[1] + kind.suffix)
    return dict(sorted(found.items()))


def _recipe_name(word: str, stem: str) -> str:
    # The file name determines the word boundaries of a name such as TorchRL, which snake case would split as torch_rl.
    if word.lower() == stem.replace("_", ""):
        return stem
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", word).lower()


def components(kind: Kind | str) -> dict[str, Entry]:
    """All of marlkit's own components of a kind, by the name that a recipe uses."""
    return dict(_components(kind if isinstance(kind, str) else kind.section))


@functools.lru_cache
def _components(section: str) -> dict[str, Entry]:
    # Cached: marlkit's own source does not change while it runs.
    kind, sources = KINDS[section], Sources()
    found = {name: _class(f"{module}.{class_name}", sources) for name, (module, class_name) in names(kind).items()}
    return {name: _entry(kind, name, cls) for name, cls in found.items() if not cls.abstract}


def find(kind: Kind | str, name: str, folders: Sequence[Path] = ()) -> Entry:
    """The component ``name`` of a section.

    Args:
        kind: the section.
        name: the name of one of marlkit's components, or a dotted path.
        folders: where to look for a dotted path after Python's own search path.

    Raises:
        ComponentError: there is none of that name, it is of another kind, or its source cannot be read.
    """
    kind = KINDS[kind] if isinstance(kind, str) else kind
    if "." in name:
        try:
            return _find_dotted(kind, name, folders)
        except (RecursionError, OSError, ValueError) as error:  # of a stranger's file or of its name
            raise ComponentError(f"`{shown(name)}` cannot be read: {error}") from error
    own = names(kind)
    if name not in own:
        raise ComponentError(_unknown(kind, name, own, folders))
    module, class_name = own[name]
    return _entry(kind, name, _class(f"{module}.{class_name}", Sources()))


def _unknown(kind: Kind, name: str, own: Mapping[str, Any], folders: Sequence[Path]) -> str:
    elsewhere = [other.section for other in KINDS.values() if name in names(other)]
    if elsewhere:
        return f"`{name}` belongs in section `{elsewhere[0]}`; for `{kind.section}` there are: {', '.join(own)}"
    listed = ", ".join(own)
    beside = ((file.stem, found) for file, found in _beside(kind, folders))
    meant = [f"{stem}.{found}" for stem, found in beside if name in (stem, found, f"{stem}:{found}")]
    hint = f" Write `{meant[0]}`." if meant else did_you_mean(name, own)
    return f"there is no {kind.section} called `{name}`.{hint} There are: {listed}; or the dotted path of a class of your own"


def _beside(kind: Kind, folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Classes in the files of some folders whose names end as those of a kind do; nothing is run."""
    pattern = re.compile(rf"^class (\w+{kind.suffix})\(", re.MULTILINE)
    for file in itertools.islice((file for folder in folders for file in sorted(Path(folder).glob("*.py"))), MOST_FILES):
        try:
            small = file.stat().st_size < LARGEST_FILE
            found = pattern.findall(file.read_text(encoding="utf-8")) if small and file.is_file() else []
        except (OSError, ValueError):
            continue
        yield from ((file, name) for name in found)


def _find_dotted(kind: Kind, name: str, folders: Sequence[Path]) -> Entry:
    cls = _class(name, Sources(folders))
    if kind not in cls.kinds:
        if not cls.kinds:
            raise ComponentError(f"`{name}` is no component: the class does not extend `{kind.base}`")
        raise ComponentError(f"`{name}` is a component for section `{cls.kinds[0].section}`, not for `{kind.section}`")
    return _entry(kind, name, cls)


def _class(dotted: str, sources: Sources) -> Class:
    module_name, _, class_name = dotted.rpartition(".")
    try:
        module = _module(module_name, sources)
    except ComponentError as error:
        raise ComponentError(f"`{dotted}` is no component: {error}") from error
    if not isinstance(module, Module):
        raise ComponentError(f"`{dotted}` is no component")
    try:
        found = attribute(module, class_name)
    except ComponentError:
        found = None
    if not isinstance(found, Class):
        classes = [n for n, statement in module.bindings.items() if type(statement).__name__ == "ClassDef"]
        hint = did_you_mean(class_name, classes)
        raise ComponentError(f"`{dotted}` is no component: `{module_name}` has no class `{class_name}`.{hint}")
    return found


def _module(name: str, sources: Sources) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ComponentError("a dotted path has the form `package.module.Class`")
    return sources.module(name)


def _entry(kind: Kind, name: str, cls: Class) -> Entry:
    owner = next((member for member in cls.lineage if member.assigned("contract") is not None), None)
    contract = Contract() if owner is None else _contract(owner)
    docstring = next((text for text in map(docstrings.of, (c.node for c in cls.lineage)) if text), "")
    options = _options(cls.lineage)
    inside = owner is None or _is_own(owner.module.name, owner.module.file)
    place = (cls.module.name, cls.node.name, cls.module.file, cls.node.lineno)
    summary = _summary(kind, cls, docstring)
    return Entry(kind, name, *place, docstring, summary, options, contract, inside, _code(cls.lineage))


def _is_own(module: str, file: Path) -> bool:
    return module.startswith("marlkit.") and file.is_relative_to(PACKAGE)


def _code(lineage: Sequence[Class]) -> tuple[str, ...]:
    # Of base classes too: a contract of the user's own may leave out what the constructor of the base class imports.
    own = (cls for cls in lineage if _is_own(cls.module.name, cls.module.file) and cls.assigned("contract") is not None)
    return tuple(dict.fromkeys(code for code in (_contract(cls).code for cls in own) if code is not None))


def _summary(kind: Kind, cls: Class, docstring: str) -> str:
    # An imported base, such as `JointLossUpdate`, does not count.
    alike = [n for n, found in cls.module.bindings.items() if type(found).__name__ == "ClassDef" and n.endswith(kind.suffix)]
    of_file = docstrings.of(cls.module.tree) if len(alike) == 1 else ""
    return docstrings.first_paragraph(of_file or docstring)


def _contract(owner: Class) -> Contract:
    expression = owner.assigned("contract")
    assert expression is not None
    try:
        found = evaluate(expression, owner.module)
    except ComponentError as error:
        raise ComponentError(f"the contract of `{owner.dotted}` cannot be read: {error}") from error
    if not isinstance(found, Contract):
        raise ComponentError(f"{owner.module.file}:{expression.lineno}: the contract of `{owner.dotted}` is no Contract(...)")
    if wrong := _wrong_field(found):
        raise ComponentError(
            f"{owner.module.file}:{expression.lineno}: `{wrong}` of the contract of `{owner.dotted}` is "
            f"{_is_a_word(getattr(found, wrong)) or 'malformed'}"
        )
    return found


def _is_a_word(value: Any) -> str | None:
    """What to say of a word in place of a tuple, or of a table with one."""
    words = [entry for entry in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(entry, str)]
    return f'one word: a tuple of one needs a comma, `("{words[0]}",)`' if words else None


def _wrong_field(contract: Contract) -> str | None:
    """The first field of a contract that is not of its type; annotations of a class are not enforced."""

    def is_word(item: Any) -> bool:
        return isinstance(item, str)

    def is_key(item: Any) -> bool:
        return is_word(item) or (isinstance(item, tuple) and bool(item) and all(map(is_word, item)))

    def is_list(items: Any, fits: Callable[[Any], bool]) -> bool:
        return isinstance(items, (tuple, list)) and all(
            (is_word(item.condition) and is_list(item.then, fits)) if isinstance(item, When) else fits(item) for item in items
        )

    def is_choice(items: Any) -> bool:
        return bool(items) and is_list(items, is_key) and all(isinstance(item, When) and len(item.then) == 1 for item in items)

    def is_table(table: Any) -> bool:
        return isinstance(table, Mapping) and all(is_word(name) and is_list(items, is_word) for name, items in table.items())

    def is_advice(table: Any) -> bool:
        return isinstance(table, Mapping) and all(is_word(word) for item in table.items() for word in item)

    functions = {"check": contract.check, "derives": contract.derives, "code": contract.code}
    fits = {
        "reads": is_list(contract.reads, is_key),
        "writes": is_list(contract.writes, is_key),
        "traits": is_list(contract.traits, is_word),
        "needs": is_table(contract.needs),
        "prefers": isinstance(contract.prefers, Mapping)
        and all(is_word(target) and is_advice(wanted) for target, wanted in contract.prefers.items()),
        "predicts": contract.predicts is None or is_key(contract.predicts) or is_choice(contract.predicts),
        "inherits": is_list(contract.inherits, is_word),
        "without": is_list(contract.without, is_word),
        "at_most": is_table(contract.at_most),
        **{name: value is None or is_word(value) for name, value in functions.items()},
        "formerly": isinstance(contract.formerly, Mapping) and all(map(is_word, contract.formerly)),
        "holds": is_table(contract.holds) and all(len(pair) == 2 for pair in contract.holds.values()),
    }
    return next((name for name, right in fits.items() if not right), None)


def _options(lineage: Sequence[Class]) -> dict[str, Option]:
    """Options of the nearest constructor; where it ends in ``**options``, also those of the base class.

    Each has its default in the nearest constructor that names it, and its description in the nearest docstring that tells of it.
    """
    found: dict[str, Option] = {}
    for cls, constructor in ((member, member.constructor) for member in lineage):
        if constructor is not None:
            found = with_those_above(found, _own_options(cls, constructor))
            if constructor.args.kwarg is None:
                break
    described = {n: text for member in reversed(lineage) for n, text in docstrings.arguments(docstrings.of(member.node)).items()}
    return {name: dataclasses.replace(option, description=described.get(name, "")) for name, option in found.items()}


def _own_options(cls: Class, constructor: ast.FunctionDef) -> dict[str, Option]:
    """The keyword-only arguments of a constructor."""
    own = {}
    for argument, default in zip(constructor.args.kwonlyargs, constructor.args.kw_defaults, strict=True):
        try:
            value = REQUIRED if default is None else evaluate(default, cls.module)
        except ComponentError as error:
            raise ComponentError(f"the default of option `{argument.arg}` of `{cls.dotted}` cannot be read: {error}") from error
        if value is not REQUIRED and not _is_plain(value):
            raise ComponentError(f"the default of option `{argument.arg}` of `{cls.dotted}` is no value that a recipe can hold")
        own[argument.arg] = Option(argument.arg, annotation(argument.annotation, cls.module), value)
    return own


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, tuple)):
        return depth < 20 and all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return depth < 20 and all(isinstance(name, str) and _is_plain(entry, depth + 1) for name, entry in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def extend_search_path(module: str, file: Path | None, folders: Sequence[Path]) -> None:
    """Let Python find ``module``, whose ``file`` is in one of ``folders``; the others are not searched."""
    if file is None:
        return
    levels = len(module.split(".")) - (file.name != "__init__.py")
    root = file.resolve().parents[levels]
    # At the end, so that a file beside a recipe can never shadow a library.
    if str(root) not in sys.path and root in {Path(folder).resolve() for folder in folders}:
        sys.path.append(str(root))


def load_class(entry: Entry, folders: Sequence[Path] = ()) -> type:
    """Import the class that ``entry`` describes. This runs the module's code.

    Raises:
        ComponentError: the import fails, or Python finds another file than the one that was checked.
    """
    extend_search_path(entry.module, entry.file, folders)
    try:
        module = importlib.import_module(entry.module)
    except Exception as error:  # whatever the module does
        raise ComponentError(f"`{entry.dotted}` cannot be imported: {type(error).__name__}: {error}") from error
    file = Path(getattr(module, "__file__", None) or "")
    if file.resolve() != entry.file.resolve():
        raise ComponentError(f"`{entry.module}` was checked in {entry.file} but imported from {file}: rename one of the two")
    return typing.cast(type, getattr(module, entry.class_name))
