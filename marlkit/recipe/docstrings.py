"""Google-style docstrings: their text and the descriptions in its ``Args:`` section."""

from __future__ import annotations

import ast
import re

_ARGUMENT = re.compile(r"^(\w+)(?: \([^)]*\))?: (.*)$")


def of(node: ast.ClassDef | ast.Module) -> str:
    """Docstring of a parsed class or module, its indentation removed; empty if it has none."""
    return ast.get_docstring(node) or ""


def first_paragraph(docstring: str) -> str:
    """The first paragraph, on one line."""
    return " ".join(docstring.partition("\n\n")[0].split())


def arguments(docstring: str) -> dict[str, str]:
    """Descriptions in the ``Args:`` section by name, each on one line."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in _section(docstring, "Args:"):
        indent = len(line) - len(line.lstrip())
        match = _ARGUMENT.match(line.strip())
        if indent <= 4 and match:
            current = found.setdefault(match[1], [match[2]])
        elif current is not None and indent > 4:
            current.append(line.strip())
    return {name: " ".join(lines) for name, lines in found.items()}


def _section(docstring: str, title: str) -> list[str]:
    lines = docstring.splitlines()
    if title not in lines:
        return []
    inside = []
    for line in lines[lines.index(title) + 1 :]:
        if line.strip() and not line.startswith(" "):
            break
        if line.strip():
            inside.append(line)
    return inside
