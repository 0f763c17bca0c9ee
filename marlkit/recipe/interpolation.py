"""``${section.option}`` in a recipe: what it may refer to, how much it may stand for, and text that is meant literally.

A recipe may be a stranger's, and a few lines of references to references stand for more text than memory holds. So the size of
what each stands for is computed before OmegaConf resolves any. That takes names that are written out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

MOST_RESOLVED = 50_000
"""Values, or stretches of a hundred characters, that all interpolations of a recipe stand for together."""
LONGEST_CHAIN = 50

_ESCAPED = re.compile(r"(?<!\\)(?:\\\\)*\\\$\{")
_LITERAL = re.compile(r"\\+\$\{")
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:[^${}\\]*\}")
_NESTED_NAME = re.compile(r"\$\{[\s.\w\[\]]*\$\{")
_NAMES = re.compile(r"[.\w\[\]]+")


def literal(text: str) -> str:
    """Text as OmegaConf has to be given it to give it back."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", _not_missing(text))


def literals(value: Any) -> Any:
    """A value with :func:`literal` text, however deep."""
    return _with_text(value, literal)


def meant(value: Any) -> Any:
    """A value of which OmegaConf has taken no escapes as it is meant; texts with interpolations as they are written."""
    return _with_text(value, lambda text: text if "${" in _ESCAPED.sub(" ", text) else _LITERAL.sub(_unescaped, text))


def _unescaped(found: re.Match[str]) -> str:
    return found[0][: (len(found[0]) - 3) // 2] + "${"


def escape_missing(value: Any) -> Any:
    """A value as it was before OmegaConf's ``to_container``, which takes the backslash before ``???`` and no other."""
    return _with_text(value, _not_missing)


def _not_missing(text: str) -> str:
    return f"\\{text}" if text.lstrip("\\") == "???" else text


def _with_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _with_text(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_text(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


def references(text: str) -> list[str]:
    """The names that an interpolated text may refer to; too many rather than too few.

    Raises:
        ValueError: they cannot be read off the text; its arguments are why, and what to write instead.
    """
    bare = _VARIABLE.sub(" ", _ESCAPED.sub(" ", text))
    if _NESTED_NAME.search(bare):
        raise ValueError("has an interpolation inside the name of another.", "Write `${section.option}`.")
    return _NAMES.findall(bare) if "${" in bare else []


class Sizes:
    """How much each value of a configuration stands for when its interpolations are resolved.

    Args:
        config: plain mappings, lists and values.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._known: dict[tuple[str, ...], int] = {}
        self._open: set[tuple[str, ...]] = set()

    def problem(self) -> tuple[tuple[str, ...], str, str] | None:
        """The path of the first value that goes beyond a limit, why, and a remedy."""
        total = 0
        for path, text in interpolated(self.config).items():
            try:
                total += self.of(path, text)
            except ValueError as error:
                return (path, *error.args)
            if total > MOST_RESOLVED:
                message = f"interpolations stand for more than {MOST_RESOLVED} values or {MOST_RESOLVED} × 100 characters."
                return path, message, "Write the values out."
        return None

    def of(self, path: tuple[str, ...], value: Any) -> int:
        """Values that the value at `path` stands for."""
        if path in self._open:
            raise ValueError(f"interpolations lead in a circle through `{'.'.join(path)}`.", "Write one of the values out.")
        if path not in self._known:
            if len(self._open) > LONGEST_CHAIN:
                raise ValueError(
                    f"interpolations refer to one another over more than {LONGEST_CHAIN} steps.", "Write the value out."
                )
            self._open.add(path)
            self._known[path] = self._sum(path, value)
            self._open.discard(path)
        return self._known[path]

    def _sum(self, path: tuple[str, ...], value: Any) -> int:
        if isinstance(value, (dict, list)):
            return 1 + sum(self.of((*path, name), entry) for name, entry in entries(value))
        if not isinstance(value, str):
            return 1
        names = references(value) if "${" in value else []
        targets = [target for name in names for target in [self._target(path, name)] if target is not None]
        return 1 + len(value) // 100 + sum(self.of(target, _get(self.config, target)) for target in targets)

    def _target(self, path: tuple[str, ...], name: str) -> tuple[str, ...] | None:
        levels = len(name) - len(name.lstrip("."))
        keys = [key for key in re.split(r"[.\[\]]+", name) if key]
        target = (*path[: max(0, len(path) - levels)], *keys) if levels else tuple(keys)
        return target if target and _get(self.config, target) is not None else None


def interpolated(config: Any) -> dict[tuple[str, ...], str]:
    """Every text with an interpolation, by its path."""
    found: dict[tuple[str, ...], str] = {}

    def look(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, (dict, list)):
            for name, entry in entries(value):
                look(entry, (*path, name))
        elif isinstance(value, str) and "${" in value:
            found[path] = value

    look(config, ())
    return found


def leaves(value: Any) -> Iterator[Any]:
    """The values in mappings and lists, however deep."""
    if isinstance(value, (dict, list)):
        for _, entry in entries(value):
            yield from leaves(entry)
    else:
        yield value


def entries(value: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a mapping or a list, with their keys or places as text."""
    return ((str(index), entry) for index, entry in (value.items() if isinstance(value, dict) else enumerate(value)))


def _get(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value
