"""Which component writes and reads which key: the tables and flowcharts of ``marlkit show``. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marlkit import keys
from marlkit.keys import Key
from marlkit.recipe.fit import ORDER, Member, environments, members, skipped_sections, writers

if TYPE_CHECKING:
    from marlkit.recipe import Recipe


@dataclass(frozen=True)
class WiringRow:
    """One component in the wiring.

    Attributes:
        path: its path in the recipe.
        component: its name.
        reads: the keys that it reads, each with the path of the component that wrote it (``None``: no component writes it).
        writes: the keys that it writes.
        runs: false for an opponent model whose keys no component reads, and for targets that are the online networks.
        follows: paths of components that it uses without a key: its parts, or the component that it is a copy of.
    """

    path: str
    component: str
    reads: Mapping[Key, str | None]
    writes: tuple[Key, ...]
    runs: bool = True
    follows: tuple[str, ...] = ()


MISSING = "missing"
"""Shown as the writer of a key that no component writes."""

ON_DEMAND = ("data",)
"""Sections that do not write the keys that no component reads."""


def wiring(recipe: Recipe) -> list[WiringRow]:
    """The components in the order in which they run."""
    team = members(recipe, environments(recipe)[0])
    found = {member.path: written for member, written in writers(team)}
    skipped = skipped_sections(team)
    read = {key for member in team if member.section not in skipped for key in member.reads}
    lagging = any("lagging" in member.traits for member in team)
    following = {keys.following(key) for member in team if member.section == "critic" for key in member.writes}
    target_values = following if lagging else set()

    def writer(member: Member, key: Key) -> str | None:
        return "targets" if key in target_values else found.get(member.path, {}).get(key)

    def row(member: Member) -> WiringRow:
        copies = lagging and member.section == "targets"
        return WiringRow(
            member.path,
            member.entry.name,
            {key: writer(member, key) for key in dict.fromkeys(member.reads)},
            tuple(target_values & read) if copies else _written(member, read),
            member.section not in skipped and (lagging or member.section != "targets"),
            ("critic",) if copies else tuple(other.path for other in team if other.path.rpartition(".")[0] == member.path),
        )

    return [row(member) for member in team]


def _written(member: Member, read: Collection[Key]) -> tuple[Key, ...]:
    return tuple(key for key in dict.fromkeys(member.writes) if key in read or member.section not in ON_DEMAND)


DIMENSIONS = {
    "N": "agents",
    "O": "observation",
    "S": "state",
    "A": "discrete actions",
    "D": "action dimensions",
    "H": "hidden",
    "E": "features of an encoded agent",
    "M": "steps of the recent past",
    "V": "modelling agents (1 where all have equal beliefs)",
}
"""Descriptions of the named dimensions of :mod:`marlkit.keys`."""


def dimensions(recipe: Recipe) -> list[str]:
    """The named dimensions that occur in the wiring of a recipe, in the order of :data:`DIMENSIONS`."""
    discrete = is_discrete(recipe)
    found = {key for row in wiring(recipe) for key in (*row.reads, *row.writes)}
    named = {dimension for key in found if _known(key) for dimension in keys.describe(key).dimensions(discrete=discrete)}
    return [dimension for dimension in DIMENSIONS if dimension in named]


def _known(key: Key) -> bool:
    try:
        keys.describe(key)
    except KeyError:
        return False
    return True


def shape(key: Key, discrete: bool, sizes: Mapping[str, int] | None = None) -> str:
    """Shape of a key after the batch dimensions: ``[N, O]``, or ``[4, 18]`` where sizes are known."""
    if not _known(key):
        return "[?]"
    named = keys.describe(key).dimensions(discrete=discrete)
    return f"[{', '.join(str((sizes or {}).get(dimension, dimension)) for dimension in named)}]"


def is_discrete(recipe: Recipe) -> bool:
    """Whether actions are discrete, as far as the recipe determines it."""
    return "discrete" in environments(recipe)[0]


def mermaid(recipe: Recipe) -> str:
    """The wiring as a Mermaid flowchart: a node for each component, an edge for the keys that go from one to another."""
    rows = [row for row in wiring(recipe) if row.runs and (row.reads or row.writes or row.follows)]
    lines = ["flowchart LR"]
    lines += [f'    {_node(row.path)}["<b>{row.path}</b><br/>{row.component}"]' for row in rows]
    for row in rows:
        by_writer: dict[str, list[str]] = {}
        for key, writer in row.reads.items():
            by_writer.setdefault(writer or MISSING, []).append(keys.name(key))
        for writer in sorted(by_writer, key=lambda path: (ORDER.index(path.partition(".")[0]) if path != MISSING else -1, path)):
            if writer != row.path:
                lines.append(f'    {_node(writer)} -->|"{"<br/>".join(by_writer[writer])}"| {_node(row.path)}')
        lines += [f"    {_node(other)} -.- {_node(row.path)}" for other in row.follows]
    return "\n".join(lines) + "\n"


def _node(path: str) -> str:
    return path.replace(".", "_")
