"""Whether the components of a recipe fit together: every key read has been written, every needed trait is present.

The components are checked in the order in which they run. Every iteration collects (env, data, actor), annotates the batch and
its ``next`` (opponents, critic), estimates, and updates; the keys of the sections :data:`ON_NEXT` therefore also exist under
``next``. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from marlkit import keys
from marlkit.contract import TRAITS, Condition, When, as_yaml, carried
from marlkit.errors import Problem, did_you_mean
from marlkit.keys import Key
from marlkit.recipe.catalogue import Entry, components

if TYPE_CHECKING:
    from pathlib import Path

    from marlkit.recipe.located_yaml import Place

ORDER = ("env", "data", "actor", "opponents", "critic", "targets", "estimator", "update", "optimizer", "trainer")
"""Sections in the order in which they run; `targets`, `optimizer` and `trainer` touch no keys."""

ON_NEXT = ("env", "actor", "critic")
"""Sections whose keys also exist at the next step, for components that run on a whole rollout."""

ON_ONE_STEP = ("env", "actor", "opponents", "critic")
"""Sections that run on single steps, current and next ones alike, and therefore have no access to the following step."""


POOLED_ENEMIES = {"opposing", "team_reward"}
"""Traits that no environment may have together: what one agent wins would pay its opponent as much."""


class Selection(Protocol):
    """The part of a recipe that the checks use."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The components by path."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where dotted paths are looked up."""

    def options(self, path: str) -> dict[str, Any]:
        """The completed options of the component at ``path``."""

    def place(self, path: str) -> Place:
        """Where ``path`` is written."""


@dataclass(frozen=True)
class Member:
    """A component of a recipe, with the conditions of its contract resolved.

    Attributes:
        path: its path in the recipe, such as ``"update.step"``.
        entry: its catalogue entry.
        options: its completed options.
        reads, writes, traits: the keys that it reads and writes, and its traits, in this recipe.
    """

    path: str
    entry: Entry
    options: Mapping[str, Any]
    reads: tuple[Key, ...]
    writes: tuple[Key, ...]
    traits: frozenset[str]

    @property
    def section(self) -> str:
        """Its section, also where it is part of another component."""
        return self.path.partition(".")[0]


def environments(recipe: Selection) -> list[frozenset[str]]:
    """The possible sets of traits of the environment; more than one where its source does not determine them."""
    entry = recipe.entries["env"]
    options = recipe.options("env")
    traits = frozenset(entry.contract.resolve("traits", options, ()))
    actions = [()] if traits & {"discrete", "continuous"} else [("discrete",), ("continuous",)]
    declared = any("team_reward" in (trait.then if isinstance(trait, When) else (trait,)) for trait in entry.contract.traits)
    rewards = [()] if declared else [(), ("team_reward",)]
    derives = entry.contract.derives if entry.trusted else None
    derived = () if derives is None else entry.ask(derives, options, recipe.folders)
    aims = [(), ("opposing",)] if derived is None else [derived]
    return [traits.union(*found) for found in itertools.product(actions, rewards, aims)]


def members(recipe: Selection, environment: Collection[str]) -> list[Member]:
    """The components of a recipe in the order in which they run, each after the one that it is part of."""
    found = []
    for path, entry in sorted(recipe.entries.items(), key=lambda item: ORDER.index(item[0].partition(".")[0])):
        options = recipe.options(path)
        reads, writes, traits = (entry.contract.resolve(f, options, environment) for f in ("reads", "writes", "traits"))
        if path == "env":
            traits = (*traits, *environment)
        found.append(Member(path, entry, options, reads, writes, frozenset(traits)))
    by_path = {member.path: member for member in found}
    return [replace(member, traits=_all_traits(member, by_path)) for member in found]


def _all_traits(member: Member, team: Mapping[str, Member]) -> frozenset[str]:
    """The traits of a member and those that it inherits from its parts."""
    parts = {name: f"{member.path}.{name}" for name in member.entry.contract.inherits}
    inherited = {name: _all_traits(team[path], team) for name, path in parts.items() if path in team}
    return member.entry.contract.all_traits(member.traits, inherited)


def skipped_sections(team: Iterable[Member]) -> set[str]:
    """Sections that do not run, because no component reads their keys: the opponent model, where none of its keys is read."""
    team = list(team)
    written = {key for member in team if member.section == "opponents" for key in _both(member)}
    read = {key for member in team if member.section != "opponents" for key in member.reads}
    return set() if written & read else {"opponents"}


def _both(member: Member) -> Iterator[Key]:
    for key in member.writes:
        yield key
        if member.section in ON_NEXT and key[0] != "next":
            yield keys.following(key)


def writers(team: Iterable[Member]) -> Iterator[tuple[Member, dict[Key, str]]]:
    """Each component that runs, with the keys available to it and the path of the component that wrote each."""
    team = list(team)
    skipped = skipped_sections(team)
    written: dict[Key, str] = {}
    for section in ORDER:
        present = [member for member in team if member.section == section and section not in skipped]
        for member in present:
            written.update(dict.fromkeys(carried(member.reads, member.writes), member.path))
        for member in present:
            yield member, {key: path for key, path in written.items() if section not in ON_ONE_STEP or key[0] != "next"}
        written.update({key: member.path for member in present for key in _both(member)})


def fits(recipe: Selection) -> bool:
    """Whether :func:`check_fit` finds no problem; faster, because it writes no messages."""
    return any(_is_satisfied(members(recipe, environment), environment) for environment in environments(recipe))


def _is_satisfied(team: list[Member], environment: frozenset[str]) -> bool:
    by_path = {member.path: member for member in team}
    if by_path["env"].traits >= POOLED_ENEMIES:
        return False
    for member, found in writers(team):
        if not found.keys() >= set(member.reads) or any(missing for _, missing in unmet(member, by_path, environment)):
            return False
    return by_path["critic"].entry.contract.predicts is not None


def unmet(member: Member, team: Mapping[str, Member], environment: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """The paths of components that lack traits that `member` needs, with these traits."""
    for target, wanted in member.entry.contract.needed(member.options, environment).items():
        path = f"{member.path}.{target}" if target in member.entry.options else target
        if path in team:
            yield path, [trait for trait in wanted if trait not in team[path].traits]


def check_fit(recipe: Selection, environment: frozenset[str] | None = None) -> list[Problem]:
    """All misfits; empty where the recipe can run.

    Where the source of the environment does not determine its traits, the problems of the most favourable case are reported.
    ``environment`` are the traits of the environment that was built, with which the check is complete.
    """
    possible = environments(recipe) if environment is None else [environment]
    return min((_problems(recipe, traits) for traits in possible), key=len)


def _problems(recipe: Selection, environment: frozenset[str]) -> list[Problem]:
    team = members(recipe, environment)
    check = _Check(recipe, environment, {member.path: member for member in team})
    problems = []
    for member, found in writers(team):
        missing = [key for key in dict.fromkeys(member.reads) if key not in found]
        problems += [check.unwritten(member, key) for key in missing if not check.awaited(member, key)]
        problems += check.unmet(member)
    problems += check.opposed()
    critic = check.team["critic"]
    if critic.entry.contract.predicts is None:
        message = f"`{critic.entry.name}` predicts nothing, so that no update can train it."
        problems.append(recipe.place("critic").problem("critic", message, "Name the key in its contract: `predicts=…`."))
    return problems


@dataclass(frozen=True)
class _Check:
    """Writes the messages for the problems of one recipe in one environment."""

    recipe: Selection
    environment: frozenset[str]
    team: Mapping[str, Member]

    def unwritten(self, reader: Member, key: Key) -> Problem:
        """`reader` reads `key`, but no component before it writes it."""
        current = keys.current(key)
        if key != current and reader.section in ON_ONE_STEP:
            message = f"`{reader.entry.name}` reads {keys.name(key)}, but runs on single steps and has no access to the next."
            return self._problem(reader, message, [f"Read {keys.name(current)}; an estimator combines a step with the next."])
        message = f"`{reader.entry.name}` reads {keys.name(key)}{_meaning(key)}, which nothing before it writes"
        remedies = []
        for section in ORDER[: ORDER.index(reader.section)]:
            remedy = next(filter(None, (self._remedy(section, "writes", k, "write it", reader) for k in (current, key))), "")
            if remedy:
                message += f"; {section} {self._named(section)} writes {self._written(section)}"
                remedies.append(remedy)
        others = self._others(reader, current)
        remedies += [others] if others else []
        return self._problem(reader, f"{message}.", remedies or ["No component of marlkit writes this key."])

    def awaited(self, reader: Member, key: Key) -> bool:
        """Whether a missing part of a component before `reader`, a problem by itself, may write `key`."""
        before = [member for member in self.team.values() if member.section in ORDER[: ORDER.index(reader.section)]]
        absent = [
            option.part
            for member in before
            for name, option in member.entry.options.items()
            if option.required and option.part is not None and f"{member.path}.{name}" not in self.team
        ]
        return any(key in _possible(entry, "writes", self.environment) for kind in absent for entry in components(kind).values())

    def unmet(self, member: Member) -> Iterator[Problem]:
        """The traits that `member` needs of other components and that they lack."""
        for path, missing in unmet(member, self.team, self.environment):
            for trait in missing:
                message = f"`{member.entry.name}` needs the trait `{trait}`, which {path} {self._named(path)} lacks."
                remedy = self._remedy(path, "traits", trait, "have it", member) or f"No {path} of marlkit has it."
                yield self._problem(member, message, [remedy, *_alike(trait, self.team[path].traits)])

    def opposed(self) -> Iterator[Problem]:
        """The environment pays one reward to agents that are opposed to each other."""
        env = self.team["env"]
        if env.traits >= POOLED_ENEMIES:
            pooling = self._pooling(env)
            chosen = [f"{chooser} `{env.options[chooser]}`" for chooser, _ in env.entry.contract.holds.values()]
            message = (
                f"`{env.entry.name}` pays all agents the same, but those of {', '.join(chosen) or 'this environment'} are "
                "opposed to each other: what one gains would be paid to its opponents too."
            )
            needing = [member for member in self.team.values() if "team_reward" in self._needed_of_env(member)]
            remedy = f"Set {' and '.join(pooling.values())}." if pooling else "Take one of both traits from its contract."
            if pooling and needing:
                remedy = self._without_team_reward(needing[0])
            where = next(iter(pooling), "env")
            yield self.recipe.place(where).problem(where, message, remedy)

    def _needed_of_env(self, member: Member) -> tuple[str, ...]:
        return member.entry.contract.needed(member.options, self.environment).get("env", ())

    def _pooling(self, env: Member) -> dict[str, str]:
        """The options that pool the rewards, by path, each with the setting that does not."""
        conditions = [entry for entry in env.entry.contract.traits if isinstance(entry, When) and "team_reward" in entry.then]
        names = {part.name for entry in conditions for part in entry.parts if entry.holds(env.options, self.environment)}
        return {f"env.{name}": f"env.{name}={as_yaml(env.entry.options[name].default)}" for name in names}

    def _without_team_reward(self, member: Member) -> str:
        """What to set instead of a component that needs one reward for all agents, where they are opposed."""
        pooling = self._pooling(self.team["env"])
        for name, swapped in _alternatives(self.recipe, member, {path.partition(".")[2] for path in pooling}):
            if fits(swapped):
                words = " and ".join([f"{member.path}={name}", *pooling.values()])
                return f"`{member.entry.name}` cannot train opponents: set {words}, or choose agents that share one aim."
        return f"`{member.entry.name}` cannot train opponents: choose agents that share one aim."

    def _problem(self, member: Member, message: str, remedies: Iterable[str]) -> Problem:
        return self.recipe.place(member.path).problem(member.path, message, " ".join(remedies))

    def _named(self, path: str) -> str:
        return f"`{self.team[path].entry.name}` ({self.recipe.place(path)})"

    def _written(self, section: str) -> str:
        return ", ".join(keys.name(key) for key in self.team[section].writes) or "nothing"

    def _remedy(self, path: str, field: str, wanted: Any, verb: str, reader: Member) -> str:
        """The option to set, or the components to use, so that `path` writes the key or has the trait `wanted`."""
        member = self.team[path]
        if path == "env" and wanted == "team_reward" and "opposing" in self.environment:
            return self._without_team_reward(reader)
        settings = self._settings(member, field, wanted)
        if settings:
            return f"Set {' and '.join(settings)}."
        others = [name for name in self._candidates(member.entry, field, wanted) if name != member.entry.name]
        return f"For {path}, these {verb}: {', '.join(others)} (`{path}={others[0]}`)." if others else ""

    def _settings(self, member: Member, field: str, wanted: Any) -> list[str]:
        for entry in getattr(member.entry.contract, field):
            if isinstance(entry, When) and wanted in entry.then and not entry.holds(member.options, self.environment):
                return [text for part in entry.parts for text in self._setting(member, part)]
        return []

    def _setting(self, member: Member, part: Condition) -> list[str]:
        if part.holds(member.options, self.environment):
            return []
        if part.value is not None:
            return [f"{member.path}.{part}"]
        inside = self._settings(self.team["env"], "traits", part.name) if member.path != "env" else []
        return inside or [f"an environment with the trait `{part}`"]

    def _candidates(self, entry: Entry, field: str, wanted: Any) -> list[str]:
        """Components of the kind that may write, read or have `wanted`; first those without required options."""
        able = [other for other in self._supported(entry) if wanted in _possible(other, field, self.environment)]
        return [e.name for e in sorted(able, key=lambda e: any(option.required for option in e.options.values()))]

    def _supported(self, entry: Entry) -> list[Entry]:
        """The components of the same kind that work in this environment."""
        alternatives = components(entry.kind).values()
        return [
            e for e in alternatives if self.environment.issuperset(e.contract.needed(e.defaults, self.environment).get("env", ()))
        ]

    def _others(self, reader: Member, key: Key) -> str:
        """Components of the reader's kind that do not read the key, where no component before it can write the key."""
        if any(self._candidates(self.team[s].entry, "writes", key) for s in ORDER[: ORDER.index(reader.section)]):
            return ""
        alternatives = self._supported(reader.entry)
        without = [e.name for e in alternatives if key not in map(keys.current, _possible(e, "reads", self.environment))]
        return f"For {reader.path}, these do not read it: {', '.join(without)}." if without else ""


