"""Reading a recipe: one YAML file that names every component of an algorithm, its options, the environment and the trainer.

Everything that can be checked without running a component is checked here; all problems are reported together, each with its file
and line. This module imports no torch, and a check takes well under a second.
"""

from __future__ import annotations

import copy
import functools
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from marlkit.contract import KINDS
from marlkit.errors import Problem, RecipeError, did_you_mean
from marlkit.recipe.catalogue import Entry
from marlkit.recipe.completing import Completion
from marlkit.recipe.fit import check_fit
from marlkit.recipe.interpolation import escape_missing, meant
from marlkit.recipe.located_yaml import Located, Place, read_file
from marlkit.recipe.merging import Merge, read_overrides
from marlkit.recipe.scalars import Loader, shown

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "recipes"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "recipes"
"""A checkout has the recipes beside the package, a wheel brings them inside; what lies beside that belongs to other packages."""
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """A complete recipe: it has every section, with its `type` and every option.

    Attributes:
        name: the name of its runs.
        source: the file that it was read from.
        config: the completed recipe.
        entries: the component at each path, such as ``"update"`` and ``"update.step"``.
        places: where each path is written; defaults have none.
        folders: where components named by a dotted path are looked up, after Python's own search path.
        overrides: the changes applied to the file.
        notes: the options that a change of `type` dropped.
        valid: whether names and values have no problem.
        variables: the environment variables that it reads, by the path where they are written.
        trust: whether the user agrees to all that it does beyond marlkit's own code (:mod:`marlkit.recipe.trust`).
        built: the traits of its environment, where that has been built.
    """

    name: str
    source: Path
    config: DictConfig
    entries: Mapping[str, Entry]
    places: Mapping[str, Place]
    folders: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    valid: bool = True
    variables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trust: bool = False
    built: frozenset[str] | None = None

    @property
    def seed(self) -> int:
        """Seed of all random numbers of a run."""
        return int(self.config.seed)

    def place(self, path: str) -> Place:
        """Where ``path`` (``"update.clip_epsilon"``) is written, or the nearest enclosing entry that is."""
        while path and path not in self.places:
            path = path.rpartition(".")[0]
        return self.places.get(path, Place(str(self.source)))

    def line(self, path: str) -> int | None:
        """Line of ``path`` in its file, or of the nearest enclosing entry; ``None`` for a default or an override."""
        return self.place(path).line

    def options(self, path: str) -> dict[str, Any]:
        """The options of the component at ``path``, without its `type`; environment variables as they are written."""
        found: Any = self._plain
        for key in path.split("."):
            found = found[key]
        return {name: copy.deepcopy(value) for name, value in found.items() if name != "type"}

    @functools.cached_property
    def _plain(self) -> Any:
        return meant(OmegaConf.to_container(self.config))

    def accepts(self, overrides: Sequence[str]) -> bool:
        """Whether names and values stay valid after further ``overrides``; true where they are not valid now."""
        if not self.valid:
            return True
        try:
            load_recipe(self.source, [*self.overrides, *overrides], folders=self.folders, fit=False, trust=self.trust)
        except RecipeError:
            return False
        return True

    def arguments(self, path: str) -> dict[str, Any]:
        """:meth:`options` with the values of the environment variables that they read, for the constructor alone.

        Raises:
            RecipeError: a variable is not set.
        """
        if not self.variables:
            return self.options(path)
        try:
            found = OmegaConf.to_container(OmegaConf.select(self.config, path), resolve=True)
        except OmegaConfBaseException as error:
            unset = next((at for at in self.variables if at.startswith(f"{path}.")), path)
            raise RecipeError([self.place(unset).problem(unset, f"cannot be read: {str(error).splitlines()[0]}.")]) from error
        assert isinstance(found, dict)
        return {str(name): value for name, value in found.items() if name != "type"}

    def without_values(self, text: str) -> str:
        """A message without the values of the environment variables that the recipe reads."""
        for name in {name for names in self.variables.values() for name in names}:
            if len(value := os.environ.get(name, "")) > 3:
                text = text.replace(value, f"${{oc.env:{name}}}")
        return text

    def to_yaml(self) -> str:
        """The completed recipe as text, from which :func:`load_recipe` reads an equal recipe."""
        plain = escape_missing(OmegaConf.to_container(self.config))
        return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def shipped() -> dict[str, Path]:
    """The recipes that come with marlkit, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    folders: Sequence[Path] = (),
    fit: bool = True,
    trust: bool = False,
) -> Recipe:
    """Read, complete and check a recipe. Runs no component's code and reads no environment variable.

    Args:
        name_or_path: the name of a shipped recipe (``"mappo"``), or a path to a YAML file.
        overrides: changes such as ``"critic=marginalised"``, ``"critic.samples=100"`` and ``"seed=3"``.
        folders: where to look for components named by a dotted path, beside Python's own search path, the current folder and
            the recipe's.
        fit: whether to check that the components fit together; names and values are always checked.
        trust: whether its components may later be built although it names code outside of marlkit, or environment variables
            (:mod:`marlkit.recipe.trust`).

    Raises:
        RecipeError: the recipe cannot be run; it carries all problems that were found.
    """
    given: object = name_or_path
    if not isinstance(given, (str, os.PathLike)):
        message = f"must be given by its name or its path, got a {type(given).__name__}."
        raise RecipeError([Place("recipe").problem("", message, "Write it to a YAML file, and give that.")])
    overrides = [overrides] if isinstance(overrides, str) else overrides
    path = _find(name_or_path, Path())
    merge = Merge(folders=[*_folders(path), *folders])
    root, problems = _read_extended(path, merge, ())
    changes, unreadable = read_overrides(overrides)
    problems.extend(unreadable)
    for change in changes:
        if "extends" in change.value:
            problems.append(change.place.problem("extends", "can only be given in a file."))
        else:
            root = merge.recipes(root, change)
    completion = Completion(root, merge.folders)
    config = completion.run(path.stem)
    problems.extend(completion.problems)
    found = (completion.entries, completion.places, tuple(merge.folders))
    told = (tuple(overrides), tuple(merge.notes), not problems)
    recipe = Recipe(str(config.name), path, config, *found, *told, variables=completion.variables.names, trust=trust)
    if fit and all(section in recipe.entries for section in KINDS):
        problems.extend(check_fit(recipe))
    if problems:
        # In the order of the file; problems without a line, such as those of overrides, come last.
        raise RecipeError(sorted(dict.fromkeys(problems), key=lambda p: (p.line is None, p.source, p.line or 0)))
    return recipe


def _read_extended(path: Path, merge: Merge, below: tuple[Path, ...]) -> tuple[Located, list[Problem]]:
    """Read a file and what it extends. ``below`` are the files that extend it."""
    root, problems = read_file(path)
    extends = root.value.pop("extends", None)
    if extends is None:
        return root, problems
    chain = (*below, path.resolve())
    try:
        if not isinstance(extends.value, str):
            message = f"must be the name or the path of one recipe, got {extends.plain()!r}."
            raise RecipeError([extends.place.problem("extends", message)])
        base_path = _find(extends.value, path.parent, extends.place)
        if base_path.resolve() in chain:
            circle = " -> ".join(file.name for file in (*chain, base_path.resolve()))
            raise RecipeError([extends.place.problem("extends", f"recipes extend each other in a circle: {circle}.")])
        merge.folders = [*merge.folders, *_folders(base_path)]
        base, found = _read_extended(base_path, merge, chain)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from error
    base.value.pop("name", None)  # a variant does not inherit the name
    return merge.recipes(base, root), [*found, *problems]


def _folders(path: Path) -> list[Path]:
    return list(dict.fromkeys([Path.cwd(), *([] if path.parent == SHIPPED else [path.resolve().parent])]))


def _find(name: str | Path, folder: Path, asked: Place | None = None) -> Path:
    """The file of a recipe: a shipped one by its name, or else a path relative to ``folder``."""
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    place = asked or Place(shown(str(name), 200))
    where = "extends" if asked else ""
    try:
        path = folder / Path(name).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, no right to look, no such user
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        raise RecipeError([place.problem(where, f"cannot be looked up: {reason}.", "Write the path of a YAML file.")]) from error
    if mode and not stat.S_ISDIR(mode):
        return path
    if mode:
        raise RecipeError([place.problem(where, "is a folder, not a recipe.", _files_in(path))])
    if path.suffix in SUFFIXES or path.parent != folder:
        raise RecipeError([place.problem(where, f"there is no file {path}.", _files_in(path.parent, path.name))])
    hint = did_you_mean(str(name), known).strip()
    listed = f"Shipped recipes: {', '.join(known)}; a recipe of your own is named by its path, `{name}.yaml`."
    raise RecipeError([place.problem(where, f"there is no recipe called `{name}`.", f"{hint} {listed}".strip())])


def _files_in(folder: Path, wanted: str = "") -> str:
    if not folder.is_dir():
        return f"There is no folder {folder} either."
    files = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    return did_you_mean(wanted, files).strip() or (f"It holds: {', '.join(files)}." if files else "")


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, lists on one line; text quoted wherever it would be read as another value."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal lists out each time instead of as an alias such as ``*id001``."""
        return True


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # In double quotes what cannot be seen is escaped; PyYAML reads some ends of lines back as others.
    style = None if value.isprintable() and value[:1] not in tuple("+-.0123456789=") else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_str)
