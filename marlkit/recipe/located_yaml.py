"""YAML with line numbers: values as OmegaConf reads them, each with the place where it is written.

OmegaConf reads the values (``3e-4`` is a number, a duplicate key is an error); the lines come from the parsed nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from marlkit.errors import Problem, RecipeError


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


def locate(value: Any, place: Place) -> Located:
    """A plain value with one place for all its parts."""
    if isinstance(value, Mapping):
        return Located({str(key): locate(entry, place) for key, entry in value.items()}, place)
    return Located(value, place)


def read_file(path: Path) -> tuple[Located, list[Problem]]:
    """Read a YAML mapping.

    Returns:
        The mapping, and a problem for every duplicate key, of which the first is used.

    Raises:
        RecipeError: the file is missing, empty, not text, not YAML, or holds no mapping.
    """
    place = Place(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError([place.problem("", f"is not a text file ({error.reason}).")]) from error
    except OSError as error:
        raise RecipeError([place.problem("", f"cannot be read: {error.strerror}.")]) from error
    return read_text(text, place)


def read_text(text: str, place: Place) -> tuple[Located, list[Problem]]:
    """:func:`read_file` for text that has been read already."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise RecipeError([place.problem("", "is empty.", "`marlkit show mappo` prints a recipe to start from.")])
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            _refuse_missing_blank(text, (line,), place)
            raise RecipeError([Place(place.source, line).problem("", "holds no sections.", "Write `section: component` lines.")])
        config, problems = _values(text, root, place)
    except yaml.YAMLError as error:
        _refuse_missing_blank(text, _suspects(error, text), place)
        raise RecipeError([_syntax_problem(error, place)]) from error
    except (OmegaConfBaseException, RecursionError) as error:
        at = Place(place.source, _line_of_bad_interpolation(text))
        raise RecipeError([at.problem("", f"is no recipe: {str(error).splitlines()[0]}.")]) from error
    return _located(config, root, Place(place.source, 1)), problems


def _values(text: str, root: yaml.MappingNode, place: Place) -> tuple[Any, list[Problem]]:
    config = None
    try:
        config = OmegaConf.create(text)
    except yaml.constructor.ConstructorError as error:
        if "duplicate key" not in str(error.problem):
            raise
    problems = list(_insert_blanks(root, place))
    if config is None or problems:
        # OmegaConf stops at the first duplicate; they are removed so that the rest of the recipe is checked too.
        problems += _remove_duplicates(root, place)
        config = OmegaConf.create(yaml.serialize(root, Dumper=yaml.SafeDumper))
    return OmegaConf.to_container(config, resolve=False), problems


def _insert_blanks(node: yaml.Node, place: Place) -> Iterator[Problem]:
    """Read `{lr:0.1}`, in YAML a key `lr:0.1` without a value, as `{lr: 0.1}`, so that the rest is checked too."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _insert_blanks(item, place)
    if isinstance(node, yaml.MappingNode):
        for index, (key, value) in enumerate(node.value):
            bare = isinstance(key, yaml.ScalarNode) and key.style is None and isinstance(value, yaml.ScalarNode)
            found = _NO_BLANK.fullmatch(key.value) if bare and value.start_mark.index == value.end_mark.index else None
            if found is None:
                yield from _insert_blanks(value, place)
                continue
            yield _missing_blank(found, Place(place.source, key.start_mark.line + 1))
            node.value[index] = tuple(_scalar(part, key) for part in found.groups())


def _scalar(text: str, at: yaml.Node) -> yaml.ScalarNode:
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text, at.start_mark, at.end_mark)


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


def _remove_duplicates(node: yaml.Node, place: Place) -> Iterator[Problem]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _remove_duplicates(item, place)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, yaml.Node] = {}
        for key, value in list(node.value):
            if key.value in first:
                line = first[key.value].start_mark.line + 1
                here = Place(place.source, key.start_mark.line + 1)
                yield here.problem("", f"duplicate key `{key.value}`, which line {line} gives already.", "Keep one of them.")
                node.value.remove((key, value))
            else:
                first[key.value] = key
                yield from _remove_duplicates(value, place)


def _syntax_problem(error: yaml.YAMLError, place: Place) -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    line = None if mark is None else mark.line + 1
    return Place(place.source, line).problem("", f"is not YAML: {str(reason).rstrip('.')}{f' ({context})' if context else ''}.")


def _line_of_bad_interpolation(text: str) -> int | None:
    """Line of the first ``${…}`` that OmegaConf cannot read; its own message has none."""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            OmegaConf.create({"line": line})
        except OmegaConfBaseException:
            return number
    return None


def _located(value: Any, node: yaml.Node | None, place: Place) -> Located:
    """Combine a value with the node that it was read from; values from a merge key have the place of the merge."""
    if not isinstance(value, dict):
        return Located(value, place)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    nodes = {key.value: (key, child) for key, child in pairs if isinstance(key, yaml.ScalarNode)}
    entries = {}
    for name, entry in value.items():
        key, child = nodes.get(str(name), (None, None))
        here = place if key is None else Place(place.source, key.start_mark.line + 1)
        entries[str(name)] = _located(entry, child, here)
    return Located(entries, place)
