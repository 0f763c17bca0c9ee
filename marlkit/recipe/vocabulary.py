"""The words that contracts are made of, as parts of a Markdown page: every trait and key, and who has, needs or reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from marlkit.contract import KINDS, TRAITS, When
from marlkit.keys import TABLE, WITH_GRADIENT, current, name
from marlkit.recipe.catalogue import Entry, components

TRAITS_ABOVE = """# Traits

Facts that components state of themselves in their contracts, and need of others. Each is checked by `marlkit.testing`. A
component of your own may have other traits, of other names.

"""

KEYS_ABOVE = """# Keys

What a batch holds: the shape behind the batch dimensions (where actions are continuous behind the semicolon), the type, the
meaning. `N` agents, `O` observation features, `S` state features, `A` discrete actions, `D` action dimensions, `H` features of a
memory, `E` features of an encoded agent, `V` modelling agents (`N`, or 1 where all believe the same), `M` steps of the recent
past. Under `next` stands the same at the next step, before any reset.

`agents.alive`: the losses of a policy, its entropy and divergence, the statistics that advantages are normalised with, compound
ratios and the losses of opponent models leave out agents that are not alive. The critic's regression, its value normalisation and
its explained variance count them, with the targets that the estimator gives them, unless `update.valued_agents=alive`.

"""


def traits() -> str:
    """Every trait: who may have it, what it means, which of marlkit's components have and need it."""
    rows = [
        (f"`{trait}`", ", ".join(described.sections), described.meaning, _having("traits", trait), _needing(trait))
        for trait, described in TRAITS.items()
    ]
    return TRAITS_ABOVE + _table(("trait", "of", "meaning", "had by", "needed by"), rows)


def keys() -> str:
    """Every key: shape, type, meaning, which of marlkit's components write and read it."""
    rows = []
    for key, info in TABLE.items():
        shape = info.shape if info.continuous is None else f"{info.shape}; {info.continuous}"
        # The only whole numbers whose shape depends on the kind of actions are actions.
        dtype = info.dtype if info.continuous is None or info.dtype != "int64" else "int64; float32"
        gradient = "; with gradient where an actor owns it" if key in WITH_GRADIENT and "gradient" not in info.meaning else ""
        meaning = info.meaning + gradient
        rows.append((f"`{name(key)}`", shape, dtype, meaning, _having("writes", key), _having("reads", key)))
    return KEYS_ABOVE + _table(("key", "shape", "type", "meaning", "written by", "read by"), rows)


def _entries() -> Iterator[Entry]:
    for section in KINDS:
        yield from components(section).values()


def _held(items: Iterable[Any]) -> set[Any]:
    return {part for item in items for part in (item.then if isinstance(item, When) else (item,))}


def _having(field: str, wanted: Any) -> str:
    """The components whose contracts name a trait or a key, whatever the condition."""
    named = [
        entry
        for entry in _entries()
        if wanted in {found if field == "traits" else current(found) for found in _held(getattr(entry.contract, field))}
    ]
    return _listed(named)


def _needing(trait: str) -> str:
    needing = _listed(entry for entry in _entries() if any(trait in _held(wanted) for wanted in entry.contract.needs.values()))
    preferring = _listed(entry for entry in _entries() if any(trait in wanted for wanted in entry.contract.prefers.values()))
    return "; ".join(filter(None, [needing, f"preferred by {preferring}" if preferring else ""]))


def _listed(entries: Iterable[Entry]) -> str:
    by_section: dict[str, list[str]] = {}
    for entry in entries:
        by_section.setdefault(entry.kind.section, []).append(entry.name)
    return "; ".join(f"{section} {', '.join(names)}" for section, names in by_section.items())


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"
