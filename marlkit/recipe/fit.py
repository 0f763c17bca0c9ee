"""Whether the components of a recipe fit together: every key read has been written, every needed trait is present.

The components are checked in the order in which they run. Every iteration collects (env, data, actor), annotates the batch and
its ``next`` (opponents, critic), estimates, and updates; the keys of the sections :data:`ON_NEXT` therefore also exist under
``next``. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, get_args

from marlkit import keys
from marlkit.contract import TRAITS, Condition, When, as_yaml, carried
from marlkit.errors import Problem, did_you_mean
from marlkit.keys import Key
from marlkit.recipe.catalogue import Entry, components
from marlkit.recipe.changes import Change, changed, swaps

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

    @property
    def built(self) -> frozenset[str] | None:
        """The traits of the environment, where it has been built."""

    def options(self, path: str) -> dict[str, Any]:
        """The completed options of the component at ``path``."""

    def place(self, path: str) -> Place:
        """Where ``path`` is written."""

    def accepts(self, overrides: Sequence[str]) -> bool:
        """Whether names and values stay valid after ``overrides``."""


@dataclass(frozen=True)
class Member:
    """A component of a recipe, with the conditions of its contract resolved.

    Attributes:
        path: its path in the recipe, such as ``"update.step"``.
        entry: its catalogue entry.
        options: its completed options.
        reads, writes, traits: the keys that it reads and writes, and its traits, in this recipe.
        predicts: the key that is regressed on the value target, of a critic.
    """

    path: str
    entry: Entry
    options: Mapping[str, Any]
    reads: tuple[Key, ...]
    writes: tuple[Key, ...]
    traits: frozenset[str]
    predicts: Key | None = None

    @property
    def section(self) -> str:
        """Its section, also where it is part of another component."""
        return self.path.partition(".")[0]


def environments(recipe: Selection) -> list[frozenset[str]]:
    """The possible sets of traits of the environment; more than one where its source does not determine them."""
    if recipe.built is not None:
        return [recipe.built]
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
        predicts = entry.contract.predicted(options, environment)
        found.append(Member(path, entry, options, reads, writes, frozenset(traits), predicts))
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
    if any(holds_itself(member, by_path) for member in team):
        return False
    return by_path["critic"].predicts is not None


def unmet(member: Member, team: Mapping[str, Member], environment: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """The paths of components that lack traits that `member` needs, with these traits."""
    for target, wanted in member.entry.contract.needed(member.options, environment).items():
        path = f"{member.path}.{target}" if target in member.entry.options else target
        if path in team:
            yield path, [trait for trait in wanted if trait not in team[path].traits]


def unpreferred(member: Member, team: Mapping[str, Member]) -> Iterator[tuple[str, str, str]]:
    """The paths of components that lack traits that `member` had better find there, each trait, and what is lost without it."""
    for target, wanted in member.entry.contract.prefers.items():
        path = f"{member.path}.{target}" if target in member.entry.options else target
        if path in team:
            yield from ((path, trait, loss) for trait, loss in wanted.items() if trait not in team[path].traits)


def holds_itself(member: Member, team: Mapping[str, Member]) -> bool:
    """Whether a component is a part of a wrapper of its own class; a wrapper has the traits of its part."""
    holder, _, option = member.path.rpartition(".")
    return holder in team and option in team[holder].entry.contract.inherits and team[holder].entry.dotted == member.entry.dotted


def check_fit(recipe: Selection) -> list[Problem]:
    """All misfits; empty where the recipe can run.

    Where the source of the environment does not determine its traits, the problems of the most favourable case are reported;
    with ``recipe.built``, the traits of the environment that was built, the check is complete.
    """
    return _problems(_check_of(recipe))


def advice(recipe: Selection) -> list[Problem]:
    """What a recipe that can run had better have otherwise; each is a warning."""
    check = _check_of(recipe)
    return [problem for member in check.team.values() for problem in check.unpreferred(member)]


def _problems(check: _Check) -> list[Problem]:
    problems = []
    for member, found in writers(check.team.values()):
        missing = [key for key in dict.fromkeys(member.reads) if key not in found]
        problems += [check.unwritten(member, key) for key in missing if not check.awaited(member, key)]
        problems += check.unmet(member)
        if holds_itself(member, check.team):
            problems.append(check.inside_itself(member))
    problems += check.opposed()
    if check.team["critic"].predicts is None:
        problems.append(check.unpredicting())
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
            advice = f"Read {keys.name(current)}; an estimator combines a step with the next."
            return self.recipe.place(reader.path).problem(reader.path, message, advice)
        message = f"`{reader.entry.name}` reads {keys.name(key)}{_meaning(key)}, which nothing before it writes"
        remedies: list[_Remedy] = []
        for section in ORDER[: ORDER.index(reader.section)]:
            remedy = next(filter(None, (self._remedy(section, "writes", k, "write it", reader) for k in (current, key))), None)
            if remedy:
                message += f"; {section} {self._named(section)} writes {self._written(section)}"
                remedies.append(remedy)
        remedies += self._unread(reader, current)
        return self._problem(reader, f"{message}.", remedies, "No component of marlkit writes this key.")

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
                remedy = self._remedy(path, "traits", trait, "have it", member)
                remedies = [*([remedy] if remedy else []), *self._unneeded(member, path, trait)]
                alike = _alike(trait, self.team[path].traits)
                yield self._problem(member, message, remedies, f"No {path} of marlkit has it.", alike)

    def unpreferred(self, member: Member) -> Iterator[Problem]:
        """The traits that `member` prefers and that other components lack."""
        for path, trait, loss in unpreferred(member, self.team):
            message = f"`{member.entry.name}` expects the trait `{trait}`, which {path} {self._named(path)} lacks: {loss}."
            remedy = self._remedy(path, "traits", trait, "have it", member)
            passing = list(filter(self._passes, remedy.changes)) if remedy else []
            advised = remedy.words(passing) if remedy and passing else "Nothing that was tried gives it."
            yield self.recipe.place(member.path).problem(member.path, message, advised)

    def inside_itself(self, member: Member) -> Problem:
        """A wrapper that holds another of its class."""
        names = [e.name for e in components(member.entry.kind).values() if e.dotted != member.entry.dotted]
        remedies = [self._swap(member.path, "these may be there", names)]
        return self._problem(member, f"`{member.entry.name}` cannot be a part of itself.", remedies, "")

    def opposed(self) -> Iterator[Problem]:
        """The environment pays one reward to agents that are opposed to each other."""
        env, unpooled = self.team["env"], self._unpooled
        if env.traits >= POOLED_ENEMIES:
            choosers = [chooser for chooser, _ in env.entry.contract.holds.values() if chooser in env.options]
            chosen = [f"{chooser} `{env.options[chooser]}`" for chooser in choosers]
            message = (
                f"`{env.entry.name}` pays all agents the same, but those of {', '.join(chosen) or 'this environment'} are "
                "opposed to each other: what one gains would be paid to its opponents too."
            )
            where = next((change.path for changes in unpooled.changes for change in changes), "env")
            needing = self._needing_team_reward
            remedy = self._without_team_reward(needing[0]) if unpooled.changes and needing else unpooled
            advised = self._problem(env, message, [remedy], "").remedy
            if "train" in env.entry.options:
                advised = f"{advised} Or train one of the groups alone, and name it in `env.train`."
            yield self.recipe.place(where).problem(where, message, advised)

    @property
    def _unpooled(self) -> _Remedy:
        """The options of the environment that pool rewards, set to what they are by default."""
        env = self.team["env"]
        pooling = [entry for entry in env.entry.contract.traits if isinstance(entry, When) and "team_reward" in entry.then]
        names = {part.name for entry in pooling if entry.holds(env.options, self.environment) for part in entry.parts}
        options = [option for name, option in env.entry.options.items() if name in names and not option.required]
        together = tuple(Change(f"env.{option.name}", as_yaml(option.default)) for option in options)
        if not together:
            return _Remedy("env", "", (), "Take one of both traits from its contract.")
        return _Remedy("env", "", (together,))

    @property
    def _needing_team_reward(self) -> list[Member]:
        needed = {m.path: m.entry.contract.needed(m.options, self.environment).get("env", ()) for m in self.team.values()}
        return [member for member in self.team.values() if "team_reward" in needed[member.path]]

    def _without_team_reward(self, member: Member) -> _Remedy:
        """What to use instead of a component that needs one reward for all agents, where they are opposed; its parts first."""
        parts = [entry.name for path, entry in self.recipe.entries.items() if path.startswith(f"{member.path}.")]
        others = components(member.entry.kind)
        names = [name for name in dict.fromkeys([*parts, *others]) if name in others and name != member.entry.name]
        unpooling = [change for changes in self._unpooled.changes for change in changes]
        changes = tuple((*swap, *unpooling) for swap in self._swap(member.path, "", names).changes)
        why = f"`{member.entry.name}` cannot train opponents"
        advice = "choose agents that share one aim."
        return _Remedy(member.path, "", changes, f"{why}: {advice}", f"{why}: set {{}}, or {advice}")

    def unpredicting(self) -> Problem:
        """The critic predicts nothing."""
        critic = self.team["critic"]
        message = f"`{critic.entry.name}` predicts nothing, so that no update can train it."
        return self.recipe.place("critic").problem("critic", message, "Name the key in its contract: `predicts=…`.")

    def first_changes(self) -> list[tuple[Change, ...]]:
        """The changes that would mend the first problem, whatever they do to the rest."""
        if self.team["env"].traits >= POOLED_ENEMIES:
            return [
                *self._unpooled.changes,
                *(change for m in self._needing_team_reward for change in self._without_team_reward(m).changes),
            ]
        remedies: list[_Remedy] = []
        for member, found in writers(self.team.values()):
            for key in (key for key in member.reads if key not in found):
                for section in ORDER[: ORDER.index(member.section)]:
                    wanted = (keys.current(key), key)
                    remedies += filter(None, [self._remedy(section, "writes", one, "", member) for one in wanted])
                remedies += self._unread(member, keys.current(key))
            for path, missing in unmet(member, self.team, self.environment):
                remedies += filter(None, [self._remedy(path, "traits", trait, "", member) for trait in missing])
                remedies += [remedy for trait in missing for remedy in self._unneeded(member, path, trait)]
                if missing:
                    remedies.append(self._swap(member.path, "", [e.name for e in self._supported(member.entry)]))
            if holds_itself(member, self.team):
                remedies.append(self._swap(member.path, "", [e.name for e in self._supported(member.entry)]))
            if any(remedy.changes for remedy in remedies):
                break
        return list(dict.fromkeys(change for remedy in remedies for change in remedy.changes))

    def _problem(
        self, member: Member, message: str, remedies: Sequence[_Remedy], without: str, also: Iterable[str] = ()
    ) -> Problem:
        """A problem with those remedies after which the whole recipe passes; with several changes where no single one does."""
        words = [remedy.words(passing) for remedy in remedies if (passing := list(filter(self._passes, remedy.changes)))]
        if not words and self._several:
            words = [f"Together these fit: {' or '.join(f'`{set_}`' for set_ in self._several)}."]
        if not words:
            unsure = [remedy.text for remedy in remedies if remedy.text]
            words = unsure or [f"{without if not remedies else ''} {self._left}".strip()]
        return self.recipe.place(member.path).problem(member.path, message, " ".join(filter(None, [*words, *also])))

    def _passes(self, changes: Sequence[Change]) -> bool:
        return fits(_after(self.recipe, changes)) and self.recipe.accepts([str(change) for change in changes])

    @cached_property
    def _several(self) -> list[str]:
        """The smallest sets of changes that make the whole recipe pass, as one types them; at most :data:`MOST_SETS`."""
        beam: list[tuple[Change, ...]] = [()]
        for _ in range(MOST_CHANGES):
            following: dict[frozenset[str], tuple[Change, ...]] = {}
            for changes in beam:
                for more in _check_of(_after(self.recipe, changes)).first_changes():
                    together = (*changes, *more)
                    if len({change.path for change in together}) == len(together):
                        following.setdefault(frozenset(map(str, together)), together)
            beam = sorted(following.values(), key=lambda changes: _check_of(_after(self.recipe, changes)).gaps)[:BEAM]
            passing = (changes for changes in beam if self._passes(changes))
            found = [" ".join(change.on_command_line for change in changes) for changes in itertools.islice(passing, MOST_SETS)]
            if found:
                return found
        return []

    @cached_property
    def gaps(self) -> int:
        """How many keys and traits are missing."""
        keyless = sum(len(set(member.reads) - set(found)) for member, found in writers(self.team.values()))
        keyless += sum(holds_itself(member, self.team) for member in self.team.values())
        keyless += self.team["env"].traits >= POOLED_ENEMIES
        return keyless + sum(len(traits) for m in self.team.values() for _, traits in unmet(m, self.team, self.environment))

    @property
    def _left(self) -> str:
        """What stays amiss after the change that leaves the least."""
        first = [_check_of(_after(self.recipe, changes)) for changes in self.first_changes()]
        fewest = min((check.gaps for check in first), default=self.gaps)
        return f"No {MOST_CHANGES} changes that were tried make this recipe fit; the best single one leaves {fewest} gaps."

    def _named(self, path: str) -> str:
        return f"`{self.team[path].entry.name}` ({self.recipe.place(path)})"

    def _written(self, section: str) -> str:
        return ", ".join(keys.name(key) for key in self.team[section].writes) or "nothing"

    def _remedy(self, path: str, field: str, wanted: Any, verb: str, reader: Member) -> _Remedy | None:
        """The options to set, or the components to use, so that `path` writes the key or has the trait `wanted`."""
        member = self.team[path]
        if path == "env" and wanted == "team_reward" and "opposing" in self.environment:
            return self._without_team_reward(reader)
        settings = self._settings(member, field, wanted)
        if settings:
            return settings
        others = [name for name in self._candidates(member.entry, field, wanted) if name != member.entry.name]
        return self._swap(path, f"these {verb}", others) if others else None

    def _swap(self, path: str, verb: str, names: Iterable[str]) -> _Remedy:
        return _Remedy(path, verb, tuple((change,) for name in names for change in swaps(self.recipe, path, name)))

    def _settings(self, member: Member, field: str, wanted: Any) -> _Remedy | None:
        for entry in getattr(member.entry.contract, field):
            if isinstance(entry, When) and wanted in entry.then and not entry.holds(member.options, self.environment):
                parts = [self._setting(member, part) for part in entry.parts if not part.holds(member.options, self.environment)]
                texts = [part.text for part in parts if part.text]
                return _Remedy(
                    member.path, "", _joined([part.changes for part in parts]), f"Use {' and '.join(texts)}." if texts else ""
                )
        return None

    def _setting(self, member: Member, part: Condition) -> _Remedy:
        if part.value is not None:
            values = part.settings(get_args(member.entry.options[part.name].annotation), hold=True)
            changes = tuple((Change(f"{member.path}.{part.name}", value),) for value in values)
            return _Remedy(member.path, "", changes, "" if changes else f"{part.name} other than {part.value}")
        inside = self._settings(self.team["env"], "traits", part.name) if member.path != "env" else None
        return inside or _Remedy(member.path, "", (), f"an environment with the trait `{part}`")

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

    def _unneeded(self, member: Member, path: str, trait: str) -> Iterator[_Remedy]:
        """The options under which a member does not need a trait of the component at `path`."""
        for entry in member.entry.contract.needs[path.removeprefix(f"{member.path}.")]:
            if isinstance(entry, When) and trait in entry.then and entry.holds(member.options, self.environment):
                yield from self._avoiding(member, entry)

    def _avoiding(self, member: Member, entry: When) -> Iterator[_Remedy]:
        """The options under which a conditional entry of a member's contract does not hold."""
        for part in entry.parts:
            annotation = member.entry.options[part.name].annotation if part.value is not None else None
            others = part.settings(get_args(annotation), hold=False)
            yield _Remedy(member.path, "", tuple((Change(f"{member.path}.{part.name}", other),) for other in others))

    def _unread(self, reader: Member, key: Key) -> Iterator[_Remedy]:
        """What to set or to use in the place of the reader, so that the key is not read."""
        for entry in reader.entry.contract.reads:
            if isinstance(entry, When) and key in map(keys.current, entry.then):
                yield from self._avoiding(reader, entry)
        alternatives = self._supported(reader.entry)
        without = [e.name for e in alternatives if key not in map(keys.current, _possible(e, "reads", self.environment))]
        yield self._swap(reader.path, "these do not read it", [name for name in without if name != reader.entry.name])


