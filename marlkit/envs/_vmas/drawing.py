"""Pictures of two-dimensional worlds, drawn without a display.

Anything shaped like a VMAS scenario can be drawn: entities with a position, a rotation, a colour and a shape that is a disc
(`radius`), a box (`length`, `width`, `hollow`) or a line (`length`). A scenario may also say what is joined by a thin line, by a
method `links(index)` that returns pairs of entities, and how an entity is coloured, by `colour(entity, index)`: three numbers
from 0 to 1, or `None` for the entity's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

LONGER_SIDE = 480
"""Pixels of a picture's longer side."""
_FINER = 3  # drawn this much larger and scaled down, which smooths the edges
_EVEN = 2  # video codecs want even sides
_BACKGROUND: Colour = (250, 250, 252)
_FRAME: Colour = (176, 180, 190)
_INK: Colour = (38, 42, 51)


@dataclass(frozen=True)
class Camera:
    """What part of the world a picture shows: its centre and half its extent, in the world's units."""

    x: float
    y: float
    half_width: float
    half_height: float

    @classmethod
    def over(cls, scenario: Any, index: int = 0) -> Camera:
        """A view of environment ``index`` that contains the world's bounds, what VMAS' own viewer shows, and every entity.

        Left out are entities parked far outside (some scenarios hide there what was collected) and scenery that is larger than
        the view, such as a floor.
        """
        x, y = scenario.render_origin
        zoom = float(scenario.viewer_zoom)
        limit = 20 * zoom
        world = scenario.world
        half = [zoom, zoom]
        for axis, semidim in enumerate((world.x_semidim, world.y_semidim)):
            half[axis] = max(half[axis], 1.05 * semidim) if semidim is not None else half[axis]
        for entity, (position, _) in zip(world.entities, _poses(world.entities, index), strict=True):
            reach = [abs(position[0] - x), abs(position[1] - y)]
            if max(reach) > limit or not _is_shown(entity, index):
                continue
            extents = _extent(entity, index)
            for axis, extent in enumerate(extents if max(extents) <= max(half) else ()):
                half[axis] = max(half[axis], reach[axis] + 1.05 * extent)
        # A strip would be hard to look at.
        narrowest = max(half) / 2
        return cls(float(x), float(y), max(half[0], narrowest), max(half[1], narrowest))

    @property
    def scale(self) -> float:
        """Pixels per unit of length in the finished picture."""
        return LONGER_SIDE / (2 * max(self.half_width, self.half_height))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the finished picture, even numbers of pixels."""
        sides = (self.half_width, self.half_height)
        return tuple(_EVEN * round(side * self.scale) for side in sides)  # type: ignore[return-value]


def draw_world(scenario: Any, index: int = 0, camera: Camera | None = None) -> NDArray[np.uint8]:
    """Picture of environment ``index``, ``[height, width, 3]`` uint8.

    Args:
        scenario: a VMAS scenario.
        index: which environment of the batch.
        camera: what to show; give the same one for every picture of a video. ``None``: all there is now.
    """
    camera = Camera.over(scenario, index) if camera is None else camera
    canvas = _Canvas(camera)
    world = scenario.world
    canvas.frame(world.x_semidim, world.y_semidim)
    agents = {id(agent): number for number, agent in enumerate(world.agents)}
    shown = [(e, pose) for e, pose in zip(world.entities, _poses(world.entities, index), strict=True) if _is_shown(e, index)]
    # What can be driven over lies below, agents on top.
    shown.sort(key=lambda pair: (id(pair[0]) in agents, bool(pair[0].collide), -pair[0].shape.circumscribed_radius()))
    goals = {id(agent.goal): number for number, agent in enumerate(world.agents) if getattr(agent, "goal", None) is not None}
    own_goals = goals if len(goals) == len(world.agents) else {}
    poses = {id(entity): position for entity, (position, _) in shown}
    for one, other in getattr(scenario, "links", _nothing)(index):
        canvas.link(poses[id(one)], poses[id(other)])
    own_colour = getattr(scenario, "colour", _nothing)
    for entity, (position, rotation) in shown:
        number = agents.get(id(entity))
        colour = _rgb(own_colour(entity, index) or _tint(entity, index))
        opacity = 255 if number is not None or entity.collide else 110
        canvas.shape(entity.shape, position, rotation, colour, opacity, raised=number is not None)
        label = own_goals.get(id(entity)) if number is None else number
        if label is not None and len(agents) > 1:
            canvas.label(str(label), position, entity.shape.circumscribed_radius(), dark=number is None)
    return canvas.picture()


class _Canvas:
    """Draws in the world's coordinates on a finer grid of pixels."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.scale = camera.scale * _FINER
        width, height = camera.size
        self.image = Image.new("RGB", (width * _FINER, height * _FINER), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def frame(self, x_semidim: float | None, y_semidim: float | None) -> None:
        """The bounds of the world, where it has any."""
        x = 1e3 if x_semidim is None else float(x_semidim)
        y = 1e3 if y_semidim is None else float(y_semidim)
        if x_semidim is not None or y_semidim is not None:
            self._polygon([(-x, -y), (x, -y), (x, y), (-x, y)], None, (*_FRAME, 255), 2)

    def shape(
        self, shape: Any, position: Sequence[float], rotation: float, colour: Colour, opacity: int, *, raised: bool
    ) -> None:
        """A disc, box or line with a darker rim."""
        fill, rim = (*colour, opacity), (*_darker(colour), opacity)
        if hasattr(shape, "radius"):
            x, y = self._pixel(position)
            radius = max(shape.radius * self.scale, 2.0 * _FINER)
            rim_width = _FINER * (2 if raised else 1)
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, rim, rim_width)
        elif hasattr(shape, "hollow"):
            corners = [(sx * shape.length / 2, sy * shape.width / 2) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            turned = [_turned(corner, position, rotation) for corner in corners]
            self._polygon(turned, None if shape.hollow else fill, rim, 1)
        else:
            ends = [self._pixel(_turned((s * shape.length / 2, 0.0), position, rotation)) for s in (-1, 1)]
            self.draw.line(ends, fill, 2 * _FINER)

    def link(self, one: Sequence[float], other: Sequence[float]) -> None:
        """A thin line between two places."""
        self.draw.line([self._pixel(one), self._pixel(other)], (*_FRAME, 255), _FINER)

    def label(self, text: str, position: Sequence[float], radius: float, *, dark: bool) -> None:
        """A word in the middle of a shape, if it is large enough to be read."""
        size = min(int(radius * self.scale * 1.15), 16 * _FINER)
        if size >= 6 * _FINER:
            colour = (*_INK, 150) if dark else (255, 255, 255, 255)
            self.draw.text(self._pixel(position), text, colour, _font(size), anchor="mm")

    def picture(self) -> NDArray[np.uint8]:
        return np.asarray(self.image.reduce(_FINER))

    def _polygon(self, corners: Iterable[tuple[float, float]], fill: Any, outline: Any, width: int) -> None:
        self.draw.polygon([self._pixel(corner) for corner in corners], fill, outline, width * _FINER)

    def _pixel(self, point: Sequence[float]) -> tuple[float, float]:
        x = (point[0] - self.camera.x) * self.scale + self.image.width / 2
        y = (self.camera.y - point[1]) * self.scale + self.image.height / 2
        far = 20.0 * max(self.image.size)
        return min(max(x, -far), far), min(max(y, -far), far)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _poses(entities: Sequence[Any], index: int) -> list[tuple[tuple[float, float], float]]:
    """Position and rotation of every entity of environment ``index``, fetched from the device at once."""
    rows = torch.stack([torch.cat([e.state.pos[index], e.state.rot[index]]) for e in entities]).tolist()
    return [((x, y), rotation) if math.isfinite(x + y + rotation) else ((1e9, 1e9), 0.0) for x, y, rotation in rows]


def _is_shown(entity: Any, index: int) -> bool:
    return bool(entity.is_rendering[index])


def _extent(entity: Any, index: int) -> tuple[float, float]:
    """Half of the width and height that an entity takes up as it lies."""
    shape = entity.shape
    if hasattr(shape, "radius"):
        return shape.radius, shape.radius
    rotation = float(entity.state.rot[index])
    length, width = shape.length / 2, (shape.width / 2 if hasattr(shape, "hollow") else 0.0)
    cosine, sine = abs(math.cos(rotation)), abs(math.sin(rotation))
    return length * cosine + width * sine, length * sine + width * cosine


def _turned(point: tuple[float, float], position: Sequence[float], rotation: float) -> tuple[float, float]:
    cosine, sine = math.cos(rotation), math.sin(rotation)
    return position[0] + point[0] * cosine - point[1] * sine, position[1] + point[0] * sine + point[1] * cosine


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _tint(entity: Any, index: int) -> Sequence[float]:
    colour = entity.color
    if isinstance(colour, torch.Tensor):
        colour = (colour[index] if colour.ndim > 1 else colour).tolist()
    return tuple(colour)


def _rgb(colour: Sequence[float]) -> Colour:
    red, green, blue = (round(255 * min(max(float(part), 0.0), 1.0)) for part in colour[:3])
    return red, green, blue


def _darker(colour: Colour) -> Colour:
    red, green, blue = (round(0.62 * part) for part in colour)
    return red, green, blue