@dataclass(frozen=True)
class _Swapped:
    """A selection with another component at ``path``, which keeps the options that it takes, and other options of ``env``."""

    recipe: Selection
    path: str
    entry: Entry
    individual: Collection[str]

    @property
    def entries(self) -> Mapping[str, Entry]:
        kept = {path: entry for path, entry in self.recipe.entries.items() if not path.startswith(f"{self.path}.")}
        return kept | {self.path: self.entry}

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.recipe.folders

    def options(self, path: str) -> dict[str, Any]:
        options = self.recipe.options(path)
        if path == self.path:
            return self.entry.defaults | {name: value for name, value in options.items() if name in self.entry.options}
        if path == "env":
            return options | {name: self.recipe.entries["env"].options[name].default for name in self.individual}
        return options

    def place(self, path: str) -> Place:
        return self.recipe.place(path)


def _alternatives(recipe: Selection, member: Member, individual: Collection[str]) -> Iterator[tuple[str, _Swapped]]:
    """Components for the place of ``member``, those that it is made of first, with the ``env`` options at their defaults."""
    parts = [entry.name for path, entry in recipe.entries.items() if path.startswith(f"{member.path}.")]
    others = components(member.entry.kind)
    for name in dict.fromkeys([*parts, *others]):
        if name in others and not any(option.required for option in others[name].options.values()):
            yield name, _Swapped(recipe, member.path, others[name], individual)


def _alike(trait: str, present: Collection[str]) -> Iterator[str]:
    """What may be misspelt: the trait that is needed, or one that the component has."""
    if trait not in TRAITS:
        yield did_you_mean(trait, TRAITS).strip()
    for own in sorted(set(present) - set(TRAITS)):
        if did_you_mean(own, [trait]):
            yield f"It has the trait `{own}`, which marlkit does not know.{did_you_mean(own, [trait])}"


def _meaning(key: Key) -> str:
    try:
        return f" ({keys.describe(key).meaning})"
    except KeyError:
        return ""


def _possible(entry: Entry, field: str, environment: Collection[str]) -> set[Any]:
    """The keys or traits of a component's contract that some choice of options gives in this environment."""
    found: set[Any] = set()
    for item in getattr(entry.contract, field):
        if not isinstance(item, When):
            found.add(item)
        elif all(part.value is not None or part.name in environment for part in item.parts):
            found.update(item.then)
    return found
