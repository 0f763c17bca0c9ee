"""YAML with line numbers: values, each with the place where it is written.

PyYAML parses; :mod:`marlkit.recipe.scalars` says what a word means. A file may be a stranger's, so that its size, its depth and
what its aliases stand for are bounded before anything is made of them.
"""

from __future__ import annotations

import json
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from marlkit.errors import Problem, RecipeError
from marlkit.recipe.scalars import MERGE, TAG, Loader, scalar_node, shown, unknown_tag, value_of

LARGEST_FILE = 2_000_000
"""Bytes."""
MOST_VALUES = 15_000
DEEPEST = 50
"""Levels of mappings and lists inside one another."""


@dataclass(frozen=True)
class Place:
    """Where something is written: a file and a line, or a command-line override."""

    source: str
    line: int | None = None
    override: bool = False

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def problem(self, where: str, message: str, remedy: str = "") -> Problem:
        """A problem at this place."""
        return Problem(self.source, self.line, where, message, remedy)


@dataclass(frozen=True)
class Located:
    """A value and its place; the values of a mapping are themselves located.

    ``partial`` marks a mapping that holds only changes, as the override ``env.options.speed=2`` does.
    """

    value: Any
    place: Place
    partial: bool = False

    @property
    def mapping(self) -> Mapping[str, Located] | None:
        """The entries of a mapping; ``None`` for anything else."""
        return self.value if isinstance(self.value, dict) else None

    def plain(self) -> Any:
        """The value without places."""
        if self.mapping is None:
            return self.value
        return {key: entry.plain() for key, entry in self.mapping.items()}


def read_file(path: Path) -> tuple[Located, list[Problem]]:
    """Read a YAML mapping.

    Returns:
        The mapping, and a problem for every duplicate key, of which the first is used.

    Raises:
        RecipeError: the file is missing, no regular file, too large, empty, not text, not YAML, or holds no mapping.
    """
    place = Place(str(path))
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise RecipeError([place.problem("", "is a pipe or a device, not a file.", "Save the recipe in a file.")])
        if found.st_size > LARGEST_FILE:
            message = f"is too large for a recipe: {found.st_size} bytes, at most {LARGEST_FILE}."
            raise RecipeError([place.problem("", message, "Large tables belong into a component.")])
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise RecipeError([place.problem("", f"cannot be read: {getattr(error, 'strerror', error)}.")]) from error
    return read_text(_decoded(content, place), place)


