"""What a recipe would do beyond marlkit's own code, and whether the user has agreed to it (`docs/security.md`).

Reading a recipe imports nothing. Before the first component is built, :func:`require_trust` lists what the recipe names outside
of marlkit: classes of components, functions, environment variables. It passes if the user has typed the name (an override), says
so (``--trust``, ``trust=True``), or has said so before: what was trusted is kept in the user's own configuration folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlkit.contract import Code
from marlkit.errors import ComponentError, RecipeError, TrustError
from marlkit.options import names_code
from marlkit.recipe.catalogue import Entry, extend_search_path
from marlkit.recipe.located_yaml import Place
from marlkit.recipe.reading import Recipe
from marlkit.recipe.source_reader import Sources

REMEDY = "Nothing of it has been done. If you have read it and trust it, repeat with --trust (in Python: trust=True)"


@dataclass(frozen=True)
class Foreign:
    """One thing that a recipe would do beyond marlkit's own code.

    Attributes:
        where: path in the recipe.
        place: where that is written.
        words: what would be done.
        record: one line of JSON that stands for it in the user's configuration folder.
        module, file: what would be imported, and from where; empty and ``None`` where nothing would be.
    """

    where: str
    place: Place
    words: str
    record: str
    module: str = ""
    file: Path | None = None

    def __str__(self) -> str:
        return f"{self.place}: {self.where}: {self.words}"


def require_trust(recipe: Recipe, *sections: str) -> None:
    """Pass if the user agrees to all that ``recipe`` would do beyond marlkit's own code; it can be imported then.

    Args:
        recipe: a checked recipe.
        sections: those that are about to be built; none for all.

    Raises:
        TrustError: the user has not yet agreed; lists everything that would be done.
        RecipeError: a name stands for two files.
    """
    needs = [need for need in foreign(recipe) if not sections or need.where.partition(".")[0] in sections]
    if not needs:
        return
    known = _remembered()
    new = [need for need in needs if need.record not in known]
    if any(not need.place.override for need in new) and not recipe.trust:
        raise TrustError(_refusal(recipe, new))
    _remember(need.record for need in new)
    for need in needs:
        extend_search_path(need.module, need.file, recipe.folders)


def foreign(recipe: Recipe) -> list[Foreign]:
    """All that ``recipe`` would do beyond marlkit's own code, found without importing anything."""
    found = []
    sources = Sources(recipe.folders)
    for path, entry in recipe.entries.items():
        if not entry.own:
            found.append(_code(recipe, f"{path}.type", Code("type", entry.dotted), sources))
        found += [_code(recipe, f"{path}.{code.option}", code, sources) for code in _named(entry, recipe.options(path))]
    for path, names in recipe.variables.items():
        words = f"reads the environment variable {' and '.join(f'`{name}`' for name in names)}"
        record = json.dumps({"reads": names, "into": path})
        found.append(Foreign(path, recipe.place(path), words, record))
    return found


def _named(entry: Entry, options: Mapping[str, Any]) -> Iterator[Code]:
    for function in entry.code:
        module, _, name = function.partition(":")
        yield from getattr(importlib.import_module(module), name)(options)
    if not entry.code:
        for name, option in entry.options.items():
            if names_code(option.annotation) and options.get(name) is not None:
                yield Code(name, str(options[name]))


def _code(recipe: Recipe, where: str, code: Code, sources: Sources) -> Foreign:
    module, place = code.path.rpartition(".")[0], recipe.place(where)
    try:
        file = sources.file(module)
    except ComponentError as error:
        raise RecipeError([place.problem(where, f"{error}.")]) from error
    verb = "imports" if code.arguments is None else "calls"
    given = "" if not code.arguments else f" with {_shortened(json.dumps(code.arguments, default=str))}"
    words = f"{verb} `{code.path}` ({file or 'no file is found'}){given}"
    record: dict[str, Any] = {"runs": code.path, "file": str(file or "")}
    if code.arguments is not None and _installed(file):
        # A function of a library, such as `subprocess.run`, is something else with every argument.
        record["arguments"] = hashlib.sha256(json.dumps(code.arguments, sort_keys=True, default=str).encode()).hexdigest()
    return Foreign(where, place, words, json.dumps(record), module, file)


def _shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _installed(file: Path | None) -> bool:
    """Whether a module is of Python or of an installed package; ``None``, as for built-in modules, counts."""
    if file is None or {"site-packages", "dist-packages"} & set(file.parts):
        return True
    return any(file.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def _refusal(recipe: Recipe, needs: Iterable[Foreign]) -> str:
    lines = [f"{recipe.source}: does more than run marlkit's own components:", *(f"    {need}" for need in needs)]
    store = trusted_file()
    kept = "." if store is None else f"; marlkit then remembers it in {store} and does not ask again."
    return "\n".join([*lines, REMEDY + kept])


def trusted_file() -> Path | None:
    """The file of what the user has trusted, one JSON object per line; ``None`` where he has no home folder."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        folder = Path(given) if os.path.isabs(given) else Path.home() / ".config"
    except RuntimeError:
        return None
    return folder / "marlkit" / "trusted.jsonl"


def _remembered() -> frozenset[str]:
    store = trusted_file()
    try:
        return frozenset() if store is None else frozenset(store.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        return frozenset()


def _remember(records: Iterable[str]) -> None:
    text = "".join(f"{record}\n" for record in dict.fromkeys(records))
    store = trusted_file()
    if not text:
        return
    try:
        if store is None:
            raise FileNotFoundError("there is no home folder")
        store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(os.open(store, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        _warn(f"what you trust cannot be remembered ({error}): runs of this recipe will need --trust. Set XDG_CONFIG_HOME.")


@functools.cache
def _warn(message: str) -> None:
    # Once, although every component of a recipe is asked for.
    warnings.warn(message, stacklevel=4)
