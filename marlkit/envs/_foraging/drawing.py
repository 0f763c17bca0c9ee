"""Pictures of foraging grids, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LONGER_SIDE = 480
"""Pixels of a picture's longer side, about."""
_FINER = 3  # drawn this much larger and scaled down, which smooths the edges
_BACKGROUND, _LINE, _FOOD, _INK = "#fafafc", "#d4d7de", "#c8352b", "#ffffff"
_AGENTS = ("#2f6fb0", "#2a8c5a", "#8a4fa3", "#c77414", "#1d8a99", "#a33b62", "#6b7a1e", "#5560c4", "#7a5138")

Entry = Sequence[int]
"""Row, column and level."""


def draw_grid(rows: int, columns: int, food: Sequence[Entry], agents: Sequence[Entry]) -> NDArray[np.uint8]:
    """Picture of one grid, ``[height, width, 3]`` uint8 with even sides.

    Food is square, agents are round, both with their levels. Agents that share a cell stand side by side.
    """
    side = 2 * max(4, LONGER_SIDE // (2 * max(rows, columns)))
    cell = side * _FINER
    image = Image.new("RGB", (columns * cell, rows * cell), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for row in range(rows + 1):
        draw.line((0, row * cell, columns * cell, row * cell), _LINE, _FINER)
    for column in range(columns + 1):
        draw.line((column * cell, 0, column * cell, rows * cell), _LINE, _FINER)
    for row, column, level in food:
        x, y, reach = (column + 0.5) * cell, (row + 0.5) * cell, 0.34 * cell
        draw.rounded_rectangle((x - reach, y - reach, x + reach, y + reach), 0.1 * cell, _FOOD)
        _write(draw, x, y, level, cell)
    for number, (row, column, level) in enumerate(agents):
        here = [other for other, entry in enumerate(agents) if list(entry[:2]) == [row, column]]
        x = (column + (here.index(number) + 0.5) / len(here)) * cell
        y, reach = (row + 0.5) * cell, 0.38 * cell / len(here)
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), _AGENTS[number % len(_AGENTS)])
        _write(draw, x, y, level, cell / len(here))
    return np.asarray(image.reduce(_FINER))


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, level: int, room: float) -> None:
    draw.text((x, y), str(level), _INK, ImageFont.load_default(max(6.0, 0.42 * room)), anchor="mm")