def _decoded(content: bytes, place: Place) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError([place.problem("", "is not a text file in UTF-8 but in UTF-16.", "Save it as UTF-8.")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"is not a text file in UTF-8: it has the byte 0x{content[error.start]:02x}."
        raise RecipeError([Place(place.source, line).problem("", message, "Save it as UTF-8.")]) from error


def read_text(text: str, place: Place) -> tuple[Located, list[Problem]]:
    """:func:`read_file` for text that has been read already."""
    try:
        _refuse_characters(text, place)
        root = _compose(text)
        if root is None:
            raise RecipeError([place.problem("", "is empty.", "`marlkit show mappo` prints a recipe to start from.")])
        line = root.start_mark.line + 1
        if not isinstance(root, yaml.MappingNode):
            _refuse_missing_blank(text, (line,), place)
            raise RecipeError([Place(place.source, line).problem("", "holds no sections.", "Write `section: component` lines.")])
    except yaml.YAMLError as error:
        _refuse_missing_blank(text, _suspects(error, text), place)
        raise RecipeError([_syntax_problem(error, place)]) from error
    blanks = list(_insert_blanks(root, place, set()))
    reader = _Reader(place.source)
    found = reader.located(root, Place(place.source, 1))
    if reader.fatal:
        raise RecipeError([*blanks, *reader.problems, *reader.fatal])
    return found, [*blanks, *reader.problems]


def read_value(text: str, place: Place, where: str) -> Located:
    """Read the value of an override: YAML within ``{}``, ``[]`` or quotes, and otherwise the whole text as one word.

    Raises:
        RecipeError: it is not YAML, or no value of a recipe.
    """
    bare = text.strip()
    try:
        node = _whole(bare) if bare[:1] in ("{", "[", '"', "'") else scalar_node(bare)
    except yaml.YAMLError as error:
        reason = str(getattr(error, "problem", None) or error).rstrip(".")
        raise RecipeError([place.problem(where, f"has a value that is not YAML: {reason}.", _quote(where, text))]) from error
    reader = _Reader(place.source, lines=False)
    try:
        found = reader.located(node, place, where)
        word = isinstance(node, yaml.ScalarNode) and node.style is None and isinstance(found.value, str)
        if word and bare != text:
            reader.fatal.append(place.problem(where, "has blanks around its value.", f"Remove them. {_quote(where, text)}"))
    except yaml.YAMLError as error:
        reader.fatal.append(place.problem(where, f"has a value that is not YAML: {getattr(error, 'problem', error)}."))
    if problems := [*reader.fatal, *reader.problems]:
        raise RecipeError(problems)
    return found


def _whole(text: str) -> yaml.Node:
    """The node that is the whole text, without a comment or a colon behind it."""
    if found := _FORBIDDEN.search(text):
        raise yaml.YAMLError(f"it holds the control character U+{ord(found[0]):04X}")
    node = _compose(text)
    if node is None or node.end_mark.index != len(text) or (isinstance(node, yaml.CollectionNode) and not node.flow_style):
        raise yaml.YAMLError("something follows its end")
    return node


def _quote(where: str, text: str) -> str:
    """How to write an override whose value is `text` and nothing else."""
    bare = text.strip()
    closing = {"{": "}", "[": "]"}.get(bare[:1])
    split = (
        "Where the shell has split it at a blank, quote the whole override. " if closing and not bare.endswith(closing) else ""
    )
    whole = shlex.quote(f"{where}={json.dumps(text, ensure_ascii=False)}")
    return f"{split}Quote the texts in it; for all of it as one text: {whole}."


class _Bounded(Loader):
    """Composes no more and nothing deeper than a recipe may hold."""

    count = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One more value, one level deeper."""
        mark = self.peek_event().start_mark
        self.count += 1
        self.depth += 1
        if self.count > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"it holds more than {MOST_VALUES} values", problem_mark=mark)
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"it is nested deeper than {DEEPEST} levels", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _compose(text: str) -> yaml.Node | None:
    loader = _Bounded(text)
    try:
        found: yaml.Node | None = loader.get_single_node()
    except (ValueError, OverflowError) as error:  # an escape such as "\U99999999"
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=loader.get_mark()) from error
    return found


# All that YAML, or an editor, may take for something that cannot be seen. YAML ends a line at the last three.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]|[\x85\u2028\u2029]")


def _refuse_characters(text: str, place: Place) -> None:
    found = _FORBIDDEN.search(text)
    if found:
        line = len(re.findall(r"\r\n|\r|\n", text[: found.start()])) + 1
        message = f"is not YAML: it holds the control character U+{ord(found[0]):04X}."
        raise RecipeError([Place(place.source, line).problem("", message, "Remove it.")])


@dataclass
class _Reader:
    """Makes values of nodes.

    Attributes:
        source: the file or the override.
        lines: whether the lines of the nodes are those of a file; they belong to an override otherwise.
        problems: duplicate keys, of which the first is used.
        fatal: values that cannot be read.
    """

    source: str
    lines: bool = True
    problems: list[Problem] = field(default_factory=list)
    fatal: list[Problem] = field(default_factory=list)
    count: int = 0
    _open: set[int] = field(default_factory=set)

    def place(self, node: yaml.Node) -> Place:
        """Where a node is written."""
        return Place(self.source, node.start_mark.line + 1) if self.lines else Place(self.source, override=True)

    def located(self, node: yaml.Node, place: Place, where: str = "") -> Located:
        """The value of a node; the entries of a mapping are located, those of a list are not."""
        if not isinstance(node, yaml.MappingNode):
            return Located(self.plain(node, where), place)
        found: dict[str, Located] = {}
        if self._entered(node, where):
            for key, value, at in self._entries(node, where):
                found[key] = self.located(value, at or place, f"{where}.{key}".lstrip("."))
            self._open.discard(id(node))
        return Located(found, place)

    def plain(self, node: yaml.Node, where: str) -> Any:
        """The value of a node without places."""
        if isinstance(node, yaml.ScalarNode):
            self.count += 1
            try:
                return value_of(node)
            except ValueError as error:
                self.fatal.append(self.place(node).problem(where, *error.args))
                return None
        if not self._entered(node, where):
            return None
        if isinstance(node, yaml.MappingNode):
            made: Any = {key: self.plain(value, where) for key, value, _ in self._entries(node, where)}
        else:
            made = [self.plain(item, where) for item in node.value]
        self._open.discard(id(node))
        return made

    def _entered(self, node: yaml.Node, where: str) -> bool:
        """Whether a collection may be read: aliases may neither lead back into it nor multiply without bound."""
        self.count += 1
        plain = TAG + ("map" if isinstance(node, yaml.MappingNode) else "seq")
        if node.tag != plain:
            problem = unknown_tag(node)
        elif id(node) in self._open:
            problem = "holds recursive aliases: an anchor inside itself.", "Write the values out."
        elif self.count > MOST_VALUES or len(self._open) > DEEPEST:
            problem = f"holds aliases that stand for more than {MOST_VALUES} values or {DEEPEST} levels.", "Write the values out."
        else:
            self._open.add(id(node))
            return True
        if not any(found.message == problem[0] for found in self.fatal):
            self.fatal.append(self.place(node).problem(where, *problem))
        return False

    def _entries(self, node: yaml.MappingNode, where: str) -> Iterator[tuple[str, yaml.Node, Place | None]]:
        """The entries of a mapping, then those that it merges in; these have no place of their own."""
        first: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode) or not key.value or not key.value.isprintable():
                self.fatal.append(self.place(key).problem(where, "has a key that is no word.", "Write `key: value`."))
            elif key.value in first:
                message = f"duplicate key `{shown(key.value)}`, which line {first[key.value].start_mark.line + 1} gives already."
                self.problems.append(self.place(key).problem("", message, "Keep one of them."))
            else:
                first[key.value] = key
                yield key.value, value, self.place(key)
        for key, value in self._merged(node, where):
            if key not in first:
                first[key] = value
                yield key, value, None

    def _merged(self, node: yaml.MappingNode, where: str) -> Iterator[tuple[str, yaml.Node]]:
        for key, value in node.value:
            for source in () if key.tag != MERGE else value.value if isinstance(value, yaml.SequenceNode) else (value,):
                if not isinstance(source, yaml.MappingNode):
                    message = "merges something that is no mapping (`<<`)."
                    self.fatal.append(self.place(key).problem(where, message, "Write `<<: *anchor`."))
                elif self._entered(source, where):
                    yield from ((name, entry) for name, entry, _ in self._entries(source, where))
                    self._open.discard(id(source))


def _insert_blanks(node: yaml.Node, place: Place, seen: set[int]) -> Iterator[Problem]:
    """Read `{lr:0.1}`, in YAML a key `lr:0.1` without a value, as `{lr: 0.1}`, so that the rest is checked too."""
    if id(node) in seen:
        return  # an alias
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _insert_blanks(item, place, seen)
    if isinstance(node, yaml.MappingNode):
        for index, (key, value) in enumerate(node.value):
            bare = isinstance(key, yaml.ScalarNode) and key.style is None and isinstance(value, yaml.ScalarNode)
            found = _NO_BLANK.fullmatch(key.value) if bare and value.start_mark.index == value.end_mark.index else None
            if found is None:
                yield from _insert_blanks(value, place, seen)
                continue
            yield _missing_blank(found, Place(place.source, key.start_mark.line + 1))
            node.value[index] = tuple(scalar_node(part, key) for part in found.groups())


_NO_BLANK = re.compile(r"([A-Za-z_]\w*):([^\s/][^#]*?)")


def _missing_blank(found: re.Match[str], place: Place) -> Problem:
    return place.problem("", f"`{found[0]}` has no blank after its colon.", f"Write `{found[1]}: {found[2]}`.")


def _refuse_missing_blank(text: str, lines: Sequence[int], place: Place) -> None:
    """Report a missing blank after a colon, for which YAML's own message is unclear.

    Raises:
        RecipeError: one of ``lines`` has no blank after the colon of its key.
    """
    for number in lines:
        content = re.sub(r"\s#.*", "", text.splitlines()[number - 1]).strip()
        found = _NO_BLANK.fullmatch(content.removeprefix("- "))
        if found:
            raise RecipeError([_missing_blank(found, Place(place.source, number))])


def _suspects(error: yaml.YAMLError, text: str) -> list[int]:
    """The lines at which an error was noticed, each after the last line with content before it, which may continue there."""
    marks = [getattr(error, name, None) for name in ("context_mark", "problem_mark")]
    lines = text.splitlines()
    content = [number for number, line in enumerate(lines, 1) if not re.match(r"\s*(#|$)", line)]
    noticed = [mark.line + 1 for mark in marks if mark is not None and mark.line < len(lines)]
    return [number for last in noticed for number in (*[n for n in content if n < last][-1:], last)]


_REMEDIES = {
    "'\\t'": "Indent with blanks instead of tabs.",
    "single document": "A recipe is one document: remove the second `---`.",
    "another document": "A recipe is one document: remove the second `---`.",
    "mapping values are not allowed": "Quote a text with a colon, and indent the options of a section alike.",
    "cannot start any token": "Quote a text that begins with this character.",
    "undefined alias": "Name it with `&` before it is used, or quote the text.",
}


def _syntax_problem(error: yaml.YAMLError, place: Place) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).rstrip(".")
    context = getattr(error, "context", None)
    line = None if mark is None else mark.line + 1
    said = f"{reason}{f' ({context})' if context else ''}"
    usual = "`marlkit show mappo` prints a recipe to compare with."
    remedy = next((text for part, text in _REMEDIES.items() if part in said), usual)
    return Place(place.source, line).problem("", f"is not YAML: {said}.", remedy)
