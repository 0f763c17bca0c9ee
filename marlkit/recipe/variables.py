"""Environment variables in a recipe: ``project: ${oc.env:WANDB_PROJECT}``.

A variable is kept as written in all that is printed or stored, and read when the component that takes it is built. Of OmegaConf's
functions only this one may be used; ``${section.option}`` is replaced by its value when a recipe is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

FUNCTION = "oc.env"
HIDDEN = "⟨environment variable⟩"
"""Stands for the value of a variable while a recipe is read and checked."""

Report = Callable[[str, str, str], None]


@dataclass
class Variables:
    """The environment variables that a recipe reads.

    Attributes:
        report: called with path, message and remedy of every problem.
        may_read: whether the option at a path may come from a variable.
        names: the variables by the path where they are written.
    """

    report: Report
    may_read: Callable[[str], bool]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def hide(self, value: Any, path: str = "") -> Any:
        """``value`` with :data:`HIDDEN` instead of every text that reads a variable."""
        if isinstance(value, dict):
            return {key: self.hide(entry, f"{path}.{key}" if path else str(key)) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(entry, f"{path}.{index}") for index, entry in enumerate(value)]
        return self._hidden(value, path) if isinstance(value, str) and "${" in value else value

    def _hidden(self, text: str, path: str) -> str | None:
        try:
            calls = list(_calls(text))
        except (OmegaConfBaseException, RecursionError) as error:
            self.report(
                path, f"holds an interpolation that cannot be read: {str(error).splitlines()[0]}.", "Write the value out."
            )
            return None
        names = tuple(_variable(arguments) for _, arguments in calls)
        other = next((function for function, _ in calls if function != FUNCTION), None)
        if not calls:
            return text
        if other is not None:
            self.report(
                path, f"cannot use the function `{other}`.", f"A recipe may use ${{section.option}} and ${{{FUNCTION}:NAME}}."
            )
        elif "" in names:
            form = f"Write ${{{FUNCTION}:NAME}} or ${{{FUNCTION}:NAME,default}}, without `${{…}}` inside."
            self.report(path, f"`{text}` does not name an environment variable.", form)
        elif not self.may_read(path):
            remedy = "Only an option that takes text can, so that a run records all its numbers: write an override."
            self.report(path, "cannot come from an environment variable.", remedy)
        else:
            self.names[path] = names
            return HIDDEN
        return None


def as_written(value: Any, written: Any) -> Any:
    """``value`` with the text that was ``written`` wherever a hidden variable has gone into it."""
    if isinstance(value, dict) and isinstance(written, dict):
        return {key: as_written(entry, written.get(key)) for key, entry in value.items()}
    if isinstance(value, list) and isinstance(written, (list, tuple)):
        return [as_written(entry, own) for entry, own in zip(value, written, strict=True)]
    return written if isinstance(written, str) and _holds_hidden(value) else value


def _holds_hidden(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_hidden, value.values()))
    return any(map(_holds_hidden, value)) if isinstance(value, list) else isinstance(value, str) and HIDDEN in value


def _calls(text: str) -> Iterator[tuple[str, str]]:
    """Every ``${function:arguments}`` in a text, also inside another one."""
    waiting: list[Any] = [parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            given = node.sequence()
            yield node.resolverName().getText(), "" if given is None else given.getText()
        waiting.extend(getattr(node, "children", None) or [])


def _variable(arguments: str) -> str:
    """The name of the variable; empty where it is none, or depends on another value."""
    name = arguments.partition(",")[0].strip()
    return name if re.fullmatch(r"[A-Za-z_]\w*", name) and "${" not in arguments else ""
