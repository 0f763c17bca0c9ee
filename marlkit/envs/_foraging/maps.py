"""Names of the maps of level-based foraging, as `lbforaging` writes them; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marlkit.contract import as_yaml
from marlkit.errors import OptionError, did_you_mean

PAPER = (
    *("5x5-2p-1f", "5x5-2p-1f-coop", "5x5-2p-2f", "8x8-2p-2f-coop", "8x8-3p-3f", "10x10-5p-1f-coop"),
    *("10x10-3p-5f", "10x10-5p-3f", "10x10-8p-1f-coop", "15x15-8p-1f-coop"),
)
"""The ten maps of Jafferjee et al. 2022, appendix E.1; other names of the same form are maps too."""

_NAME = re.compile(
    r"(?:Foraging-)?(?:(?P<sight>\d+)s-)?(?P<rows>\d+)x(?P<columns>\d+)-(?P<agents>\d+)p-(?P<food>\d+)f(?P<coop>-coop)?"
    r"(?:-v(?P<version>[23]))?"
)
LARGEST = 50
"""Rows or columns; the package's own ids end at 19."""


@dataclass(frozen=True)
class Map:
    """What the name of a map says.

    Attributes:
        rows: R.
        columns: C.
        agents: N.
        food: pieces of food F.
        coop: whether every piece of food takes the three agents of the lowest levels.
        sight: how many cells agents see in each direction; ``None``: all.
        inclusive: whether a piece of food may have the highest level; ``None``: not said.
    """

    rows: int
    columns: int
    agents: int
    food: int
    coop: bool = False
    sight: int | None = None
    inclusive: bool | None = None

    @property
    def name(self) -> str:
        """The name without sight and version: ``8x8-2p-2f-coop``."""
        return f"{self.rows}x{self.columns}-{self.agents}p-{self.food}f{'-coop' if self.coop else ''}"


def read(name: str, sight: int | None = None, inclusive: bool | None = None) -> Map:
    """The map of a name, such as ``8x8-2p-2f-coop`` or ``Foraging-2s-8x8-3p-3f-v3``.

    Args:
        name: the name; ``-v2`` says that food is below the highest level, ``-v3`` that it may reach it.
        sight: said besides the name.
        inclusive: likewise.

    Raises:
        OptionError: it is no name of a map, nobody could play there, or the name says otherwise.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise OptionError("map", _unknown(name))
    rows, columns, agents, food = (int(match[part]) for part in ("rows", "columns", "agents", "food"))
    said = Map(rows, columns, agents, food, coop=match["coop"] is not None)
    _refuse_unplayable(name, said)
    named_sight = int(match["sight"]) if match["sight"] else None
    named_inclusive = match["version"] == "3" if match["version"] else None
    told = {"sight": (sight, named_sight), "food_level_inclusive": (inclusive, named_inclusive)}
    for option, (given, named) in told.items():
        if None not in (given, named) and given != named:
            message = f"map `{name}` says {as_yaml(named)}, not {as_yaml(given)}; say it once: `{said.name}` leaves it open"
            raise OptionError(option, message)
    return replace(
        said,
        sight=named_sight if sight is None else sight,
        inclusive=named_inclusive if inclusive is None else inclusive,
    )


def _refuse_unplayable(name: str, said: Map) -> None:
    smaller, larger = sorted((said.rows, said.columns))
    if smaller < 3 or larger > LARGEST:
        raise OptionError("map", f"`{name}` must have 3 to {LARGEST} rows and columns; food is never put at the edge")
    if 0 in (said.agents, said.food):
        raise OptionError("map", f"`{name}` must have at least one agent (p) and one piece of food (f)")
    cells = said.rows * said.columns
    if said.agents >= cells:
        raise OptionError("map", f"`{name}` has {cells} cells, no room for {said.agents} agents and food; take a larger grid")
    # At 3 steps from other food, each piece has the 5 cells at and around it to itself.
    if said.food > cells // 5:
        most = f"of {cells} cells hold at most {cells // 5} pieces of food, not {said.food}"
        raise OptionError("map", f"`{name}`: grids {most}; take fewer or a larger grid")


def _unknown(name: str) -> str:
    numbers = re.findall(r"\d+", re.sub(r"-v\d$", "", name))
    guess = [f"{'x'.join(numbers[:2])}-{numbers[2]}p-{numbers[3]}f{'-coop' if 'co' in name else ''}"] if len(numbers) == 4 else []
    form = "a map is named {rows}x{columns}-{agents}p-{food}f, with -coop where food takes several agents"
    return f"`{name}` is no map: {form}.{did_you_mean(name, [*guess, *PAPER])} Those of the paper: {', '.join(PAPER)}"


def check(options: Mapping[str, Any], folders: Sequence[Path] = ()) -> Iterator[tuple[str, str]]:
    """Problems of an ``env: {type: foraging, …}`` section, as ``(option, message)``."""
    try:
        read(options["map"], options["sight"], options["food_level_inclusive"])
    except OptionError as error:
        yield error.option, error.message
    lowest, highest = options["min_player_level"], options["max_player_level"]
    if lowest > highest:
        yield "min_player_level", f"must be at most max_player_level={highest}, got {lowest}"