MOST_SETS = 3
"""Sets of several changes that a message names."""
MOST_CHANGES = 5
BEAM = 12
"""Sets of changes that are followed further: those that leave the fewest gaps."""


@dataclass(frozen=True)
class _Remedy:
    """Alternative changes that mend one problem.

    Attributes:
        path: the component that changes.
        verb: what those that may take its place do (``"these write it"``); empty where options are set.
        changes: the alternatives, each one change or several.
        text: what to do where it cannot be written as a change.
        sentence: a sentence for the first alternative, which stands in it for ``{}``.
    """

    path: str
    verb: str
    changes: tuple[tuple[Change, ...], ...]
    text: str = ""
    sentence: str = ""

    def words(self, passing: Sequence[tuple[Change, ...]]) -> str:
        """The remedy as a sentence, with those alternatives that pass."""
        if self.sentence:
            return self.sentence.format(" and ".join(change.on_command_line for change in passing[0]))
        if not self.verb:
            return f"Set {' or '.join(' and '.join(map(str, changes)) for changes in passing)}."
        swaps = [change for (change,) in passing]
        named = [change for change in swaps if change.value == change.entries[self.path].name] or swaps
        words = dict.fromkeys(change.value if change.value.isidentifier() else f"`{change.on_command_line}`" for change in named)
        return f"For {self.path}, {self.verb}: {', '.join(words)} (`{named[0].on_command_line}`)."


def _joined(alternatives: Iterable[tuple[tuple[Change, ...], ...]]) -> tuple[tuple[Change, ...], ...]:
    """Every choice of one alternative of each."""
    return tuple(tuple(itertools.chain(*chosen)) for chosen in itertools.product(*alternatives))


def _after(recipe: Selection, changes: Iterable[Change]) -> Selection:
    for change in changes:
        recipe = changed(recipe, change)
    return recipe


def _check_of(recipe: Selection) -> _Check:
    """The check in the environment with the fewest problems."""
    checks = [_Check(recipe, traits, {m.path: m for m in members(recipe, traits)}) for traits in environments(recipe)]
    return min(checks, key=lambda check: check.gaps)


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
